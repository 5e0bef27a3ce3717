"""One budget in seconds over all widths: WGSEF decides who survives, and the program is solved again with what is left.

The pool's costs are what a channel costs at the plan's widths; where other channels fade than planned, those costs, and
the widths between two steps of the device, are no longer right. So every few epochs the program is solved with the
current importances, which gives useful widths within the exact budget, and the pool is priced anew; once the program
has said the same twice, each width has its count, and training ends as with any plan.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.optim import Optimizer

from planner.document import powers, shares, with_global_budget
from planner.graph import Graph
from planner.groups import Groups, group
from planner.importance import Importance
from planner.limits import Latency, Limits
from planner.parallel import first_, replicas, unwrapped
from planner.pools import pools
from planner.prox import Proximal, Schedule, attach
from planner.search import Problem
from planner.spec import Plan
from planner.structures import Filter
from profiles.errors import PlanError

log = logging.getLogger(__name__)
AGREED = 2  # solutions in a row that change nothing
Solve = Callable[[Importance], Plan]


@dataclass(frozen=True)
class Round:
    """One solution on the way: after how many steps, and how many channels it keeps elsewhere than the one before.

    `apart` is how many the global budget would keep elsewhere than the solution, at the norms of that moment.
    """

    step: int
    moved: int
    apart: int


@dataclass
class Agreement:
    """A plan whose widths share one budget in training, and are decided again every few epochs until that settles.

    `plan` is what is trained to now: with one pool in seconds, and once `settled` with a count for each width. Blocks
    leave or stay, and layers are trimmed, as the first plan says. The program takes what WGSEF goes by, the squared
    norms of channels relative to their mean in the model that training began with, or `importance` of the model as it
    is.

        agreement = Agreement.of(planner.problem(model, inputs, profile, table=table), 0.5)
        agreement.attach(model, optimizer, steps=steps)
        for _ in range(epochs):
            ...  # your own loop
            agreement.after_epoch()
        small = backends.rebuild(agreement.plan, model)
    """

    graph: Graph
    plan: Plan
    solve: Solve
    every: int = 2  # epochs
    importance: Callable[[nn.Module], Importance] | None = None
    rounds: list[Round] = field(default_factory=list)
    settled: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise PlanError(f"every is {self.every}; it must be at least 1 epoch")
        self.first = self._solved = self.plan
        self._epochs = 0

    @classmethod
    def of(
        cls,
        posed: Problem,
        latency: Latency,
        limits: Limits | None = None,
        *,
        importance: Importance | None = None,
        every: int = 2,
    ) -> "Agreement":
        """Return the one that begins with the plan of a problem, made by `importance`, and solves that one again."""
        first = posed.solve(latency, limits, importance=importance)
        return cls(posed.graph, first, lambda now: posed.solve(latency, limits, importance=now), every)

    def attach(self, model: nn.Module, optimizer: Optimizer, *, steps: int | Schedule = 1000) -> Proximal:
        """Make every step of `optimizer` end with the proximal step, as planner.attach does."""
        self._model, self._replicas = unwrapped(model), replicas(model)
        self._groups: Groups = group([Filter(width) for width in self.graph.cuttable], self._model)
        self._power = powers(self.graph, self._model)
        self.plan = with_global_budget(self.plan, self._model, power=self._power)
        self._proximal = attach(self.plan, model, optimizer, steps=steps, graph=self.graph)
        self._proximal.before_freeze = self._before_freeze
        return self._proximal

    def after_epoch(self) -> None:
        """Call between epochs: every few of them the program is solved again; no step waits for it."""
        self._epochs += 1
        if not self.settled and not self._proximal.frozen and self._epochs % self.every == 0:
            self._again()

    def _before_freeze(self) -> None:
        """Fix the counts at the last moment: what is rebuilt has the widths of a plan in any case."""
        if not self.settled:
            self._again(last=True)

    def _again(self, *, last: bool = False) -> None:
        solved = self._restored(self.solve(self._current()))
        moved = _differing(self._solved.choice.keep, solved.choice.keep)
        self.rounds.append(Round(self._proximal.taken, moved, _differing(self._survivors(), solved.choice.keep)))
        self._solved, recent = solved, self.rounds[-AGREED:]
        agreed = len(recent) == AGREED and not any(each.moved for each in recent)
        how = "agreed" if agreed else "did not agree by the end of shrinking, so the last solution stands"
        told = f"one budget for all widths, solved again {len(self.rounds)} times: {how}"
        self.settled = agreed or last or not shares(solved)
        self.plan = solved.model_copy(update={"notes": (*solved.notes, told)})
        if not self.settled:
            self.plan = with_global_budget(solved, self._model, power=self._power)
        self._proximal.adopt(pools(self.plan, self._model, self.graph))
        log.info("step %d: %d channels moved%s", self._proximal.taken, moved, f"; {told}" if self.settled else "")

    def _current(self) -> Importance:
        """Return the importance of the weights as they are; blocks and trims stay as they were decided."""
        found = self.importance(self._model) if self.importance else self._norms()
        widths = {name: losses for name, losses in found.widths.items() if name in self.graph.width}
        self._price = price = 1 + sum(max(losses.values(), default=0.0) for losses in widths.values())
        kept, gone = self._solved.choice.keep, self._solved.choice.removed
        for trim in self.graph.trims:
            now = kept.get(trim.name, trim.size)
            widths[trim.name] = {count: 0.0 if count == now else price for count in trim.counts}
        free = [block.name for block in self.graph.blocks if not block.frozen]
        blocks = {name: -price if name in gone else price for name in free}
        return replace(found, widths=widths, blocks=blocks, stages={})

    def _restored(self, solved: Plan) -> Plan:
        """Return a plan whose objective is the loss alone, without what holds the blocks to their places."""
        gone, leaving = self._solved.choice.removed, solved.choice.removed
        held = self._price * (len(leaving - gone) - len(leaving & gone))
        proof = solved.proof
        proof = proof.model_copy(update={"objective": proof.objective - held, "bound": proof.bound - held})
        return solved.model_copy(update={"proof": proof})

    def _norms(self) -> Importance:
        norms = first_(self._groups.norms(dict(self._model.named_parameters())), self._replicas).double().cpu()
        if not norms.isfinite().all():
            raise PlanError(
                f"training diverged: weights not finite at step {self._proximal.taken}; lower the learning rate"
            )
        widths = self.graph.cuttable
        squares = [
            part.square() / max(self._power[w.name], 1e-30)
            for w, part in zip(widths, torch.split(norms, [w.size for w in widths]), strict=True)
        ]
        total = max(float(sum(own.sum() for own in squares)), 1e-30)
        losses = {w.name: _lost(own / total) for w, own in zip(widths, squares, strict=True)}
        return Importance("norms in training", losses, {}, {})

    def _survivors(self) -> dict[str, int]:
        """Return how many channels of each width the global budget pays for now."""
        state = pools(self.plan, self._model, self.graph)
        kept = state.select(first_(state.groups.norms(dict(self._model.named_parameters())), self._replicas))
        parts = torch.split(kept.cpu(), [structure.count for structure in state.groups.structures])
        found = zip(state.groups.structures, parts, strict=True)
        return {own.name: int(part.sum()) for own, part in found if isinstance(own, Filter)}

    def state(self) -> str:
        """Return what a resumed training needs, as JSON; weights and optimizer are kept elsewhere."""
        plans = {name: own.model_dump(mode="json") for name, own in (("plan", self.plan), ("solved", self._solved))}
        rounds = [[each.step, each.moved, each.apart] for each in self.rounds]
        return json.dumps({**plans, "rounds": rounds, "settled": self.settled, "epochs": self._epochs})

    def restore(self, state: str) -> None:
        """Go on from what `state` returned; call it after `attach` to the model that training began with."""
        content = json.loads(state)
        self.plan, self._solved = (Plan.model_validate(content[name]) for name in ("plan", "solved"))
        self.rounds = [Round(*each) for each in content["rounds"]]
        self.settled, self._epochs = content["settled"], content["epochs"]
        self._proximal.adopt(pools(self.plan, self._model, self.graph))


def _lost(shares: torch.Tensor) -> dict[int, float]:
    """Return what is lost with the weakest of the channels, by the number of those that stay."""
    weakest = torch.cat([shares.new_zeros(1), shares.sort().values.cumsum(0)])
    return dict(enumerate(weakest.flip(0).tolist()))


def _differing(one: Mapping[str, int], other: Mapping[str, int]) -> int:
    """Return by how many channels counts differ, over the widths that both name."""
    return sum(abs(count - other[name]) for name, count in one.items() if name in other)
