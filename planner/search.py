"""`plan()`: the widths and blocks that meet a budget at the least loss, with proof of optimality."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from planner import resources
from planner.candidates import candidates, paying, quantum, useful
from planner.document import Document
from planner.graph import Graph, trace
from planner.importance import Importance, magnitude
from planner.latency import Costs, LatencyTable, Rules
from planner.limits import ON_CHIP, Amount, Latency, Limits, amount
from planner.offers import trimmable
from planner.operations import Choice
from planner.pools import pays
from planner.program import Budget, Program
from planner.resources import Resource
from planner.scope import Scope
from planner.solver import Terms
from planner.spec import LimitPlan, Plan, Proof
from profiles import Profile
from profiles import load as profile_of
from profiles.errors import PlanError

_TRIES = 4  # to hold a plan to its exact cost where the program takes costs as straight
_WORTH = 0.05  # a smaller gain of latency is not worth a training
Tables = LatencyTable | Sequence[LatencyTable] | None


def plan(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    profile: Profile,
    *,
    latency: Latency | None = None,
    limits: Limits | None = None,
    table: Tables = None,
    importance: Importance | None = None,
    scope: Scope | None = None,
) -> Plan:
    """Return the plan for `model` that loses least within `latency` and `limits`.

    `latency` is a fraction of the dense one, "50 %" or "3 ms"; for several devices at once, a mapping from the ids of
    their profiles. Costs come from `table`, measured on the device (several tables for several), or else from the
    profile's documented rules, which know ratios only. Importance is that of the weights' magnitude unless given (see
    planner.measured). `scope` says which layers may be cut; structures that the profile says do not pay are not, and
    the plan notes it. Raises PlanError if a budget is below what the model can reach.
    """
    posed = problem(model, inputs, profile, devices=devices_of(latency, profile), table=table, scope=scope)
    return posed.solve(latency, limits, importance=importance)


def devices_of(latency: Latency | None, profile: Profile) -> tuple[Profile, ...]:
    """Return the profile that is planned for, and others whose latency is limited too."""
    ids = list(latency) if isinstance(latency, Mapping) else []
    return (profile, *(profile_of(name) for name in ids if name != profile.id))


def problem(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    profile: Profile,
    *,
    devices: Sequence[Profile] = (),
    table: Tables = None,
    scope: Scope | None = None,
) -> "Problem":
    """Return what there is to plan: traced once, to be solved for any number of budgets and importances."""
    scope = scope or Scope()
    traced = trace(model, inputs, lossy=scope.lossy)
    if not traced.operations:
        raise PlanError("the model has no convolution or linear layer, so there is nothing to plan")
    graph, notes = paying(trimmable(scope.applied(traced, model), model, profile, scope), profile, scope)
    tables = (table,) if isinstance(table, LatencyTable) else tuple(table or ())
    costs = costs_of(graph, devices or (profile,), tables)
    return Problem(model, graph, profile, scope, costs, notes)


def costs_of(graph: Graph, devices: Sequence[Profile], tables: Sequence[LatencyTable]) -> dict[str, Costs]:
    """Return the costs on every device: from its table, or else from its rules.

    Raises PlanError if a table does not belong to the model or to any of the devices.
    """
    ids = [device.id for device in devices]
    for table in tables:
        if table.fingerprint != graph.fingerprint:
            raise PlanError(
                "the latency table was made for another model or input shape (fingerprint "
                f"{table.fingerprint}, this one is {graph.fingerprint}); run `espalier calibrate` for this one"
            )
        if table.profile not in ids:
            raise PlanError(
                f"the latency table was measured for profile {table.profile}, not {' or '.join(ids)}; plan with that "
                "profile, or run `espalier calibrate` with this one"
            )
    measured = {table.profile: table for table in tables}
    return {device.id: measured.get(device.id) or Rules(device) for device in devices}


@dataclass(frozen=True)
class Problem:
    """A model, what may be cut of it, and what that costs."""

    model: nn.Module
    graph: Graph
    profile: Profile
    scope: Scope
    costs: Mapping[str, Costs]  # by the ids of profiles
    notes: tuple[str, ...] = ()
    _solved: dict[object, "Solver"] = field(default_factory=dict)

    @cached_property
    def times(self) -> dict[str, Resource]:
        """The latency on every device."""
        return {own: resources.time(self.graph, costs, own) for own, costs in self.costs.items()}

    @cached_property
    def devices(self) -> dict[str, Profile]:
        """The profiles of the devices."""
        return {own: self.profile if own == self.profile.id else profile_of(own) for own in self.costs}

    def with_tables(self, tables: Sequence[LatencyTable]) -> "Problem":
        """Return the same problem with other costs."""
        costs = costs_of(self.graph, list(self.devices.values()), tables)
        return Problem(self.model, self.graph, self.profile, self.scope, costs, self.notes)

    def resource(self, name: str) -> Resource:
        """Return a resource that `Limits` names."""
        graph = self.graph
        if name == "model_bytes":
            return resources.model_bytes(graph, self.model, self.profile)
        if name == "parameters":
            return resources.parameters(graph, self.model)
        return resources.operations(graph) if name == "macs" else resources.activation_bytes(graph, self.profile)

    def options(self, *, thrifty: bool = False) -> dict[str, tuple[int, ...]]:
        """Return what may be kept of every width and trim; if `thrifty`, also what saves no time but something else."""
        found: dict[str, tuple[int, ...]] = {}
        for device in self.devices.values():
            for name, counts in candidates(self.graph, device, self.scope).items():
                found[name] = tuple(sorted({*found.get(name, ()), *counts}))
        found |= {trim.name: trim.counts for trim in self.graph.trims}
        kept = found if thrifty else useful(self.graph, list(self.times.values()), found)
        return {name: counts for name, counts in kept.items() if name in self.graph.width or len(counts) > 1}

    def solve(
        self, latency: Latency | None, limits: Limits | None = None, *, importance: Importance | None = None
    ) -> Plan:
        """Return the plan that loses least within the budgets; the next, for others or other losses, costs little."""
        limits = limits or Limits()
        if latency is None and not limits.amounts():
            raise PlanError("nothing is limited, so the dense model is best; give a latency or another limit")
        thrifty = bool(limits.amounts())
        if (key := (thrifty, limits.tied)) not in self._solved:
            self._solved[key] = Solver(self, self.options(thrifty=thrifty), limits.tied)
        return self._solved[key].plan(latency, limits, importance)


@dataclass(frozen=True)
class Limit:
    """A resource with its budget, in its unit, and how that was given."""

    resource: Resource
    given: Amount
    dense: float
    most: float
    ratios: bool  # only ratios are known of it

    def shown(self, value: float) -> str:
        """Return an amount for people."""
        words = f"{value / self.dense:.3g} of dense"
        scale, unit = (1e3, "ms") if self.resource.unit == "s" else (1.0, self.resource.unit)
        return words if self.ratios else f"{words} ({value * scale:.3g} {unit}".rstrip() + ")"

    def written(self, choice: Choice) -> LimitPlan:
        """Return what the plan says of it."""
        by = self.dense if self.ratios else 1.0
        return LimitPlan(
            name=self.resource.name,
            given=str(self.given),
            unit="of dense" if self.ratios else self.resource.unit,  # type: ignore[arg-type]
            dense=self.dense / by,
            budget=self.most / by,
            planned=self.resource.under(choice) / by,
        )


class Solver:
    """The integer program of one problem, for any budgets and losses."""

    def __init__(
        self, posed: Problem, options: Mapping[str, tuple[int, ...]], tied: tuple[tuple[str, str], ...]
    ) -> None:
        """Build the program."""
        self.posed, self.options, self.tied = posed, options, tied
        self.program = Program(posed.graph, options)
        self._sums: dict[str, list[tuple[Terms, float]]] = {}
        self._resources: dict[str, Resource] = {}
        for one, other in tied:
            for name in (one, other):
                if name not in options:
                    raise PlanError(f"{name!r} is tied, but is no width that is planned; `espalier groups` lists them")
            self.program.tie(one, other)

    @cached_property
    def magnitude(self) -> Importance:
        """What weights say, where no importance is given."""
        return magnitude(self.posed.model, self.posed.graph, self.options)

    def limits(self, latency: Latency | None, limits: Limits) -> Iterator[Limit]:
        """Read the budgets."""
        graph, profile = self.posed.graph, self.posed.profile
        wanted = dict(latency) if isinstance(latency, Mapping) else {} if latency is None else {profile.id: latency}
        for own, given in wanted.items():
            resource, measured = self.posed.times[own], isinstance(self.posed.costs[own], LatencyTable)
            dense_s = resource.under(graph.dense)
            most, relative = amount(given, dense_s, "s")
            if not relative and not measured:
                raise PlanError(
                    f"latency {given!r} needs a table measured on {own}; run `espalier calibrate` or give a fraction"
                )
            yield Limit(resource, given, dense_s, most, ratios=not measured)
        for name, given in limits.amounts().items():
            resource = self._resources.setdefault(name, self.posed.resource(name))
            dense = resource.under(graph.dense)
            if given == ON_CHIP and name == "activation_bytes":
                given = self._on_chip()
            yield Limit(resource, given, dense, amount(given, dense, resource.unit, name=name)[0], ratios=False)

    def _on_chip(self) -> str:
        found = resources.on_chip_bytes(self.posed.profile)
        if found is None:
            raise PlanError(f"{self.posed.profile.id} states no on-chip capacity; give the limit in bytes")
        return f"{found} B"

    def plan(self, latency: Latency | None, limits: Limits, importance: Importance | None) -> Plan:
        """Return the plan within the budgets."""
        importance = importance or self.magnitude
        graph, wanted = self.posed.graph, list(self.limits(latency, limits))
        _check_covers(importance, graph, self.options)
        choice, proof = self._within(wanted, self.program.losses(importance), limits.gap)
        choice = self._untrimmed(choice)
        full = graph.choice(choice.keep, choice.removed)
        time = self.posed.times[self.posed.profile.id]
        costs = self.posed.costs[self.posed.profile.id]
        quanta = {name: self.quantum(name) for name in self.options}
        document = Document(graph, self.posed.profile, costs, time, self.options, quanta, importance)
        fraction = next((w.most / w.dense for w in wanted if w.resource is time), 1.0)
        made = document.written(choice, proof, [own.written(full) for own in wanted], fraction)
        notes, scope = (*self.posed.notes, *self._trimmed(full), *doubts(made)), self.posed.scope
        return made.model_copy(update={"lossy": scope.lossy, "forced": scope.force, "tied": self.tied, "notes": notes})

    def _untrimmed(self, choice: Choice) -> Choice:
        """Return the choice that leaves layers whole which leave with their blocks anyway."""
        graph = self.posed.graph
        stay = {own.weight for own in graph.operations if own.present(choice)}
        whole = {trim.name: trim.size for trim in graph.trims if trim.groups.tensor not in stay}
        return Choice({name: whole.get(name, count) for name, count in choice.keep.items()}, choice.removed)

    def _trimmed(self, choice: Choice) -> tuple[str, ...]:
        """Return on what trims rely, and what the table does not know of them."""
        graph, costs = self.posed.graph, self.posed.costs[self.posed.profile.id]
        chosen = [trim.groups for trim in graph.trims if choice.keep[trim.name] < trim.size]
        notes = dict.fromkeys(pays(structure, self.posed.profile, force=True) for structure in chosen)
        names = [
            own.name
            for own, _, _ in graph.under(choice)
            if own.whole and isinstance(costs, LatencyTable) and not costs.knows(own)
        ]
        scaled = (
            f"the table has not measured {', '.join(dict.fromkeys(names))} as planned: priced by its cost untrimmed, "
            "times the ratio of the documented rules"
        )
        return (*filter(None, notes), *([scaled] if names else []))

    def quantum(self, name: str) -> int:
        """Return the step of a width on the device that is planned for; trims have none."""
        width = self.posed.graph.width.get(name)
        return quantum(self.posed.graph, self.posed.profile, width) if width else 1

    def _within(self, wanted: Sequence[Limit], losses: Terms, gap: float) -> tuple[Choice, Proof]:
        """Solve within the budget that is tightest, and add those that its best choice exceeds until there are none.

        A choice that is best within fewer budgets and keeps all is best within all. Where the program's costs were
        straight lines, hold the solution to the exact ones.
        """
        most, tries, seconds = [own.most for own in wanted], 0, 0.0
        held = {max(range(len(wanted)), key=lambda i: self._tightness(wanted[i]))} if wanted else set()
        while tries < _TRIES:
            budgets = [budget for i in sorted(held) for budget in self._budgets(wanted[i], most[i])]
            found = self.program.solve(losses, budgets, gap=gap)
            if found is None:
                break
            choice, proof = found
            seconds += proof.solved_s
            full = self.posed.graph.choice(choice.keep, choice.removed)
            over = [own.resource.under(full) / own.most for own in wanted]
            if max(over, default=0.0) <= 1 + 1e-6:
                return choice, proof.model_copy(update={"solved_s": round(seconds, 3)})
            exceeded = {i for i, by in enumerate(over) if by > 1 + 1e-6}
            for i in exceeded & held:
                most[i] /= over[i] * (1 + 1e-6)
            tries += exceeded <= held
            held |= exceeded
        raise PlanError(self._refusal(wanted))

    def _tightness(self, own: Limit) -> float:
        """Return how much of a budget a network of middling widths takes."""
        middle = {name: counts[len(counts) // 2] for name, counts in self.options.items()}
        return own.resource.under(self.posed.graph.choice(middle)) / max(own.most, 1e-30)

    def _budgets(self, own: Limit, most: float) -> list[Budget]:
        return [Budget(cost, most - constant) for cost, constant in self._costs(own.resource)]

    def _costs(self, resource: Resource) -> list[tuple[Terms, float]]:
        if resource.name not in self._sums:
            self._sums[resource.name] = self.program.costs(resource)
        return self._sums[resource.name]

    def _refusal(self, wanted: Sequence[Limit]) -> str:
        """Return why no plan meets the budgets: the first that is below its floor, or all of them together."""
        for own in wanted:
            floor = self._floor(own)
            if own.most < floor * (1 - 1e-9):
                what = "latency" if own.resource.unit == "s" else own.resource.name
                where = f" on {own.resource.name}" if own.resource.unit == "s" and len(self.posed.costs) > 1 else ""
                remedy = f"raise --{what.replace('_', '-')}"
                if own.resource.unit == "s" and floor > (1 - _WORTH) * own.dense:
                    remedy = f"no cut that is allowed gains {_WORTH:.0%} on {own.resource.name}: name another profile"
                return (
                    f"{what} budget {own.shown(own.most)}{where} is below the floor {own.shown(floor)} that this model "
                    f"can reach; {remedy}"
                )
        names = ", ".join(f"{own.resource.name} {own.shown(own.most)}" for own in wanted)
        return f"each of the budgets can be met alone, but not together: {names}; raise one of them"

    def _floor(self, own: Limit) -> float:
        """Return the least that a plan needs of a resource."""
        least, share = self._costs(own.resource), self.program.variable(integral=False)
        rows = [
            Budget({**cost, share: -own.dense}, -constant) for cost, constant in least
        ]  # share x dense is at least every sum
        found = self.program.solve({share: 1.0}, rows)
        assert found is not None  # the dense model has a share of 1
        choice = self.posed.graph.choice(found[0].keep, found[0].removed)
        return own.resource.under(choice)


def doubts(plan: Plan) -> tuple[str, ...]:
    """Return why a plan may not be worth a training, in words; empty if it is."""
    p = plan.predicted
    gain, less = 1 - p.fraction, 1 - p.macs / p.dense_macs
    if any(own.name == plan.profile for own in plan.limits) and plan.target_fraction > 1 - _WORTH:
        return (f"this budget gains less than {_WORTH:.0%}: not worth a training",)
    if gain < _WORTH and less > 4 * max(gain, 0.01):
        return (f"MACs fall {less:.0%} but latency {max(gain, 0.0):.0%} on {plan.profile}",)
    return ()


def _check_covers(importance: Importance, graph: Graph, options: Mapping[str, Sequence[int]]) -> None:
    missing = [f"{n} at {c}" for n, counts in options.items() for c in counts if c not in importance.widths.get(n, {})]
    missing += [block.name for block in graph.blocks if not block.frozen and block.name not in importance.blocks]
    if missing:
        raise PlanError(
            f"importance {importance.name!r} does not say what cutting {missing[0]} costs; measure it for the "
            "candidates of this profile and table"
        )
