"""Hold predicted latency against measured latency, on random pruned networks that calibration did not see.

    python tools/bench_latency_model.py [--networks resnet20,vit_tiny] [--runtimes onnxruntime] [--configurations 25]
        [--json FILE] [--evidence]

For each network, runtime and batch: draw configurations whose widths lie on the profile's grid and off it, with
residual blocks removed and not, build and time them in turns with the dense network, calibrate (once per machine,
kept), time them again, and compare the mean of both measured fractions of the dense latency with what is predicted from
the measured table, from the profile's documented rules alone, and from multiply-accumulates. Printed are the mean
absolute and the worst error and Kendall's rank correlation of each, and of the first measurement as a prediction of the
second, which says how finely the machine can be measured at all. With `--json` every measurement is written as it is
made, and a later run goes on from there; with `--evidence` the scores go into the table of the README. Exit 1 if a
limit is missed.

With `--runtimes vela`, for three Ethos-U, or the profile of one, nothing is measured: the table and what it is held
against are the compiler's estimates.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau
from torch import nn

import backends
import profiles
from planner.candidates import candidates
from planner.graph import Graph
from planner.latency import LatencyTable, Probe, Rules
from planner.operations import Choice
from profiles import Profile, atomic
from profiles.errors import BackendUnavailable, EspalierError
from tools.calibrate import LIMIT_S, Bench, bench, calibrate, measure_choices
from tools.console import Stage
from tools.evidence.record import add
from tools.examples import cifar10, imagenet

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "resnet20": (cifar10.resnet20, (3, 32, 32)),
    "resnet56": (cifar10.resnet56, (3, 32, 32)),
    "resnet18": (imagenet.resnet18, (3, 224, 224)),
    "mobilenet_v2": (imagenet.mobilenet_v2, (3, 224, 224)),
    "vit_tiny": (imagenet.vit_tiny, (3, 224, 224)),
}
RUNTIMES = ("onnxruntime", "openvino", "pytorch", "executorch")
LIMITS = {"table": {"mape": 0.05, "worst": 0.15, "tau": 0.95}, "rules": {"tau": 0.85}}
NPUS = ("ethos-u55-128.vela.int8", "ethos-u65-512.vela.int8", "ethos-u85-256.vela.int8")
ESTIMATES = {"table": {"mape": 0.05}, "rules": {"tau": 0.85}}  # of a compiler, which is deterministic
EAGER = {"table": {"mape": 0.12}}  # PyTorch is noisier by nature
_STREAMS = (1, 6)  # of eight configurations, those that narrow streams too: one off the grid, one on it
_TOGETHER = 13  # networks timed in turns with the dense one, and written at once


@dataclass(frozen=True)
class Case:
    """One network in one runtime."""

    network: str
    runtime: str
    version: str
    batch: int
    seed: int

    @property
    def key(self) -> str:
        """What its measurements are kept under."""
        return f"{self.network} b{self.batch} {self.runtime} {self.version} seed {self.seed}"


@dataclass(frozen=True)
class Score:
    """How well one way to predict did."""

    case: str
    basis: str  # "table", "rules", "macs", or "again" for two measurements
    networks: int
    mape: float
    worst: float
    tau: float
    missed: tuple[str, ...]  # limits

    @property
    def holds(self) -> bool:
        """Whether every limit is kept."""
        return not self.missed


def configurations(graph: Graph, profile: Profile, count: int, *, seed: int) -> list[Choice]:
    """Return random choices: every second one off the profile's grid, and every other pair without some blocks.

    How much is cut differs from network to network and from width to width, as in plans; three in four keep all streams
    whole.
    """
    options = candidates(graph, profile)
    random, made = np.random.default_rng(seed), []
    blocks = [block.name for block in graph.blocks if not block.frozen]
    for index in range(count):
        level = random.uniform(0.2, 1.2)
        keep = {}
        for name, counts in options.items():
            wanted = graph.width[name].size * min(1.0, random.uniform(0, level + 0.3))
            if graph.width[name].is_stream and index % 8 not in _STREAMS:
                continue
            on_grid = min(counts, key=lambda kept: abs(kept - wanted))
            keep[name] = max(1, round(wanted)) if index % 2 else int(on_grid)
        share = random.uniform(0.1, 0.6) if index % 4 > 1 else 0.0
        made.append(graph.choice(keep, frozenset(name for name in blocks if random.random() < share)))
    return made


def score(case: str, basis: str, predicted: Sequence[float], measured: Sequence[float]) -> Score:
    """Return the errors and the rank correlation of predicted fractions of the dense latency."""
    errors = np.abs(np.array(predicted) / np.array(measured) - 1)
    tau = float(kendalltau(predicted, measured).statistic)
    limits = (EAGER if "pytorch" in case else ESTIMATES if ".vela." in case else LIMITS).get(basis, {})
    mape, worst = float(errors.mean()), float(errors.max())
    found = {"mape": mape, "worst": worst, "tau": tau}
    missed = tuple(n for n, limit in limits.items() if (found[n] < limit if n == "tau" else found[n] > limit))
    return Score(case, basis, len(measured), mape, worst, tau, missed)


def scores(
    case: Case, graph: Graph, profile: Profile, table: LatencyTable, passes: Sequence[Sequence[Probe]]
) -> list[Score]:
    """Return the scores of the three ways to predict one network in one runtime, and of measuring it if done twice."""
    fractions = [[probe.relative for probe in probes] for probes in passes]
    measured = np.mean(fractions, axis=0).tolist()
    choices, dense, rules = [probe.choice for probe in passes[0]], graph.dense, Rules(profile)
    predicted = {
        "table": [table.latency(graph, choice) / table.latency(graph, dense) for choice in choices],
        "rules": [rules.latency(graph, choice) / rules.latency(graph, dense) for choice in choices],
        "macs": [graph.macs(choice) / graph.macs(dense) for choice in choices],
    }
    found = [score(case.key, basis, fractions, measured) for basis, fractions in predicted.items()]
    return found + [score(case.key, "again", fractions[0], other) for other in fractions[1:]]


def measured(key: str, place: Bench, wanted: Sequence[Choice], *, file: Path | None, stage: Stage) -> list[Probe]:
    """Return the measurements of the wanted choices: those that the file holds by `key`, and the rest measured now."""
    kept = stored(file)
    probes = [Probe.model_validate(entry) for entry in kept.get(key, [])][: len(wanted)]
    if any(probe.choice != choice for probe, choice in zip(probes, wanted, strict=False)):
        probes = []
    with stage.phase(f"measuring {key}") as phase:
        while len(probes) < len(wanted):
            probes += measure_choices(place, wanted[len(probes) : len(probes) + _TOGETHER], progress=phase.step)
            kept[key] = [probe.model_dump(mode="json") for probe in probes]
            if file:
                atomic.write_text(file, json.dumps({**_document(file), "measured": kept}, indent=1) + "\n")
    return probes


def stored(file: Path | None) -> dict[str, list[object]]:
    """Return the measurements in a file by case; raises EspalierError if it is another file."""
    found = _document(file).get("measured", {}) if file else {}
    if not isinstance(found, dict):
        raise EspalierError(f"{file} holds no measurements of this benchmark; give another --json FILE")
    return found


def _document(file: Path) -> dict[str, object]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise EspalierError(f"{file} is not JSON ({error}); give another --json FILE") from error
    if not isinstance(content, dict):
        raise EspalierError(f"{file} holds no measurements of this benchmark; give another --json FILE")
    return content


def profile_for(runtime: str) -> Profile | None:
    """Return the profile of this machine that fits a runtime best in fp32, None if there is none."""
    fitting = (p for p in profiles.detect() if p.runtime.name == runtime and p.dtype.weights == "fp32")
    return next(fitting, None)


@dataclass(frozen=True)
class Effort:
    """How long calibration and each network take, and how many networks there are."""

    count: int
    seconds: float  # of timing per network and pass
    limit_s: float  # of calibration


def run(case: Case, profile: Profile, effort: Effort, *, file: Path | None, stage: Stage) -> list[Score]:
    """Measure, calibrate, measure again, as the machine changes from minute to minute, and score."""
    factory, shape = NETWORKS[case.network]
    inputs = (torch.randn(case.batch, *shape, generator=torch.Generator().manual_seed(0)),)
    torch.manual_seed(0)  # a compiler packs weights: what it estimates depends on them, and what was lowered is kept
    place = bench(factory().eval(), inputs, profile, threads=1, seconds=effort.seconds)
    wanted = configurations(place.graph, profile, effort.count, seed=case.seed)
    passes = [measured(case.key, place, wanted, file=file, stage=stage)]
    with stage.phase(f"calibrating {case.network} b{case.batch} in {case.runtime}") as phase:
        table = calibrate(place, progress=phase.step, limit_s=effort.limit_s)
    if profile.id not in NPUS:  # a compiler's estimate is the same the second time
        passes.append(measured(f"{case.key}, again", place, wanted, file=file, stage=stage))
    return scores(case, place.graph, profile, table, passes)


def available(runtime: str, stage: Stage) -> Profile | None:
    """Return the profile to measure a runtime with, or of an NPU the one of that name; None, and say why, if absent."""
    npu = profiles.load(runtime) if runtime in NPUS else None
    try:
        backends.load(npu.runtime.name if npu else runtime).version()
    except BackendUnavailable as error:
        stage.say(f"{runtime} is left out: {error}")
        return None
    profile = npu or profile_for(runtime)
    if profile is None:
        stage.say(f"{runtime} is left out: no fp32 profile of it fits this machine")
    return profile


def _cases(networks: str, runtimes: str, batches: str, seed: int, stage: Stage) -> list[tuple[Case, Profile]]:
    found = []
    wanted = (each for name in runtimes.split(",") for each in (NPUS if name == "vela" else (name,)))
    for runtime in wanted:
        if (profile := available(runtime, stage)) is None:
            continue
        version = backends.load(profile.runtime.name).version()
        for network in networks.split(","):
            if network not in NETWORKS:
                raise typer.BadParameter(f"unknown network {network!r}; known are {', '.join(NETWORKS)}")
            found += [(Case(network, runtime, version, int(batch), seed), profile) for batch in batches.split(",")]
    return found


def _shown(rows: Sequence[Score]) -> Table:
    table = Table("network", "predicted from", "networks", "MAPE", "worst", "tau", "")
    for row in rows:
        figures = (f"{100 * row.mape:.1f} %", f"{100 * row.worst:.1f} %", f"{row.tau:.3f}")
        table.add_row(row.case, row.basis, str(row.networks), *figures, "" if row.holds else "missed")
    return table


def main(
    networks: Annotated[str, typer.Option(help="comma-separated")] = ",".join(NETWORKS),
    runtimes: Annotated[str, typer.Option(help="comma-separated")] = ",".join(RUNTIMES),
    batches: Annotated[str, typer.Option(help="comma-separated")] = "1,8",
    configurations: Annotated[int, typer.Option(min=3, help="random networks per network and runtime")] = 25,
    seconds: Annotated[float, typer.Option(help="of timing per network and pass")] = 0.25,
    minutes: Annotated[float, typer.Option(min=0.1, help="of calibration at most")] = LIMIT_S / 60,
    seed: int = 1,
    file: Annotated[Path | None, typer.Option("--json", help="where measurements and scores are kept")] = None,
    evidence: Annotated[bool, typer.Option("--evidence", help="add the scores to evidence/latency.json")] = False,
) -> None:
    """Print how well latency is predicted; exit 1 if a limit is missed."""
    stage = Stage(Console(stderr=True))
    torch.set_num_threads(1)
    logging.getLogger("backends").setLevel(logging.ERROR)  # it tells of each width off the grid, which is the purpose
    rows: list[Score] = []
    for case, profile in _cases(networks, runtimes, batches, seed, stage):
        rows += run(case, profile, Effort(configurations, seconds, 60 * minutes), file=file, stage=stage)
        if file:
            content = {**_document(file), "scores": [asdict(row) for row in rows]}
            atomic.write_text(file, json.dumps(content, indent=1) + "\n")
    if evidence:
        command = "python -m tools.bench_latency_model --evidence --seed N"
        add("latency", [asdict(row) for row in rows], command=command, key=("case", "basis"))
    Console().print(_shown(rows))
    sys.exit(0 if rows and all(row.holds for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
