"""The planner against what people prune with: the importance that is kept at an equal latency, predicted or measured.

All have the same latency table, or documented rules, and the same weights, and are judged alike: see tools/rivals.py.
At an equal *predicted* latency a rival is the best network on its path within the budget. At an equal *measured* one,
networks on its path on both sides of the budget, and plans for budgets as far from it, are built and timed in turns
with the dense one; what either keeps at the budget lies on the line between its two neighbours. How far that can be
off, as each was timed with some noise, is drawn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from planner.latency import Probe
from planner.operations import Choice
from profiles.errors import PlanError
from tools import rivals
from tools.calibrate import Bench, Progress, bench, measure_choices
from tools.examples import cifar10, imagenet
from tools.rivals import Judge

Make = Callable[[], nn.Module]
Points = Sequence[tuple[float, float]]  # (latency, importance that is kept)
NETWORKS: dict[str, tuple[Make, tuple[int, int, int]]] = {
    "ResNet-20": (cifar10.resnet20, (3, 32, 32)),
    "ResNet-56": (cifar10.resnet56, (3, 32, 32)),
    "ResNet-18": (imagenet.resnet18, (3, 224, 224)),
    "MobileNetV2": (imagenet.mobilenet_v2, (3, 224, 224)),
}
BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
MEASURED_BUDGETS = (0.35, 0.5)
# Predicted latencies of the networks that are timed, of the budget. Lines between points that are farther apart lie
# below what is kept there.
AROUND = (0.9, 0.95, 1.0, 1.06, 1.12)
DRAWS = 400  # of what the networks' latencies may be
TOGETHER = 12  # networks timed in turns
TIGHT, BETTER = 0.5, 0.1  # at budgets up to the one, more should be kept by the other in the median


@dataclass(frozen=True)
class Kept:
    """The importance that a rival and the planner keep at one budget; `latency` is where, if measured."""

    network: str
    profile: str
    budget: float
    rival: str
    ours: float
    theirs: float | None  # None: it cannot reach the budget
    removed: int = 0  # blocks that the planner removes
    latency: float | None = None
    noise: float = 0.0  # half the width of the 95 % interval of the gain, from that of the latencies

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
        plans = {b: [own for share in AROUND if (own := self.ours(b * share)) is not None] for b in found}
        around = {(b, name): self.around(path, b) for b in found for name, path in self.passed.items()}
        probes = self.timed([c for some in (*plans.values(), *around.values()) for c in some], progress=progress)
        for (budget, name), some in around.items():
            ours, theirs = ([self._point(own, probes) for own in each] for each in (plans[budget], some))
            at = budget if between(ours, budget) is not None else probes[_key(found[budget])].relative
            kept = replace(self.kept(budget, name, found[budget], between(theirs, at)), latency=at)
            kept = replace(kept, ours=between(ours, at) or kept.ours)
            random = np.random.default_rng(0)  # one after the other: what both are off by is not the same
            drawn = [self._drawn(each, probes, random) for each in (plans[budget], some)]
            yield replace(kept, noise=_noise(drawn[0], drawn[1], at))

    def _point(self, choice: Choice, probes: Mapping[object, Probe]) -> tuple[float, float]:
        return probes[_key(choice)].relative, self.judge.importance(choice)

    def _drawn(
        self, choices: Sequence[Choice], probes: Mapping[object, Probe], random: np.random.Generator
    ) -> list[list[tuple[float, float]]]:
        """Return what the latencies of networks may be, with what each keeps: DRAWS times."""
        noise = random.standard_normal((DRAWS, len(choices)))
        off = 1 + noise * [probes[_key(choice)].noise for choice in choices]
        points = [self._point(choice, probes) for choice in choices]
        return [[(x * by, y) for (x, y), by in zip(points, row, strict=True)] for row in off.tolist()]

    def around(self, path: Sequence[Choice], budget: float) -> list[Choice]:
        """Return networks on a path near a budget, at different distances from it."""
        latencies = np.array([self.judge.latency(choice) for choice in path])
        nearest = {int(np.abs(latencies - share * budget).argmin()) for share in AROUND}
        return [path[i] for i in sorted(nearest)]

    def timed(self, wanted: Sequence[Choice], *, progress: Progress) -> dict[object, Probe]:
        """Measure networks in turns with the dense one."""
        different = list({_key(choice): choice for choice in wanted}.values())
        place: Bench = bench(self.problem.model, self.problem.graph.example(), self.problem.profile)
        place, found = replace(place, graph=self.problem.graph), dict[object, Probe]()
        for first in range(0, len(different), TOGETHER):
            some = different[first : first + TOGETHER]
            probes = measure_choices(place, some, progress=progress, offset=(first, len(different)))
            found |= {_key(choice): probe for choice, probe in zip(some, probes, strict=True)}
        return found


def _key(choice: Choice) -> object:
    return tuple(sorted(choice.keep.items())), choice.removed


def between(points: Points, latency: float) -> float | None:
    """Return the importance that is kept at a latency, on the line between (latency, importance); None outside."""
    latencies, kept = np.array(sorted(points)).T
    if not latencies[0] <= latency <= latencies[-1]:
        return None
    return float(np.interp(latency, latencies, np.maximum.accumulate(kept)))


def _noise(ours: Sequence[Points], theirs: Sequence[Points], latency: float) -> float:
    """Return half the width of the 95 % interval of how much more is kept at a latency; 0 where either is unknown."""
    pairs = [(between(own, latency), between(other, latency)) for own, other in zip(ours, theirs, strict=True)]
    gains = [own / other - 1 for own, other in pairs if own and other]
    low, high = np.quantile(gains, (0.025, 0.975)) if gains else (0.0, 0.0)
    return float(high - low) / 2


def told(rows: Sequence[Kept], how: str) -> tuple[Table, bool]:
    """Return the table of all rows, and whether the planner is never worse, beyond the noise, and enough better."""
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
    return table, all(row.gain >= -row.noise - 1e-9 for row in reached) and middle >= BETTER
