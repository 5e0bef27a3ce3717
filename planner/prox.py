"""`attach(plan, model, optimizer)`: the WGSEF proximal step after every optimizer step, ending on the budget."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from planner import envelope
from planner.graph import Graph
from planner.parallel import unwrapped, whole
from planner.pools import Pools, flush_, harden_pools_, pools
from planner.spec import Plan
from profiles.errors import PlanError

log = logging.getLogger(__name__)


@torch.no_grad()
def harden_(plan: Plan, model: nn.Module) -> int:
    """Make the planned groups exactly zero now; return how many groups that were not zero had to change."""
    model = whole(unwrapped(model))
    changed = harden_pools_(pools(plan, model, plan.graph(model)), dict(model.named_parameters()))[1]
    flush_(model)
    return changed


@dataclass(frozen=True)
class Schedule:
    """The prox step sizes λ_t = 2·total·t/(steps·(steps + 1)), t = 1..steps, whose sum is `total`; none exceeds 1/2.

    A redundant group is gone after Σλ of 3 to 4; λ is learning rate × strength, so the strength follows the optimizer's
    rate. Pools with budget 0 fade: their budget falls linearly from their full cost.
    """

    steps: int
    total: float = 6.0
    anneal: float = 0.0  # the share of the steps in which budgets fall from everything to the target

    def step_size(self, t: int) -> float:
        """Return λ_t, at most 1/2 so that the de-biased prox is single-valued for a < 2."""
        return min(2 * self.total * t / (self.steps * (self.steps + 1)), 0.5)

    def budgets(self, t: int, target: Tensor, full: Tensor) -> Tensor:
        """Return the budgets at step t, (p,)."""
        falling = target
        if t < self.anneal * self.steps:
            falling = torch.maximum(target, full + (target - full) * (t / (self.anneal * self.steps)))
        return torch.where(target > 0, falling, full * (1 - t / self.steps))


class Proximal:
    """The proximal step of a plan: shrinks groups for `schedule.steps` steps, then holds the support fixed.

    After SGD, with momentum or not, the step is the exact prox of λ·GS (or λ·D) at the weights that the optimizer left.
    After Adam and its kin it is the exact prox in the metric that gives each group the mean of √v̂ + ε over its weights
    (relative to its pool), an approximation of their element-wise metric: b_j = λ a_j / h_j in the notation of
    planner.envelope. The support is fixed by x²/(a·d).
    """

    def __init__(
        self, state: Pools, model: nn.Module, schedule: Schedule, *, debiased: bool, optimizer: Optimizer | None = None
    ) -> None:
        """Prepare; `attach` is the usual way to make one."""
        self.taken = 0
        self.schedule = schedule
        self.changed_at_freeze = 0
        self._state = state
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._debiased = debiased
        self._optimizer = optimizer
        self._full = state.costs(torch.ones_like(state.pool, dtype=torch.bool))
        self._a, self._d = _alike(state.a), _alike(state.d)
        self._pool = None if len(state.k) == 1 else state.pool
        self._norms = torch.zeros(state.groups.count + 1, device=state.d.device)  # kept: a new one costs page faults
        self._kept: Tensor | None = None
        self._skipped = torch.zeros((), dtype=torch.int64, device=state.d.device)

    @property
    def frozen(self) -> bool:
        """Whether the support is fixed."""
        return self._kept is not None

    @property
    def budget_groups(self) -> int:
        """The number of groups that may remain, for pools of unit costs."""
        return int(self._state.select(torch.ones_like(self._state.d)).sum())

    @property
    def skipped(self) -> int:
        """The number of steps left out because norms were not finite; on a CPU such a step raises instead."""
        return int(self._skipped)

    @torch.no_grad()
    def step(self) -> None:
        """Apply one proximal step; no host synchronisation until the support is fixed."""
        self.taken += 1
        if self._kept is None and self.taken <= self.schedule.steps:
            self._shrink()
        if self._kept is None and self.taken >= self.schedule.steps:
            self._freeze()
        elif self._kept is not None:
            self._state.groups.scale_(self._parameters, self._kept.to(self._state.d.dtype))

    def _shrink(self) -> None:
        state = self._state
        k = self.schedule.budgets(self.taken, state.k, self._full)
        norms = state.groups.norms(self._parameters, out=self._norms)
        if not norms.is_cpu:  # looking would stop the device: the factors are then ones
            self._skipped += ~norms.isfinite().all()
        size = self._size(self.schedule.step_size(self.taken))
        try:
            factors = envelope.scale(
                norms, size, self._a, self._d, k, pool=self._pool, debiased=self._debiased, out=norms
            )
        except ValueError as error:
            if norms.isfinite().all():
                raise
            told = f"training diverged: weights not finite at step {self.taken}; lower the learning rate"
            raise PlanError(told) from error
        state.groups.scale_(self._parameters, factors)

    def _size(self, size: float) -> Tensor | float:
        """Return the step size, per group where the optimizer has a diagonal metric."""
        own = {member.tensor: self._parameters[member.tensor] for member in self._state.groups.members}
        curvature = {} if self._optimizer is None else _curvature(self._optimizer, own)
        if any(member.tensor not in curvature for member in self._state.groups.members):
            return size
        groups, pool = self._state.groups, self._state.pool
        flat = (groups.sizes(self._parameters) / groups.sums(curvature).clamp_min(1e-30)).double()  # 1 / h_j
        total = torch.zeros_like(self._full).index_add_(0, pool, flat)
        count = torch.zeros_like(self._full).index_add_(0, pool, torch.ones_like(flat))
        return (size * flat * (count / total)[pool]).clamp_max(0.5)

    def _freeze(self) -> None:
        self._kept, self.changed_at_freeze = harden_pools_(self._state, self._parameters)
        flush_(self._model)
        if self.skipped:
            log.warning("%d proximal steps were left out: weights were not finite", self.skipped)
        log.info("support fixed at step %d, %d groups set to zero", self.taken, self.changed_at_freeze)

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


def _alike(values: Tensor) -> Tensor | float:
    """Return the number that all values are, or the values."""
    return float(values[0]) if len(values) and bool((values == values[0]).all()) else values


def _curvature(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return √v̂ + ε of each parameter that an optimizer like Adam keeps v for."""
    options = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for name, parameter in parameters.items():
        kept = optimizer.state.get(parameter, {})
        if "exp_avg_sq" in kept and id(parameter) in options:
            own = options[id(parameter)]
            correction = 1 - own["betas"][1] ** torch.as_tensor(kept["step"], device=parameter.device)
            found[name] = (kept["exp_avg_sq"] / correction).sqrt() + own["eps"]
    return found


def attach(
    plan: Plan,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    steps: int = 1000,
    total: float = 6.0,
    graph: Graph | None = None,
) -> Proximal:
    """Make every step of `optimizer` end with the plan's proximal step; the support is fixed after `steps` of them.

    `model` may be wrapped by DistributedDataParallel or torch.compile. A sharded one cannot be traced: make its graph,
    `graph = plan.graph(model)`, before `fully_shard(model)`, the optimizer after it, and give both here. In the convex
    form, weight decay on penalised weights is taken out (they move to a parameter group of their own), and a warning
    says so. Raises PlanError if the plan is for another model or the optimizer lacks the plan's parameters.
    """
    if steps < 1:
        raise PlanError(f"steps is {steps}; it must be at least 1")
    model = unwrapped(model)
    if graph is not None and graph.fingerprint != plan.fingerprint:
        raise PlanError(f"the graph is of another model: {graph.fingerprint}, not {plan.fingerprint}; use plan.graph()")
    state = pools(plan, model, graph or plan.graph(whole(model)))
    held = {id(parameter) for parameters in optimizer.param_groups for parameter in parameters["params"]}
    parameters = dict(model.named_parameters())
    missing = [member.tensor for member in state.groups.members if id(parameters[member.tensor]) not in held]
    if plan.debiased and (state.a >= 2).any():
        raise PlanError(f"a pool has weight {float(state.a.max()):g}; the de-biased form takes weights below 2")
    if missing:
        raise PlanError(f"the optimizer does not train {missing[0]}, which the plan cuts; give it model.parameters()")
    if not plan.debiased:
        _without_decay_(optimizer, [parameters[member.tensor] for member in state.groups.members])
    proximal = Proximal(state, model, Schedule(steps, total), debiased=plan.debiased, optimizer=optimizer)
    optimizer.register_step_post_hook(lambda *_: None if _skipped(optimizer) else proximal.step())
    return proximal


def _skipped(optimizer: Optimizer) -> bool:
    """Return whether a fused optimizer leaves out this step because GradScaler found gradients that are not finite.

    Others are then not called at all.
    """
    return bool(getattr(optimizer, "found_inf", False))


def _without_decay_(optimizer: Optimizer, penalised: Sequence[Tensor]) -> None:
    """Take weight decay off the penalised weights: the convex envelope shrinks survivors already."""
    chosen = {id(parameter) for parameter in penalised}
    moved = 0
    for own in list(optimizer.param_groups):
        inside = [p for p in own["params"] if id(p) in chosen]
        if own.get("weight_decay", 0) and inside:
            own["params"] = [p for p in own["params"] if id(p) not in chosen]
            rest = {key: value for key, value in own.items() if key != "params"}
            optimizer.add_param_group({**rest, "params": inside, "weight_decay": 0.0})
            moved += len(inside)
    if moved:
        log.warning(
            "weight decay taken off %d penalised tensors: the convex envelope shrinks them already; make learning rate "
            "schedulers after attach()",
            moved,
        )
