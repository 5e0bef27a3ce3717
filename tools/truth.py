"""Whether networks are as fast as planned: plans rebuilt, compiled, and timed in turns with the dense network.

A case is a network, a runtime and a budget. The table is calibrated once for each network and runtime, and kept. Where
the planned network misses its budget by more than 5 %, the table is refined with what was seen and the plan made again,
at most three times, as `espalier run` does; every try is in the log, which a later call goes on with.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import backends
from planner import LatencyTable, problem
from planner.operations import Choice
from profiles import Profile, atomic
from profiles.errors import BackendUnavailable, EspalierError, PlanError
from tools.bench_latency_model import NETWORKS, profile_for
from tools.calibrate import Bench, Progress, bench, calibrate, measure_choices, refined
from tools.console import Stage
from tools.threads import one_thread

BUDGETS = (0.35, 0.45, 0.55, 0.65, 0.8)
NEAR, FAR, SHARE = 0.05, 0.10, 0.9  # 90 % of the plans within 5 %, none slower by more than 10 %
TRIES = 3
Log = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """What is planned and measured."""

    network: str
    runtime: str
    budget: float

    @property
    def key(self) -> str:
        """What its tries are logged under."""
        return f"{self.network} {self.runtime} {self.budget:g}"


def cases(networks: str, runtimes: str) -> Iterator[Case]:
    """Yield the cases of the named networks and runtimes, budgets innermost; raises EspalierError for a bad name."""
    for network in networks.split(",") if networks else NETWORKS:
        if network not in NETWORKS:
            raise EspalierError(f"no network {network!r}; there are {', '.join(NETWORKS)}")
        for runtime in runtimes.split(","):
            yield from (Case(network, runtime, budget) for budget in BUDGETS)


@dataclass(frozen=True)
class Attempt:
    """A planned network, with its predicted and its measured fraction of the dense latency."""

    choice: Choice
    planned: float
    measured: float


Solve = Callable[[LatencyTable], tuple[Choice, float]]  # a network, and its predicted fraction


def attempts(
    place: Bench, table: LatencyTable, budget: float, *, solve: Solve, progress: Progress, near: float = NEAR
) -> list[Attempt]:
    """Plan, build and measure; while that misses the budget, refine the table by it and plan again."""
    found: list[Attempt] = []
    while True:
        choice, planned = solve(table)
        found.append(Attempt(choice, planned, measured(place, choice, progress)))
        if abs(found[-1].measured / budget - 1) <= near or len(found) > TRIES:
            return found
        table, _error = refined(place, table, choice, progress=progress)


def tried(case: Case, make: Callable[[], nn.Module], profile: Profile, shape: tuple[int, ...], stage: Stage) -> Any:
    """Plan, build and measure one case; return its tries."""
    model, inputs = make().eval(), (torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)),)
    place = bench(model, inputs, profile)
    with stage.phase(f"{case.network} in {case.runtime}: table") as phase, one_thread():
        table = calibrate(place, progress=phase.step)

    def solve(known: LatencyTable) -> tuple[Choice, float]:
        plan = problem(model, inputs, profile, table=known).solve(case.budget)
        return plan.choice, plan.predicted.fraction

    with stage.phase(f"{case.key}: plan and measure") as phase, one_thread():
        found = attempts(place, table, case.budget, solve=solve, progress=phase.step)
    return [
        {
            "planned": each.planned,
            "measured": each.measured,
            "of_budget": each.measured / case.budget,
            "kept": dict(each.choice.keep),
            "removed": sorted(each.choice.removed),
        }
        for each in found
    ]


def measured(place: Bench, choice: Choice, progress: Progress) -> float:
    """Return the latency of a planned network, as a fraction of the dense one's in the same turns."""
    full = place.graph.choice(choice.keep, choice.removed)
    (probe,) = measure_choices(place, [full], progress=progress)
    return probe.relative


def run(file: Path, *, networks: str, runtimes: str, plans: int, console: Console) -> bool:
    """Measure up to `plans` cases that the log lacks, say how all of it stands, and return whether the limits hold."""
    log: Log = json.loads(file.read_text()) if file.exists() else {}
    stage, done = Stage(console), 0
    for case in cases(networks, runtimes):
        if case.key in log or done >= plans:
            continue
        profile = profile_for(case.runtime)
        if profile is None:
            console.print(f"{case.key}: no profile of {case.runtime} fits this machine", highlight=False)
            continue
        try:
            backends.load(case.runtime).version()
            make, shape = NETWORKS[case.network]
            log[case.key] = tried(case, make, profile, shape, stage)
        except (BackendUnavailable, PlanError) as error:
            console.print(f"{case.key}: {error}", highlight=False, markup=False)
            continue
        done += 1
        atomic.write_text(file, json.dumps(log, indent=1) + "\n")
    return told(log)


def rows(log: Log) -> list[dict[str, Any]]:
    """Return the tries of every case as the README's table keeps them."""
    found = []
    for key, tries in log.items():
        network, runtime, budget = key.split()
        short = [{name: round(t[name], 4) for name in ("planned", "measured", "of_budget")} for t in tries]
        found.append({"network": network, "runtime": runtime, "budget": float(budget), "tries": short})
    return found


def told(log: Log) -> bool:
    """Print every case and how many hold; return whether the limits hold."""
    out = Console()
    last = {key: tries[-1]["of_budget"] for key, tries in log.items()}
    for key, tries in log.items():
        words = ", ".join(f"{t['measured']:.3f} (planned {t['planned']:.3f})" for t in tries)
        out.print(f"{key}: measured {words}", highlight=False)
    near = sum(abs(ratio - 1) <= NEAR for ratio in last.values())
    slow = sum(ratio > 1 + FAR for ratio in last.values())
    out.print(
        f"{len(last)} plans: {near} within {NEAR:.0%} of the budget (at least {SHARE:.0%} wanted), "
        f"{slow} slower by more than {FAR:.0%} (none wanted)",
        highlight=False,
    )
    return bool(last) and near >= SHARE * len(last) and slow == 0
