"""What runs: runtimes that build and open model files, and the timer that compares them.

Importing this package imports no inference runtime; `load` does.
"""

from backends.artifact import Artifact
from backends.export import export_onnx
from backends.latency import Latency, Measurement, Ratio, ratio
from backends.measure import Candidate, compare, measure
from backends.rebuild import rebuild
from backends.registry import installed, load
from backends.weights import load_rebuilt, save

__all__ = [
    "Artifact",
    "Candidate",
    "Latency",
    "Measurement",
    "Ratio",
    "compare",
    "export_onnx",
    "installed",
    "load",
    "load_rebuilt",
    "measure",
    "ratio",
    "rebuild",
    "save",
]
