"""`attach(plan, model, optimizer)`: the WGSEF proximal step after every optimizer step, ending on the budget."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from planner import envelope
from planner.graph import Graph
from planner.metric import Metric, Problem, Weights
from planner.parallel import first_, replicas, unwrapped, whole
from planner.pools import Pools, flush_, pools
from planner.spec import Plan
from profiles.errors import PlanError

log = logging.getLogger(__name__)


@torch.no_grad()
def harden_(plan: Plan, model: nn.Module) -> int:
    """Make the planned groups exactly zero now; return how many groups that were not zero had to change.

    How many of which pool they are is logged.
    """
    model = whole(unwrapped(model))
    state, parameters = pools(plan, model, plan.graph(model)), dict(model.named_parameters())
    norms = state.groups.norms(parameters)
    return _keep_(state, model, norms, state.select(norms))


@dataclass(frozen=True)
class Schedule:
    """The prox step sizes λ_t = 2·total·t/(steps·(steps + 1)), t = 1..steps, whose sum is `total`; none exceeds 1/2.

    A redundant group is gone after Σλ of 3 to 4; λ is learning rate × strength, so the strength follows the optimizer's
    rate. Pools with budget 0 fade: their budget falls linearly from their full cost.
    """

    steps: int
    total: float = 6.0
    anneal: float = 0.0  # the share of the steps in which budgets fall from everything to the target

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise PlanError(f"steps is {self.steps}; it must be at least 1")
        if not self.total > 0:
            raise PlanError(f"total is {self.total}; it must be above 0: 6 by default, of which 3 to 4 do the work")
        if not 0 <= self.anneal <= 1:
            raise PlanError(f"anneal is {self.anneal}; it is a share of the steps, from 0 to 1")

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
    After Adam and AdamW it is the exact prox in the metric that gives each group the mean of √v̂ + ε over its weights
    (relative to its pool), an approximation of their own metric: b_j = λ a_j / h_j in the notation of planner.envelope.
    With `elementwise` it is the exact prox in their own metric √v̂ + ε, weight by weight, for several passes over the
    weights. In the de-biased form a metric below 2 λ a_j is raised to that, as the prox is single-valued above λ a_j
    only: exact where none was.

    Parameter groups with learning rates of their own make a metric too, 1 / rate relative to the mean over groups: λ_j
    is λ times the harmonic mean of the rates of the weights of group j; `elementwise` is again the exact prox. A group
    with weights that do not train, of rate 0, does not shrink. It may still be cut when the support is fixed: that is
    by x²/(a·d), whatever the metric.

    Replicas of a model in several processes keep the groups that the first one keeps.
    """

    def __init__(
        self,
        state: Pools,
        model: nn.Module,
        schedule: Schedule,
        *,
        debiased: bool,
        optimizer: Optimizer | None = None,
        elementwise: bool = False,
    ) -> None:
        """Prepare; `attach` is the usual way to make one."""
        self.taken = 0
        self.schedule = schedule
        self.changed_at_freeze = 0
        self.before_freeze: Callable[[], None] = lambda: None  # the last time to `adopt` other pools
        self._replicas = replicas(model)
        self._model = unwrapped(model)
        self._parameters = dict(self._model.named_parameters())
        self._debiased = debiased
        self._optimizer = optimizer
        self._elementwise = elementwise
        self._kept: Tensor | None = None
        self._skipped = torch.zeros((), dtype=torch.int64, device=state.d.device)
        self.adopt(state)

    def adopt(self, state: Pools) -> None:
        """Go on with other pools, weights, costs and budgets: the weights stay as they are, the schedule goes on."""
        self._state = state
        self._metric = None if self._optimizer is None else Metric(self._optimizer, state, self._parameters)
        self._full = state.costs(torch.ones_like(state.pool, dtype=torch.bool))
        self._a, self._d = _alike(state.a), _alike(state.d)
        self._pool = None if len(state.k) == 1 else state.pool
        self._layout = state.layout
        self._norms = torch.zeros(state.groups.count + 1, device=state.d.device)  # kept: a new one costs page faults

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
        norms = self._state.groups.norms(self._parameters, out=self._norms)
        if not norms.is_cpu:  # looking would stop the device: the factors are then ones
            self._skipped += ~norms.isfinite().all()
        k = self.schedule.budgets(self.taken, self._state.k, self._full)
        try:
            self._prox_(norms, self.schedule.step_size(self.taken), k)
        except ValueError as error:
            if norms.isfinite().all():
                raise
            raise self._diverged() from error

    def _prox_(self, norms: Tensor, size: float, k: Tensor) -> None:
        """Shrink the weights; `norms` are given up."""
        state, metric = self._state, self._metric
        if self._elementwise and metric is not None and (h := metric.of_weights()) is not None:
            r = torch.where(metric.trains(), size * state.a, 0.0)
            weights = Weights(state.groups, self._parameters, h, r, self._debiased)
            weights.scale_(self._agreed(Problem(r, state.a, self._d, k, self._pool).usage(weights.sums)))
            return
        sizes = size if metric is None else metric.sizes(size)
        factors = envelope.scale(
            norms, sizes, self._a, self._d, k, pool=self._layout, debiased=self._debiased, out=norms
        )
        state.groups.scale_(self._parameters, self._agreed(factors))

    def _agreed(self, per_group: Tensor) -> Tensor:
        """Return the first replica's: sums on an accelerator may differ in the last bit, those on a CPU do not."""
        return per_group if per_group.is_cpu else first_(per_group, self._replicas)

    def _freeze(self) -> None:
        if self.skipped:
            log.warning("%d proximal steps were left out: weights were not finite", self.skipped)
        if not self._state.groups.norms(self._parameters).isfinite().all():
            raise self._diverged()
        self.before_freeze()
        norms = self._state.groups.norms(self._parameters)
        self._kept = first_(self._state.select(norms).to(torch.uint8), self._replicas).bool()
        self.changed_at_freeze = _keep_(self._state, self._model, norms, self._kept)
        log.info("support fixed at step %d, %d groups set to zero", self.taken, self.changed_at_freeze)

    def _diverged(self) -> PlanError:
        return PlanError(f"training diverged: weights not finite at step {self.taken}; lower the learning rate")

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


def _keep_(state: Pools, model: nn.Module, norms: Tensor, kept: Tensor) -> int:
    """Zero all other groups, and what follows from them; return how many of them had `norms` above zero."""
    state.groups.scale_(dict(model.named_parameters()), kept.to(norms.dtype))
    _still_(state, model, kept)
    flush_(model)
    changed = (norms > 0) & ~kept
    counts = torch.bincount(state.share[state.pool[changed]], minlength=len(state.names)).tolist()
    for name, count in zip(state.names, counts, strict=True):
        if count:
            log.info("%s: %d groups set to zero", name, count)
    return int(changed.sum())


def _still_(state: Pools, model: nn.Module, kept: Tensor) -> None:
    """Zero the running statistics of normalisations in groups that left: they would fade into subnormal numbers."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parts = torch.split(kept.cpu(), [structure.count for structure in state.groups.structures])
    for structure, part in zip(state.groups.structures, parts, strict=True):
        padded = torch.cat([part, part.new_ones(1)])  # where the id is -1
        for tensor, ids in structure.maps(shapes):
            module = model.get_submodule(tensor.rpartition(".")[0])
            for statistics in (module.running_mean, module.running_var) if isinstance(module, _NormBase) else ():
                if statistics is not None and ids.shape == statistics.shape:
                    statistics.masked_fill_(~padded[ids].to(statistics.device), 0.0)


def attach(
    plan: Plan,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    steps: int | Schedule = 1000,
    graph: Graph | None = None,
    elementwise: bool = False,
) -> Proximal:
    """Make every step of `optimizer` end with the plan's proximal step; the support is fixed after `steps` of them.

    `steps` may be a Schedule, with another strength or with budgets that fall. `elementwise` takes Adam's metric weight
    by weight instead of by its mean over a group; `Proximal` says what is exact. `model` may be wrapped by
    DistributedDataParallel, whose processes must all attach, or by torch.compile. A sharded one cannot be traced: make
    its graph, `graph = plan.graph(model)`, before `fully_shard(model)`, the optimizer after it, and give both here. In
    the convex form, weight decay on penalised weights is taken out (they move to a parameter group of their own), and a
    warning says so. Raises PlanError if the plan is for another model or the optimizer lacks the plan's parameters.
    """
    schedule = steps if isinstance(steps, Schedule) else Schedule(steps)
    wrapped, model = model, unwrapped(model)
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
    about = {"debiased": plan.debiased, "elementwise": elementwise}
    proximal = Proximal(state, wrapped, schedule, optimizer=optimizer, **about)
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
