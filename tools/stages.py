"""The verbs `compile` and `measure` on files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

import profiles
from backends import Artifact, Candidate, Measurement, Memory, Samples, Throughput, load, ratio
from backends.weights import load_rebuilt
from planner import Plan
from planner.graph import random_input
from profiles.errors import EspalierError
from tools.sources import example_inputs, load_data, load_model


def small_model(model: str, plan: Path | None, weights: Path | None) -> nn.Module:
    """Return the dense model of a factory, or the smaller one that `weights` were rebuilt into by `plan`."""
    if plan is None:
        return load_model(model, weights)
    if weights is None:
        raise EspalierError("--plan needs --weights: the smaller weights that `espalier rebuild` wrote")
    return load_rebuilt(Plan.load(plan), load_model(model), weights).eval()


def compiled(
    model: str,
    out: Path,
    runtime: str | None,
    *,
    profile: str | None = None,
    plan: Path | None,
    weights: Path | None,
    inputs: str | None,
    data: str | None,
) -> Artifact:
    """Compile a model for a runtime, as its profile asks if there is one, and write its record beside it."""
    source = load_data(data) if data else None
    if plan is not None and inputs is None and source is None:
        example = Plan.load(plan).inputs_like()
    else:
        example = example_inputs(inputs, source.test if source else None)
    device = profiles.load(profile) if profile else None
    samples = Samples.of(source.train, source.test, like=example) if source and device else Samples()
    backend = load(runtime or (device.runtime.name if device else "onnxruntime"))
    built = backend.build(small_model(model, plan, weights), example, device, out, samples=samples)
    built.save(out.with_name(out.name + ".json"))
    return built


def told(artifact: Artifact) -> str:
    """Return what an artifact says of itself, for the terminal."""
    words = [
        f"{artifact.path}: {artifact.size_bytes:,} bytes, {artifact.dtype}, largest difference to PyTorch "
        f"{artifact.parity.max_rel:.1e}"
    ]
    if artifact.accuracy is not None:
        words.append(f"accuracy {artifact.accuracy.compiled:.2%}, PyTorch {artifact.accuracy.pytorch:.2%}")
    if artifact.estimate is not None:
        words.append(f"{artifact.estimate.compiler} estimates {artifact.estimate.latency_s * 1e3:.3f} ms; not measured")
    return "\n".join([*words, *artifact.remarks])


def opened(records: Sequence[Path], *, model: str | None, plan: Path | None, streams: int = 0) -> list[Candidate]:
    """Open the artifacts of these records with random inputs: as often as their runtime asks, or `streams` times."""
    candidates = []
    for record in records:
        artifact = Artifact.load(record)
        generator = torch.Generator().manual_seed(0)
        inputs = [random_input(spec.shape, spec.dtype, generator) for spec in artifact.inputs]
        net = None
        if artifact.runtime == "pytorch" and artifact.settings.get("mode") != "exported":
            if model is None:
                raise EspalierError(f"{record} is a pytorch artifact: give --model, and --plan if it is a rebuilt one")
            net = small_model(model, plan if artifact.plan_sha256 else None, Path(artifact.path))
        runtime = load(artifact.runtime)
        instances = streams or runtime.INSTANCES
        candidates.append(Candidate.of(runtime, artifact, inputs, label=str(record), model=net, instances=instances))
    return candidates


def measurement_table(
    measurements: Sequence[Measurement], rates: Sequence[Throughput], memories: Sequence[Memory]
) -> Table:
    """Return latencies and ratios to the first, for the terminal; with them throughput and memory where measured."""
    table = Table("artifact", "runtime", "p50 ms", "95 %", "p90 ms", "p99 ms", "speed-up", box=None)
    if rates:
        table.add_column(f"examples/s, {rates[0].streams} streams")
    if memories:
        table.add_column("peak MB")
    for m in measurements:
        low, high = m.latency_s.ci95
        gain = ratio(measurements[0], m)
        table.add_row(
            m.label,
            f"{m.runtime} {m.runtime_version}",
            f"{m.latency_s.p50 * 1e3:.4f}",
            f"{low * 1e3:.4f}-{high * 1e3:.4f}",
            f"{m.latency_s.p90 * 1e3:.4f}",
            f"{m.latency_s.p99 * 1e3:.4f}",
            f"{gain.value:.2f}x [{gain.ci95[0]:.2f}, {gain.ci95[1]:.2f}]",
            *(f"{rate.examples_per_s:.4g}" for rate in rates if rate.label == m.label),
            *(f"{memory.added_bytes / 1e6:.1f}" for memory in memories if memory.label == m.label),
        )
    table.caption = "\n".join(f"{m.label}: {m.remark}; measure again" for m in measurements if m.remark) or None
    return table
