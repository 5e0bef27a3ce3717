"""The models that a run measures side by side: dense, ours, and the same work removed without knowing the device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from backends import Artifact, Candidate, Measurement, compare, installed, load, ratio
from backends.rebuild import cut
from planner.graph import Graph
from planner.operations import Choice
from profiles import Profile
from tools.outcome import Interval, Row


@dataclass(frozen=True)
class Contender:
    """One model of the comparison."""

    label: str
    model: nn.Module
    choice: Choice
    accuracy: float | None
    predicted_s: Interval | None
    file: str  # name without suffix


def uniform(graph: Graph, macs: int, *, grid: int) -> Choice:
    """Return the choice that narrows every width inside blocks by one ratio, to about `macs`, and never onto the grid.

    It is what a pruner does that is given a ratio and does not know the device.
    """
    widths = [width for width in graph.cuttable if not width.is_stream]

    def at(share: float) -> Choice:
        keep = {}
        for width in widths:
            count = max(1, min(width.size, round(width.size * share)))
            keep[width.name] = count - 1 if count % grid == 0 and count > 1 else count
        return graph.choice(keep)

    shares = [i / 256 for i in range(1, 257)]
    return min((at(share) for share in shares), key=lambda choice: abs(graph.macs(choice) - macs))


def narrowed(model: nn.Module, graph: Graph, choice: Choice) -> nn.Module:
    """Return `model` cut to the first channels of each width: for timing, where only shapes matter."""
    widths = [w for w in graph.cuttable if choice.keep[w.name] < w.size and w.block not in choice.removed]
    return cut(model, graph, {w.name: torch.arange(choice.keep[w.name]) for w in widths}, choice.removed)


def runtimes(profile: Profile) -> list[str]:
    """Return the runtimes to measure on: the profile's own first, then all others that are installed."""
    return list(dict.fromkeys([profile.runtime.name, *sorted(installed())]))


Progress = Callable[[str, int, int], None]


def built(
    contenders: Sequence[Contender],
    names: Sequence[str],
    inputs: tuple[Tensor, ...],
    folder: Path,
    *,
    progress: Progress,
) -> dict[tuple[str, str], Artifact]:
    """Compile every contender for every runtime, each checked against PyTorch; the records lie beside the files."""
    artifacts: dict[tuple[str, str], Artifact] = {}
    for runtime in names:
        for contender in contenders:
            progress(f"{contender.label} for {runtime}", len(artifacts), len(names) * len(contenders))
            path = folder / f"{contender.file}{load(runtime).SUFFIX}"
            artifact = load(runtime).build(contender.model, inputs, None, path)
            artifact.save(folder / f"{contender.file}.{runtime}.json")
            artifacts[contender.label, runtime] = artifact
    return artifacts


def timed(
    contenders: Sequence[Contender],
    artifacts: Mapping[tuple[str, str], Artifact],
    inputs: tuple[Tensor, ...],
    *,
    seconds: float,
    progress: Progress,
) -> dict[str, list[Measurement]]:
    """Time the contenders in turns, runtime by runtime."""
    measured = {}
    names = list(dict.fromkeys(runtime for _, runtime in artifacts))
    for index, name in enumerate(names):
        runtime = load(name)
        candidates = [
            Candidate.of(
                runtime, artifacts[c.label, name], inputs, label=c.label, model=c.model, instances=runtime.INSTANCES
            )
            for c in contenders
        ]

        def show(done: int, total: int, *, index: int = index, name: str = name) -> None:
            progress(name, index * total + done, len(names) * total)

        measured[name] = compare(candidates, seconds=seconds, progress=show)
    return measured


def rows(contenders: Sequence[Contender], graph: Graph, measured: Mapping[str, Sequence[Measurement]]) -> list[Row]:
    """Return the table: speed-ups against the first contender, the dense one, measured in the same turns."""
    dense_macs = graph.macs(graph.dense)
    found = []
    for index, contender in enumerate(contenders):
        macs = graph.macs(contender.choice)
        speedup = {}
        for runtime, measurements in measured.items():
            gain = ratio(measurements[0], measurements[index])
            speedup[runtime] = Interval(value=gain.value, low=gain.ci95[0], high=gain.ci95[1])
        found.append(
            Row(
                label=contender.label,
                params=sum(parameter.numel() for parameter in contender.model.parameters()),
                macs=macs,
                accuracy=contender.accuracy,
                predicted_s=contender.predicted_s,
                measured={name: _latency(measurements[index]) for name, measurements in measured.items()},
                speedup=speedup,
                efficiency={name: gain.value / (dense_macs / macs) for name, gain in speedup.items()},
            )
        )
    return found


def _latency(measurement: Measurement) -> Interval:
    latency = measurement.latency_s
    return Interval(value=latency.p50, low=latency.ci95[0], high=latency.ci95[1])
