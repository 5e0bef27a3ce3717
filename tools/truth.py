"""Whether networks are as fast as planned: plans rebuilt, compiled, and timed in turns with the dense network.

A case is a network, a runtime and a budget. The table is calibrated once for each network and runtime, and kept. Where
the planned network misses its budget, and what was predicted of it, by more than 5 %, the table is refined with what
was seen and the plan made again, at most three times, as `espalier run` does; every try is in the log, which a later
call goes on with. Where a device's steps are wide, the best plan may stay below its budget.
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
from profiles import Profile, atomic
from profiles.errors import BackendUnavailable, EspalierError, PlanError
from tools.bench_latency_model import NETWORKS, profile_for
from tools.calibrate import Bench, bench, calibrate, measure_choices, refined
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


def tried(case: Case, make: Callable[[], nn.Module], profile: Profile, shape: tuple[int, ...], stage: Stage) -> Any:
    """Plan, build and measure one case; return its tries."""
    from planner import problem

    model, inputs = make().eval(), (torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)),)
    place = bench(model, inputs, profile)
    with stage.phase(f"{case.network} in {case.runtime}: table") as phase, one_thread():
        table = calibrate(place, progress=phase.step)
    tries: list[dict[str, Any]] = []
    with stage.phase(f"{case.key}: plan and measure") as phase, one_thread():
        for _ in range(1 + TRIES):
            plan = problem(model, inputs, profile, table=table).solve(case.budget)
            fraction = measured(place, plan.choice, phase.step)
            tries.append(
                {
                    "planned": plan.predicted.fraction,
                    "measured": fraction,
                    "of_budget": fraction / case.budget,
                    "kept": {w.name: w.keep for w in plan.widths},
                    "removed": sorted(b.name for b in plan.blocks if b.removed),
                }
            )
            if min(abs(fraction / wanted - 1) for wanted in (case.budget, plan.predicted.fraction)) <= NEAR:
                break
            table, _error = refined(place, table, plan.choice, progress=phase.step)
    return tries


def measured(place: Bench, choice: Any, progress: Callable[[str, int, int], None]) -> float:
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
