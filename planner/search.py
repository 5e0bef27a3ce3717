"""`plan()`: the widths and blocks that meet a latency budget at the least loss, with proof of optimality."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from planner.blocks import Block
from planner.graph import Graph, trace
from planner.groups import group
from planner.importance import Importance, magnitude
from planner.latency import Costs, LatencyTable, Rules, forecast
from planner.operations import Choice
from planner.program import Program
from planner.scope import Scope
from planner.spec import BlockPlan, InputSpec, Plan, Pool, Proof, WidthPlan
from planner.structures import Depth, Filter, of_width
from planner.widths import Width
from profiles import Profile
from profiles.errors import PlanError

_MOST = 12  # candidates per width
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "%": 1e-2, "": 1.0}


def plan(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    profile: Profile,
    *,
    latency: float | str,
    table: LatencyTable | None = None,
    importance: Importance | None = None,
    scope: Scope | None = None,
) -> Plan:
    """Return the plan for `model` that loses least within `latency`: a fraction of the dense one, "50 %" or "3 ms".

    Costs come from `table`, measured on the device, or else from the profile's documented rules, which know ratios
    only. Importance is that of the weights' magnitude unless given (see planner.measured). `scope` says which layers
    may be cut; structures that the profile says do not pay are not, and the plan notes it. Raises PlanError if the
    budget is below what the model can reach.
    """
    scope = scope or Scope()
    traced = trace(model, inputs, lossy=scope.lossy)
    if not traced.operations:
        raise PlanError("the model has no convolution or linear layer, so there is nothing to plan")
    graph, notes = paying(scope.applied(traced, model), profile, scope)
    costs = _costs(graph, profile, table)
    options = useful(graph, costs, candidates(graph, profile, scope))
    importance = importance or magnitude(model, graph, options)
    _check_covers(importance, graph, options)
    dense_s = costs.latency(graph, graph.dense)
    budget_s = budget(latency, dense_s, measured=table is not None)
    choice, proof = _solve(Program(graph, options, costs), importance, budget_s, dense_s)
    made = _Problem(graph, profile, costs, options, importance).written(choice, proof, budget_s / dense_s)
    return made.model_copy(update={"lossy": scope.lossy, "forced": scope.force, "notes": notes})


def paying(graph: Graph, profile: Profile, scope: Scope) -> tuple[Graph, tuple[str, ...]]:
    """Return the graph without the structures that do not pay on the device, unless forced, and what was left out.

    Raises PlanError if nothing is left of what could be cut.
    """
    parts: list[Width | Block] = [*graph.cuttable, *(block for block in graph.blocks if not block.frozen)]
    refused: dict[str, str] = {}
    for part in parts:
        kind = of_width(part).profile_kind if isinstance(part, Width) else Depth.profile_kind
        known = profile.pays(kind)
        if known is not None and known.pays == "no" and not scope.force:
            refused[part.name] = f"cutting {kind} does not pay on {profile.id}"
    if parts and len(refused) == len(parts):
        raise PlanError(
            f"{next(iter(refused.values()))}, and nothing else can be cut; Scope(force=True) plans it anyway"
        )
    widths = tuple(replace(w, frozen=w.frozen or refused.get(w.name)) for w in graph.widths)
    blocks = tuple(replace(b, frozen=b.frozen or refused.get(b.name)) for b in graph.blocks)
    return replace(graph, widths=widths, blocks=blocks), tuple(dict.fromkeys(refused.values()))


def _costs(graph: Graph, profile: Profile, table: LatencyTable | None) -> Costs:
    if table is None:
        return Rules(profile)
    if table.fingerprint != graph.fingerprint:
        raise PlanError(
            f"the latency table was made for another model or input shape (fingerprint {table.fingerprint}, this one "
            f"is {graph.fingerprint}); run `espalier calibrate` for this one"
        )
    if table.profile != profile.id:
        raise PlanError(
            f"the latency table was measured for profile {table.profile}, not {profile.id}; plan with that profile, or "
            "run `espalier calibrate` with this one"
        )
    return table


def _check_covers(importance: Importance, graph: Graph, options: Mapping[str, Sequence[int]]) -> None:
    missing = [f"{n} at {c}" for n, counts in options.items() for c in counts if c not in importance.widths.get(n, {})]
    missing += [block.name for block in graph.blocks if not block.frozen and block.name not in importance.blocks]
    if missing:
        raise PlanError(
            f"importance {importance.name!r} does not say what cutting {missing[0]} costs; measure it for the "
            "candidates of this profile and table"
        )


def budget(latency: float | str, dense_s: float, *, measured: bool) -> float:
    """Return the budget in the unit of `dense_s`; raises PlanError if `latency` cannot be read."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(s|ms|us|µs|%|)\s*", str(latency))
    try:
        value, unit = (float(match[1]), match[2]) if match else (math.nan, "")
    except ValueError:
        value, unit = math.nan, ""
    if not 0 < value < math.inf or (unit in ("", "%") and value * _UNITS[unit] > 1):
        raise PlanError(f"latency {latency!r} is not a fraction of the dense latency (0.5, '50 %') or a time ('3 ms')")
    if unit in ("", "%"):
        return value * _UNITS[unit] * dense_s
    if not measured:
        raise PlanError(
            f"latency {latency!r} needs a table measured on the device; run `espalier calibrate` or give a fraction"
        )
    return value * _UNITS[unit]


def candidates(graph: Graph, profile: Profile, scope: Scope | None = None) -> dict[str, tuple[int, ...]]:
    """Return for each width inside blocks or between layers what the profile holds useful, the dense one last.

    That is the multiples of the profile's quantum, and one half of it, which padding may still reward. The stream of a
    residual network (a width tied over several layers) stays whole.
    """
    found = {}
    for width in graph.cuttable:
        if not width.is_stream:
            least = min(width.size, scope.at_least(width) if scope else 1)
            counts = _multiples(width.size, _quantum(graph, profile, width))
            found[width.name] = tuple(count for count in counts if count >= least)
    return found


def _quantum(graph: Graph, profile: Profile, width: Width) -> int:
    """Return the least common multiple of the quanta of all operations that make or read a width, per channel of it."""
    quanta = [1]
    for operation in graph.operations:
        for axis, extent in (("out_channels", operation.outputs), ("in_channels", operation.inputs)):
            for name, times in extent.parts:
                if name == width.name:
                    q = profile.quantum(operation.kind, axis)
                    quanta.append(q // math.gcd(q, times))
    return math.lcm(*quanta)


def _multiples(size: int, quantum: int) -> tuple[int, ...]:
    step = quantum * max(1, math.ceil(size / quantum / _MOST))
    found = {size, *range(step, size, step)}
    if quantum > 1 and quantum // 2 < size:
        found.add(quantum // 2)
    return tuple(sorted(found))


def useful(graph: Graph, costs: Costs, options: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Drop candidates that cost as much as a wider one: the rest are the tops of this device's steps."""
    kept = {}
    for name, counts in options.items():
        best, tops = math.inf, []
        for count in sorted(counts, reverse=True):
            cost = costs.latency(graph, graph.choice({name: count}))
            if cost < best:
                tops.append(count)
                best = cost
        kept[name] = tuple(reversed(tops))
    return kept


def _solve(program: Program, importance: Importance, budget_s: float, dense_s: float) -> tuple[Choice, Proof]:
    program.add_choices()
    program.add_costs()
    found = program.solve(program.losses(importance), budget=budget_s)
    if found is None:
        lowest = program.solve(program.cost, budget=None)
        assert lowest is not None  # without a budget everything fits
        floor_s = lowest[1].objective + program.constant_s
        shown, floor = (
            f"{value / dense_s:.3g} of dense" + ("" if isinstance(program.costs, Rules) else f" ({value * 1e3:.3g} ms)")
            for value in (budget_s, floor_s)
        )
        raise PlanError(f"latency budget {shown} is below the floor {floor} that this model can reach; raise --latency")
    return found


@dataclass(frozen=True)
class _Problem:
    graph: Graph
    profile: Profile
    costs: Costs
    options: Mapping[str, Sequence[int]]
    importance: Importance

    def written(self, choice: Choice, proof: Proof, fraction: float) -> Plan:
        """Return the solution as the plan that is kept."""
        widths = tuple(
            WidthPlan(
                name=name,
                dense=self.graph.width[name].size,
                keep=choice.keep[name],
                considered=tuple(counts),
                structure=self.graph.width[name].structure,
                lossless=self.graph.width[name].lossy is None,
                cost_s=_marginal(self.graph, self.costs, name, choice.keep[name]),
            )
            for name, counts in self.options.items()
        )
        blocks = tuple(
            BlockPlan(name=b.name, removed=b.name in choice.removed) for b in self.graph.blocks if not b.frozen
        )
        return Plan(
            profile=self.profile.id,
            fingerprint=self.graph.fingerprint,
            inputs=tuple(InputSpec(shape=shape, dtype=dtype) for shape, dtype in self.graph.inputs),
            target_fraction=fraction,
            widths=widths,
            blocks=blocks,
            pools=per_width_pools(widths, blocks),
            importance=self.importance.name,
            predicted=forecast(self.costs, self.graph, choice),
            proof=proof,
        )


def _marginal(graph: Graph, costs: Costs, name: str, keep: int) -> float:
    """Return what one removed channel of a width saves on average, 0 if none is removed."""
    dense = graph.width[name].size
    base = costs.latency(graph, graph.dense)
    if not keep or keep == dense:
        return 0.0
    return max(0.0, base - costs.latency(graph, graph.choice({name: keep}))) / (dense - keep)


def per_width_pools(widths: Sequence[WidthPlan], blocks: Sequence[BlockPlan]) -> tuple[Pool, ...]:
    """Return one pool per narrowed width (budget: channels kept) and one per removed block (budget: 0)."""
    narrowed = [
        Pool(name=w.name, structure=w.structure, members=(w.name,), weights=(1.0,), costs=(1.0,), budget=w.keep)
        for w in widths
        if 0 < w.keep < w.dense
    ]
    leaving = [
        Pool(name=b.name, structure="depth", members=(b.name,), weights=(1.0,), costs=(1.0,), budget=0.0)
        for b in blocks
        if b.removed
    ]
    return (*narrowed, *leaving)


def with_global_budget(plan: Plan, model: nn.Module) -> Plan:
    """Return the plan with one pool over all narrowed widths instead of one each: costs in seconds, one budget.

    How many channels each width keeps is then decided in training. a_j is the mean squared norm of a width's channels,
    so that x_j²/(a_j d_j) compares channels of different layers; the largest is 1. Widths that cost no time keep
    their own pools.
    """
    graph = plan.graph(model)
    narrowed = [w for w in plan.widths if 0 < w.keep < w.dense and w.cost_s > 0]
    if not narrowed:
        raise PlanError("the plan narrows no width that costs time, so there is nothing to share a budget")
    norms = group([Filter(graph.width[w.name]) for w in narrowed], model).norms(dict(model.named_parameters()))
    power = [float(part.square().mean()) for part in torch.split(norms, [w.dense for w in narrowed])]
    pool = Pool(
        name="global",
        structure="filter",
        members=tuple(w.name for w in narrowed),
        weights=tuple(max(value / max(power), 1e-6) for value in power),
        costs=tuple(w.cost_s for w in narrowed),
        budget=sum(w.keep * w.cost_s for w in narrowed),
    )
    others = tuple(own for own in plan.pools if own.structure == "depth" or own.name not in pool.members)
    return plan.model_copy(update={"pools": (pool, *others)})
