"""The verbs `compile` and `measure` on files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from backends import Artifact, Candidate, Measurement, compare, load, ratio
from backends.weights import load_rebuilt
from planner import Plan
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
    runtime: str,
    *,
    plan: Path | None,
    weights: Path | None,
    inputs: str | None,
    data: str | None,
) -> Artifact:
    """Compile a model for a runtime and write its record beside it."""
    if plan is not None and inputs is None and data is None:
        example = Plan.load(plan).inputs_like()
    else:
        example = example_inputs(inputs, load_data(data).test if data else None)
    built = load(runtime).build(small_model(model, plan, weights), example, None, out)
    if plan is not None:
        built = built.model_copy(update={"plan_sha256": Plan.load(plan).sha256})
    built.save(out.with_name(out.name + ".json"))
    return built


def measured(
    records: Sequence[Path],
    *,
    model: str | None,
    plan: Path | None,
    seconds: float,
    progress: Callable[[int, int], None],
) -> list[Measurement]:
    """Measure the artifacts of these records in turns."""
    candidates = []
    for record in records:
        artifact = Artifact.load(record)
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(spec.shape, generator=generator) for spec in artifact.inputs]
        net = None
        if artifact.runtime == "pytorch":
            if model is None:
                raise EspalierError(f"{record} is a pytorch artifact: give --model, and --plan if it is a rebuilt one")
            net = small_model(model, plan if artifact.plan_sha256 else None, Path(artifact.path))
        candidates.append(Candidate.of(load(artifact.runtime), artifact, inputs, label=str(record), model=net))
    return compare(candidates, seconds=seconds, progress=progress)


def measurement_table(measurements: Sequence[Measurement]) -> Table:
    """Return latencies and ratios to the first, for the terminal."""
    table = Table("artifact", "runtime", "p50 ms", "95 %", "p90 ms", "p99 ms", "speed-up", box=None)
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
        )
    return table
