"""Networks of one measured latency, each as another method leaves it: what the table of accuracies trains.

Ours is planned and measured as `espalier run` does it. Every other method is then tuned in its own knob, how much it
prunes, until its network takes the same measured time: the table says where to begin, measurements where to go on.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import planner
from backends import rebuild
from backends.weights import read
from planner import Graph, Importance, LatencyTable, Limits, Plan, Problem
from planner.operations import Choice
from planner.tournament import masked
from profiles import atomic
from profiles.errors import PlanError
from tools.calibrate import Bench, calibrate, measure_choices
from tools.console import Stage
from tools.contenders import narrowed
from tools.planning import Brief, Settling, contest, sensitivity
from tools.rivals import Ranking, kept_of, torch_pruned
from tools.threads import one_thread

NEAR = 0.03  # of our latency: where a rival's network counts as equally fast
TRIES = 5
STEPS = 96  # of torch-pruning's way from the dense network to nothing
RIVALS = {
    "GroupNorm": Ranking("norm", everywhere=True),
    "GroupNorm, round_to 8": Ranking("norm", everywhere=True, round_to=8),
    "GroupNorm, round_to 16": Ranking("norm", everywhere=True, round_to=16),
    "uniform": Ranking("norm", everywhere=False),
    "L1 filters, uniform": Ranking("L1", everywhere=False),
    "random, uniform": Ranking("random", everywhere=False),
}
SIBLING = "smaller sibling"


BY_MACS = "our program by MACs"
BY_WIDTH = "our program without depth"
ANY_WIDTH = "our program by MACs, any width"
ABLATIONS = (BY_MACS, BY_WIDTH, ANY_WIDTH)
SHARES = [i / 25 for i in range(2, 24)]  # that our program is asked for


@dataclass(frozen=True)
class Step:
    """One network on a method's way: its shape, and weights where the method says which channels stay."""

    choice: Choice
    weights: Callable[[], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class Net:
    """The network of one method, before any training."""

    method: str
    choice: Choice
    fraction: float  # of the dense latency, measured
    weights: Path | None

    @property
    def key(self) -> str:
        """Tells shapes apart."""
        return json.dumps([dict(self.choice.keep), sorted(self.choice.removed)])

    def save(self, path: Path) -> None:
        """Write it."""
        content: dict[str, Any] = {"method": self.method, "keep": dict(self.choice.keep)}
        content |= {"removed": sorted(self.choice.removed)}
        content |= {"fraction": self.fraction, "weights": self.weights and self.weights.name}
        atomic.write_text(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Net":
        """Read it."""
        said: dict[str, Any] = json.loads(path.read_text())
        weights = path.parent / said["weights"] if said["weights"] else None
        return cls(said["method"], Choice(said["keep"], frozenset(said["removed"])), said["fraction"], weights)

    def model(self, dense: nn.Module, posed: Problem) -> nn.Module:
        """Return it as a model, with its weights if it has some, else with the first channels of `dense`."""
        small = narrowed(dense, posed.graph, self.choice)
        if self.weights is not None:
            small.load_state_dict(read(self.weights))
        return small


@dataclass(frozen=True)
class Field:
    """All networks for one runtime and budget, kept in a folder."""

    brief: Brief  # with its budget
    bench: Bench
    stage: Stage
    folder: Path

    @cached_property
    def table(self) -> LatencyTable:
        """What was measured here."""
        with self.stage.phase(f"table of {self.bench.profile.id}") as phase, one_thread():
            return calibrate(self.bench, progress=phase.step)

    @cached_property
    def posed(self) -> Problem:
        """The problem, with that table."""
        return self.brief.problem(self.table)

    @cached_property
    def importance(self) -> Importance:
        """What single cuts cost in loss, with the price of depth that leaves the best network."""
        return contest(self.brief, self.posed, sensitivity(self.brief, self.posed, self.stage), self.stage)

    @cached_property
    def _without_depth(self) -> tuple[Problem, Importance]:
        """The problem in which all blocks stay, and the importance that leaves the best network there."""
        brief = replace(self.brief, scope=replace(self.brief.scope, removes_blocks=False))
        posed = brief.problem([costs for costs in self.posed.costs.values() if isinstance(costs, LatencyTable)])
        return posed, contest(brief, posed, sensitivity(brief, posed, self.stage), self.stage)

    def ours(self) -> tuple[Plan, Net]:
        """Return our plan with its network, made and measured now or kept."""
        plan, net = self.folder / "plan.json", self.folder / "ours.json"
        if not net.exists():
            settling = Settling(self.brief, self.bench, self.table, self.stage, self.folder)
            made = settling.plan(self.importance)
            made.save(plan)
            whole = self.posed.graph.choice(made.choice.keep, made.choice.removed)
            Net("ours", whole, settling.tries[-1].measured, None).save(net)
        return Plan.load(plan), Net.load(net)

    def rivals(self) -> list[Net]:
        """Return the network of every other method, as fast as ours, made now or kept."""
        _, ours = self.ours()
        names = [*RIVALS, SIBLING, *ABLATIONS]
        missing = [name for name in names if not self._path(name).exists()]
        ways = {name: self._way(name) for name in missing}
        for name, (step, fraction) in self._tuned(ways, ours.fraction).items():
            weights = None
            if step.weights is not None:
                weights = self._path(name).with_suffix(".safetensors")
                with atomic.replacing(weights) as temporary:
                    save_file(dict(step.weights()), temporary)
            Net(name, step.choice, fraction, weights).save(self._path(name))
        return [Net.load(self._path(name)) for name in names]

    def _path(self, name: str) -> Path:
        return self.folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"

    def _way(self, name: str) -> list[Step]:
        """Return the networks that a method passes."""
        graph, model = self.posed.graph, self.brief.model
        if name == SIBLING:
            return [Step(choice) for choice in shallower(self.posed)]
        if name in ABLATIONS:
            return list(self._planned(name))
        found = []
        with self.stage.phase(name) as phase:
            for pruned in torch_pruned(model, graph, RIVALS[name], steps=STEPS):
                state = {key: tensor.detach().clone().contiguous() for key, tensor in pruned.state_dict().items()}
                found.append(Step(graph.choice(kept_of(graph, pruned)), partial(dict, state)))
                phase.step(name, len(found), STEPS)
        return found

    def _planned(self, name: str) -> Iterator[Step]:
        """Yield what our program makes of MACs for latency, without removing blocks, or without the device's steps."""
        posed, importance = self.posed, self.importance
        if name == ANY_WIDTH:
            bare = self.brief.profile.model_copy(update={"granularity": ()})
            posed = replace(self.brief, profile=bare).problem(None)
            options = posed.options(thrifty=True)  # too many to cut each and measure the loss
            importance = planner.taylor(self.brief.model, posed.graph, options, self.brief.batches, loss=cross_entropy)
        if name == BY_WIDTH:
            posed, importance = self._without_depth
        for share in SHARES:
            by_macs = (None, Limits(macs=share))
            try:
                plan = posed.solve(*((share, None) if name == BY_WIDTH else by_macs), importance=importance)
            except PlanError:
                continue  # below the floor
            choice = posed.graph.choice(plan.choice.keep, plan.choice.removed)
            yield Step(choice, partial(cut_once, self.brief.model, posed.graph, plan, importance))

    def _tuned(self, ways: Mapping[str, Sequence[Step]], wanted: float) -> dict[str, tuple[Step, float]]:
        """Return of every way the network whose measured fraction of the dense latency is nearest to `wanted`.

        One round measures a network of each; where the table is off, the next aims beside it.
        """
        time = self.posed.times[self.posed.profile.id]
        dense = time.under(self.posed.graph.dense)
        predicted = {name: [time.under(step.choice) / dense for step in way] for name, way in ways.items()}
        seen: dict[str, dict[int, float]] = {name: {} for name in ways}
        for _ in range(TRIES):
            asked = {name: aim(predicted[name], own, wanted) for name, own in seen.items() if not near(own, wanted)}
            asked = {name: index for name, index in asked.items() if index not in seen[name]}
            if not asked:
                break
            with self.stage.phase("measure rivals") as phase, one_thread():
                choices = [ways[name][index].choice for name, index in asked.items()]
                probes = measure_choices(self.bench, choices, progress=phase.step)
            for (name, index), probe in zip(asked.items(), probes, strict=True):
                seen[name][index] = probe.relative
        best = {name: min(own, key=lambda i: abs(own[i] - wanted)) for name, own in seen.items()}
        return {name: (ways[name][index], seen[name][index]) for name, index in best.items()}


def cut_once(model: nn.Module, graph: Graph, plan: Plan, importance: Importance) -> Mapping[str, Tensor]:
    """Return the weights of a network that is cut to a plan."""
    small = rebuild(plan, masked(model, graph, plan, importance))
    return {name: tensor.detach().clone().contiguous() for name, tensor in small.state_dict().items()}


def near(seen: Mapping[int, float], wanted: float) -> bool:
    """Return whether one of the measured networks is as fast as wanted."""
    return any(abs(found / wanted - 1) <= NEAR for found in seen.values())


def aim(predicted: Sequence[float], seen: Mapping[int, float], wanted: float) -> int:
    """Return which network to measure next: predictions are corrected by the ratio found at the nearest one seen."""

    def expected(index: int) -> float:
        nearest = min(seen, key=lambda other: abs(other - index), default=None)
        return predicted[index] * (1.0 if nearest is None else seen[nearest] / predicted[nearest])

    return min(range(len(predicted)), key=lambda index: abs((seen.get(index) or expected(index)) - wanted))


def shallower(posed: Problem) -> list[Choice]:
    """Return the networks of the family with fewer blocks: of every stage the same number of its last ones leave."""
    stages = {stage: [block.name for block in own] for stage, own in posed.graph.stages.items()}
    fewest = min(len(blocks) for blocks in stages.values())
    gone = [frozenset(name for own in stages.values() for name in own[len(own) - n :]) for n in range(fewest)]
    return [posed.graph.choice({}, removed) for removed in gone]
