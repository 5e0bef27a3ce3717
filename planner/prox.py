"""`attach(plan, model, optimizer)`: the WGSEF proximal step after every optimizer step, ending on the budget."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from planner import envelope
from planner.graph import Graph
from planner.groups import Groups, group
from planner.spec import Plan
from planner.structures import Depth, Filter
from profiles.errors import PlanError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pools:
    """The groups of a plan with their WGSEF weights a, costs d, pool ids, (m,) each, and budgets k, (p,), in float64.

    In float32 a budget that is a sum of costs could round below the sum.
    """

    names: tuple[str, ...]
    groups: Groups
    a: Tensor
    d: Tensor
    pool: Tensor
    k: Tensor

    def costs(self, kept: Tensor) -> Tensor:
        """Return the cost of the groups `kept`, (m,) bool, in each pool, (p,) float64."""
        return torch.zeros_like(self.k).index_add_(0, self.pool, torch.where(kept, self.d, 0.0))

    def select(self, norms: Tensor) -> Tensor:
        """Return the groups to keep, (m,) bool: by x²/(a·d), as many as the budgets pay for.

        A group that no longer fits is passed over, and what is left of the budget goes to the next that fits.
        """
        gain = norms.double() ** 2 / (self.a * self.d)
        order = gain.argsort(descending=True, stable=True)
        order = order[self.pool[order].argsort(stable=True)]
        budget = self.k * (1 + 1e-9)
        kept = torch.zeros_like(norms, dtype=torch.bool)
        while True:
            left = budget - self.costs(kept)
            open_ = order[(~kept & (self.d <= left[self.pool]))[order]]
            if not len(open_):
                return kept
            costs = self.d[open_]
            spent = costs.cumsum(0)
            first = torch.ones_like(open_, dtype=torch.bool)
            first[1:] = self.pool[open_][1:] != self.pool[open_][:-1]
            before = torch.where(first, spent - costs, 0.0).cummax(0).values  # what earlier pools spent
            kept[open_[first | (spent - before <= left[self.pool[open_]])]] = True


def pools(plan: Plan, model: nn.Module, graph: Graph) -> Pools:
    """Return the pools of `plan` as tensors on the model's device."""
    structures = [
        Filter(graph.width[name]) if pool.structure == "filter" else Depth(graph.block[name])
        for pool in plan.pools
        for name in pool.members
    ]
    groups = group(structures, model)
    device = groups.structure.device

    def per_group(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[groups.structure]

    owners = [i for i, pool in enumerate(plan.pools) for _ in pool.members]
    owner = torch.tensor(owners, dtype=torch.int64, device=device)
    return Pools(
        tuple(pool.name for pool in plan.pools),
        groups,
        per_group([a for pool in plan.pools for a in pool.weights]),
        per_group([d for pool in plan.pools for d in pool.costs]),
        owner[groups.structure],
        torch.tensor([pool.budget for pool in plan.pools], dtype=torch.float64, device=device),
    )


def excess(plan: Plan, model: nn.Module, graph: Graph) -> list[tuple[str, float, float]]:
    """Return (pool, cost of its non-zero groups, budget) of every pool above its budget."""
    state = pools(plan, model, graph)
    costs = state.costs(state.groups.norms(dict(model.named_parameters())) > 0)
    rows = zip(state.names, costs.tolist(), state.k.tolist(), strict=True)
    return [(name, cost, budget) for name, cost, budget in rows if cost > budget * (1 + 1e-6)]


@torch.no_grad()
def harden_(plan: Plan, model: nn.Module) -> int:
    """Make the planned groups exactly zero now; return how many groups that were not zero had to change."""
    return _harden(pools(plan, model, plan.graph(model)), dict(model.named_parameters()))[1]


def _harden(state: Pools, parameters: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    norms = state.groups.norms(parameters)
    kept = state.select(norms)
    changed = int(((norms > 0) & ~kept).sum())
    state.groups.scale_(parameters, kept.to(norms.dtype))
    return kept, changed


@dataclass(frozen=True)
class Schedule:
    """The prox step sizes λ_t = 2·total·t/(steps·(steps + 1)), t = 1..steps, whose sum is `total`; none exceeds 1/2.

    A redundant group is gone after Σλ of 3 to 4; λ is learning rate × strength, so the strength follows the optimizer's
    rate. Pools with budget 0 fade: their budget falls linearly from their full cost.
    """

    steps: int
    total: float = 6.0

    def step_size(self, t: int) -> float:
        """Return λ_t, at most 1/2 so that the de-biased prox is single-valued for a < 2."""
        return min(2 * self.total * t / (self.steps * (self.steps + 1)), 0.5)

    def budgets(self, t: int, target: Tensor, full: Tensor) -> Tensor:
        """Return the budgets at step t, (p,)."""
        return torch.where(target > 0, target, full * (1 - t / self.steps))


class Proximal:
    """The proximal step of a plan: shrinks groups for `schedule.steps` steps, then holds the support fixed.

    Exact for SGD (momentum included: the step follows the weights' update); for Adam and its kin it is the prox in the
    Euclidean metric, an approximation of the prox in theirs.
    """

    def __init__(self, state: Pools, model: nn.Module, schedule: Schedule, *, debiased: bool) -> None:
        """Prepare; `attach` is the usual way to make one."""
        self.taken = 0
        self.schedule = schedule
        self.changed_at_freeze = 0
        self._state = state
        self._parameters = dict(model.named_parameters())
        self._debiased = debiased
        self._full = state.costs(torch.ones_like(state.pool, dtype=torch.bool))
        self._kept: Tensor | None = None

    @property
    def frozen(self) -> bool:
        """Whether the support is fixed."""
        return self._kept is not None

    @property
    def budget_groups(self) -> int:
        """The number of groups that may remain, for pools of unit costs."""
        return int(self._state.select(torch.ones_like(self._state.d)).sum())

    @torch.no_grad()
    def step(self) -> None:
        """Apply one proximal step; no host synchronisation until the support is fixed."""
        self.taken += 1
        state = self._state
        if self._kept is None and self.taken <= self.schedule.steps:
            k = self.schedule.budgets(self.taken, state.k, self._full)
            norms = state.groups.norms(self._parameters)
            if norms.is_cpu and not norms.isfinite().all():  # elsewhere, looking would stop the device
                raise PlanError(f"training diverged: weights not finite at step {self.taken}; lower the learning rate")
            size = self.schedule.step_size(self.taken)
            scale = envelope.scale(norms, size, state.a, state.d, k, pool=state.pool, debiased=self._debiased)
            state.groups.scale_(self._parameters, scale)
        if self._kept is None and self.taken >= self.schedule.steps:
            self._kept, self.changed_at_freeze = _harden(state, self._parameters)
            log.info("support fixed at step %d, %d groups set to zero", self.taken, self.changed_at_freeze)
        elif self._kept is not None:
            state.groups.scale_(self._parameters, self._kept.to(state.d.dtype))

    def nonzero(self) -> int:
        """Return the number of groups that are not zero."""
        return int((self._state.groups.norms(self._parameters) > 0).sum())

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""
        kept = torch.zeros(0, dtype=torch.bool) if self._kept is None else self._kept
        return {"taken": torch.tensor(self.taken), "kept": kept}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved state."""
        self.taken = int(state["taken"])
        self._kept = state["kept"].to(self._state.d.device) if len(state["kept"]) else None


def attach(plan: Plan, model: nn.Module, optimizer: Optimizer, *, steps: int = 1000, total: float = 6.0) -> Proximal:
    """Make every step of `optimizer` end with the plan's proximal step; the support is fixed after `steps` of them.

    Raises PlanError if the plan is for another model or the optimizer does not hold the plan's parameters.
    """
    if steps < 1:
        raise PlanError(f"steps is {steps}; it must be at least 1")
    state = pools(plan, model, plan.graph(model))
    held = {id(parameter) for parameters in optimizer.param_groups for parameter in parameters["params"]}
    parameters = dict(model.named_parameters())
    missing = [member.tensor for member in state.groups.members if id(parameters[member.tensor]) not in held]
    if plan.debiased and (state.a >= 2).any():
        raise PlanError(f"a pool has weight {float(state.a.max()):g}; the de-biased form takes weights below 2")
    if missing:
        raise PlanError(f"the optimizer does not train {missing[0]}, which the plan cuts; give it model.parameters()")
    proximal = Proximal(state, model, Schedule(steps, total), debiased=plan.debiased)
    optimizer.register_step_post_hook(lambda *_: proximal.step())
    return proximal
