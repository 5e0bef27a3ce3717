"""The planner against what people prune with: the importance that is kept at an equal latency, predicted or measured.

All have the same latency table, or documented rules, and the same weights, and are judged alike: see tools/rivals.py.
At an equal *predicted* latency a rival is the best network on its path within the budget. At an equal *measured* one,
networks on its path on both sides of the budget are built and timed in turns with the planner's and the dense one; what
it keeps at the planner's own measured latency lies on the line between its two neighbours.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import numpy as np
import torch
from rich.table import Table
from torch import nn

import planner
import profiles
from planner import Importance, LatencyTable, Limits, Problem, Scope
from planner.operations import Choice
from profiles.errors import PlanError
from tools import rivals
from tools.calibrate import Bench, Progress, bench, measure_choices
from tools.examples import cifar10, imagenet
from tools.rivals import Judge

Make = Callable[[], nn.Module]
NETWORKS: dict[str, tuple[Make, tuple[int, int, int]]] = {
    "ResNet-20": (cifar10.resnet20, (3, 32, 32)),
    "ResNet-56": (cifar10.resnet56, (3, 32, 32)),
    "ResNet-18": (imagenet.resnet18, (3, 224, 224)),
    "MobileNetV2": (imagenet.mobilenet_v2, (3, 224, 224)),
}
BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
MEASURED_BUDGETS = (0.35, 0.5)
AROUND = (0.9, 1.0, 1.12)  # predicted latencies of a rival's networks that are timed, of the budget
TOGETHER = 12  # networks timed in turns
TIGHT, BETTER = 0.5, 0.1  # at budgets up to the one, more should be kept by the other in the median


@dataclass(frozen=True)
class Kept:
    """The importance that a rival and the planner keep at one budget; `latency` is the planner's, measured."""

    network: str
    profile: str
    budget: float
    rival: str
    ours: float
    theirs: float | None  # None: it cannot reach the budget
    removed: int = 0  # blocks that the planner removes
    latency: float | None = None

    @property
    def gain(self) -> float:
        """Return how much more the planner keeps, relative."""
        return self.ours / self.theirs - 1 if self.theirs else float("inf")


def spread(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Draw how strong each output channel of each layer is: of random weights all are alike, of trained ones not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
                for parameter in module.parameters(recurse=False):
                    wide = torch.rand((), generator=generator)  # of this layer
                    factor = (torch.randn(len(parameter), generator=generator) * wide).exp()
                    parameter.mul_(factor.view(-1, *[1] * (parameter.dim() - 1)))
    return model


@dataclass(frozen=True)
class Contest:
    """One network on one device: the planner, the judge, and the networks that each rival passes."""

    network: str
    problem: Problem
    judge: Judge
    losses: Importance

    @classmethod
    def of(cls, network: str, profile: str, table: LatencyTable | None = None) -> "Contest":
        """Pose it on a network whose norms are drawn."""
        make, shape = NETWORKS[network]
        model, inputs = spread(make()).eval(), (torch.ones(1, *shape),)
        return cls.on(
            network, planner.problem(model, inputs, profiles.load(profile), table=table, scope=Scope(lossy=True))
        )

    @classmethod
    def on(cls, network: str, problem: Problem) -> "Contest":
        """Judge a problem."""
        judge = Judge.of(problem)
        return cls(network, problem, judge, judge.measured(problem.options(thrifty=True)))

    @cached_property
    def passed(self) -> dict[str, list[Choice]]:
        """The networks that each rival passes."""
        return dict(rivals.paths(self.judge, self.problem))

    @cached_property
    def _staying(self) -> Importance:
        """The losses where no block is worth removing."""
        return replace(self.losses, blocks=dict.fromkeys(self.losses.blocks, 1.0 + len(self.judge.kept)))

    def ours(self, budget: float | None, limits: Limits | None = None) -> Choice | None:
        """Return the planner's network: with blocks removed or without, as it keeps more; None below the floor.

        The program adds up what blocks and channels lose, which counts twice what both hold.
        """
        found = []
        for losses in (self.losses, self._staying):
            try:
                choice = self.problem.solve(budget, limits, importance=losses).choice
            except PlanError:
                return None
            found.append(self.judge.graph.choice(choice.keep, choice.removed))
        return max(found, key=self.judge.importance)

    def kept(self, budget: float, rival: str, ours: Choice, theirs: float | None) -> Kept:
        """Return one row."""
        own, profile = self.judge.importance(ours), self.problem.profile.id
        return Kept(self.network, profile, budget, rival, own, theirs, len(ours.removed))

    def predicted(self) -> Iterator[Kept]:
        """Compare at an equal predicted latency."""
        found = {budget: choice for budget in BUDGETS if (choice := self.ours(budget)) is not None}
        for name, path in self.passed.items():
            for budget, ours in found.items():
                best = self.judge.best_within(path, budget)
                yield self.kept(budget, name, ours, None if best is None else self.judge.importance(best))

    def measured(self, *, progress: Progress) -> Iterator[Kept]:
        """Compare at an equal measured latency."""
        found = {budget: choice for budget in MEASURED_BUDGETS if (choice := self.ours(budget)) is not None}
        around = {(b, name): self.around(path, b) for b in found for name, path in self.passed.items()}
        wanted = [*found.values(), *(choice for some in around.values() for choice in some)]
        seconds = self.timed(wanted, progress=progress)
        for (budget, name), some in around.items():
            latency = seconds[_key(found[budget])]
            points = [(seconds[_key(own)], self.judge.importance(own)) for own in some]
            yield replace(self.kept(budget, name, found[budget], between(points, latency)), latency=latency)

    def around(self, path: Sequence[Choice], budget: float) -> list[Choice]:
        """Return networks on a path near a budget, at different distances from it."""
        latencies = np.array([self.judge.latency(choice) for choice in path])
        nearest = {int(np.abs(latencies - share * budget).argmin()) for share in AROUND}
        return [path[i] for i in sorted(nearest)]

    def timed(self, wanted: Sequence[Choice], *, progress: Progress) -> dict[object, float]:
        """Return the measured fractions of the dense latency of networks."""
        different = list({_key(choice): choice for choice in wanted}.values())
        place: Bench = bench(self.problem.model, self.problem.graph.example(), self.problem.profile)
        place, found = replace(place, graph=self.problem.graph), dict[object, float]()
        for first in range(0, len(different), TOGETHER):
            some = different[first : first + TOGETHER]
            probes = measure_choices(place, some, progress=progress, offset=(first, len(different)))
            found |= {_key(choice): probe.relative for choice, probe in zip(some, probes, strict=True)}
        return found


def _key(choice: Choice) -> object:
    return tuple(sorted(choice.keep.items())), choice.removed


def between(points: Sequence[tuple[float, float]], latency: float) -> float | None:
    """Return the importance that is kept at a latency, on the line between (latency, importance); None outside."""
    latencies, kept = np.array(sorted(points)).T
    if not latencies[0] <= latency <= latencies[-1]:
        return None
    return float(np.interp(latency, latencies, np.maximum.accumulate(kept)))


def told(rows: Sequence[Kept], how: str) -> tuple[Table, bool]:
    """Return the table of all rows, and whether the planner is never worse and enough better."""
    table = Table(
        "rival", "plans", "not reached", "lowest gain", "median gain", f"median, budgets <= {TIGHT}", box=None
    )
    for name in dict.fromkeys(row.rival for row in rows):
        mine = [row for row in rows if row.rival == name]
        gains = [row.gain for row in mine if row.theirs is not None]
        tight = [row.gain for row in mine if row.theirs is not None and row.budget <= TIGHT]
        shown = [f"{value:+.1%}" for value in (min(gains), median(gains), median(tight))] if tight else ["", "", ""]
        table.add_row(name, str(len(mine)), str(len(mine) - len(gains)), *shown)
    reached = [row for row in rows if row.theirs is not None]
    tight = [row.gain for row in reached if row.budget <= TIGHT]
    middle = median(tight) if tight else 0.0
    table.caption = f"importance kept at equal {how} latency: median gain at budgets <= {TIGHT} {middle:+.1%}"
    return table, all(row.gain >= -1e-9 for row in reached) and middle >= BETTER
