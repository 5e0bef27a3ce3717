"""What runs: runtimes that build and open model files, and the timer that compares them.

Importing this package imports no inference runtime; `load` does.
"""

from backends.artifact import Artifact
from backends.carry import carry_over
from backends.channels import select
from backends.estimate import Estimate
from backends.export import export_onnx
from backends.latency import Latency, Measurement, Ratio, ratio
from backends.measure import Candidate, compare, measure
from backends.memory import Memory, peak_memory
from backends.rebuild import rebuild
from backends.registry import installed, load
from backends.samples import Samples
from backends.shapes import crop, gather
from backends.throughput import Throughput, throughput
from backends.weights import load_pruned, load_rebuilt, save, save_pruned

__all__ = [
    "Artifact",
    "Candidate",
    "Estimate",
    "Latency",
    "Measurement",
    "Memory",
    "Ratio",
    "Samples",
    "Throughput",
    "carry_over",
    "compare",
    "crop",
    "export_onnx",
    "gather",
    "installed",
    "load",
    "load_pruned",
    "load_rebuilt",
    "measure",
    "peak_memory",
    "ratio",
    "rebuild",
    "save",
    "save_pruned",
    "select",
    "throughput",
]
