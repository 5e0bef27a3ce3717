"""The solution of the integer program, written as the plan that people review and training follows."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from planner.graph import Graph
from planner.groups import group
from planner.importance import Importance
from planner.latency import Costs, forecast
from planner.operations import Choice
from planner.resources import Resource, Term
from planner.spec import BlockPlan, InputSpec, LimitPlan, Plan, Pool, Proof, TrimPlan, WidthPlan, canonical
from planner.structures import Filter
from planner.trims import Trim
from profiles import Profile
from profiles.errors import PlanError


@dataclass(frozen=True)
class Document:
    """What was planned, and with what."""

    graph: Graph
    profile: Profile
    costs: Costs
    time: Resource  # on `profile`
    options: Mapping[str, Sequence[int]]
    quanta: Mapping[str, int]
    importance: Importance

    def written(self, choice: Choice, proof: Proof, limits: Sequence[LimitPlan], fraction: float) -> Plan:
        """Return the plan of a solution."""
        widths = tuple(self._width(name, choice) for name in self.options if name in self.graph.width)
        trims = tuple(self._trim(trim, choice) for trim in self.graph.trims if trim.name in self.options)
        free = (block for block in self.graph.blocks if not block.frozen)
        blocks = tuple(BlockPlan(name=block.name, removed=block.name in choice.removed) for block in free)
        return Plan(
            profile=self.profile.id,
            profile_sha256=hashlib.sha256(canonical(self.profile.model_dump(mode="json"))).hexdigest(),
            fingerprint=self.graph.fingerprint,
            inputs=tuple(InputSpec(shape=shape, dtype=dtype) for shape, dtype in self.graph.inputs),
            target_fraction=fraction,
            limits=tuple(limits),
            widths=widths,
            blocks=blocks,
            pools=(*per_width_pools(widths, blocks), *self._trim_pools(choice)),
            trims=trims,
            importance=self.importance.name,
            predicted=forecast(self.costs, self.graph, choice),
            proof=proof,
        )

    def _width(self, name: str, choice: Choice) -> WidthPlan:
        width, counts, kept = self.graph.width[name], tuple(self.options[name]), choice.keep[name]
        seconds = self._seconds(name, choice)
        dense_s = self.time.under(self.graph.dense)
        losses = self.importance.widths[name]
        return WidthPlan(
            name=name,
            dense=width.size,
            keep=kept,
            considered=counts,
            structure=width.structure,
            lossless=width.lossy is None,
            cost_s=_marginal(counts, seconds, kept),
            quantum=self.quanta[name],
            losses=tuple(losses[count] for count in counts),
            fractions=tuple(found / dense_s for found in seconds),
        )

    def _trim(self, trim: Trim, choice: Choice) -> TrimPlan:
        name, counts, losses = trim.name, tuple(self.options[trim.name]), self.importance.widths[trim.name]
        dense_s = self.time.under(self.graph.dense)
        return TrimPlan(
            name=name,
            structure=trim.structure,
            dense=trim.size,
            keep=choice.keep[name],
            considered=counts,
            losses=tuple(losses[count] for count in counts),
            fractions=tuple(found / dense_s for found in self._seconds(name, choice)),
        )

    def _trim_pools(self, choice: Choice) -> Iterator[Pool]:
        for trim in self.graph.trims:
            if (keep := choice.keep.get(trim.name, trim.size)) < trim.size:
                name, budget = trim.pool(keep)
                yield Pool(
                    name=name, structure=trim.structure, members=(name,), weights=(1.0,), costs=(1.0,), budget=budget
                )

    def _seconds(self, name: str, choice: Choice) -> list[float]:
        """Return the latency with each candidate of a width, all else as chosen; the block around it stays."""
        block = self.graph.part[name].block
        chosen = self.graph.choice(choice.keep, choice.removed - {block or ""})
        gone = [own for own in self.options if own != name and not choice.keep[own]]  # priced as if dense
        full = self.graph.choice({**chosen.keep, **{own: self.graph.part[own].size for own in gone}}, chosen.removed)

        def of(terms: Sequence[Term], count: int) -> float:
            trial = Choice({**full.keep, name: count}, full.removed)
            return sum(term.under(trial) for term in terms)

        now, whole, found = choice.keep[name], self.graph.choice(choice.keep, choice.removed), []
        for terms in self.time.sums:
            touched = [term for term in terms if any(name == own for e in term.extents for own, _ in e.parts)]
            rest = sum(term.under(whole) for term in terms) - (of(touched, now) if now else 0.0)
            found.append([rest + of(touched, count) for count in self.options[name]])
        return [self.time.constant + max(each) for each in zip(*found, strict=True)]


def _marginal(counts: Sequence[int], seconds: Sequence[float], kept: int) -> float:
    """Return what each channel of a step costs, as they share its cost: the step above those kept, or the last one."""
    if kept not in counts or len(counts) < 2:
        return 0.0
    at = min(counts.index(kept), len(counts) - 2)
    return max(0.0, seconds[at + 1] - seconds[at]) / (counts[at + 1] - counts[at])


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


def with_global_budget(plan: Plan, model: nn.Module, *, power: Mapping[str, float] | None = None) -> Plan:
    """Return the plan with one pool over all widths instead of one each: costs in seconds, one budget.

    How many channels each width keeps is then decided in training. a_j is the mean squared norm of a width's channels,
    in `model` unless `power` states it, so that x_j²/(a_j d_j) compares channels of different layers; the largest is 1.
    Widths that cost no time keep their own pools.
    """
    shared = [w for w in plan.widths if w.keep and w.cost_s > 0]
    if not shares(plan):
        raise PlanError("the plan narrows no width that costs time, so there is nothing to share a budget")
    power = power or powers(plan.graph(model), model)
    most = max(power[w.name] for w in shared)
    pool = Pool(
        name="global",
        structure="filter",
        members=tuple(w.name for w in shared),
        weights=tuple(max(power[w.name] / most, 1e-6) for w in shared),
        costs=tuple(w.cost_s for w in shared),
        budget=sum(w.keep * w.cost_s for w in shared),
    )
    others = tuple(own for own in plan.pools if own.structure == "depth" or own.name not in pool.members)
    return plan.model_copy(update={"pools": (pool, *others)})


def with_depth_budget(plan: Plan, model: nn.Module, keep: int) -> Plan:
    """Return the plan with one pool over all blocks that can leave, of which `keep` stay: training decides which.

    a_j is the number of weights that end a block's body, the largest is 1, so that x_j²/a_j compares the mean squares
    of scales and shifts. `rebuild` drops the blocks that are zero in the end. Raises PlanError if the plan removes
    blocks itself, or the model has not more than `keep` that can leave.
    """
    graph = plan.graph(model)
    free = [block for block in graph.blocks if not block.frozen]
    if not 0 < keep < len(free):
        raise PlanError(f"{len(free)} blocks of the model can leave, of which {keep} cannot stay; keep 1 to fewer")
    if gone := [block.name for block in plan.blocks if block.removed]:
        raise PlanError(f"the plan removes {gone[0]} itself; give a plan that keeps all blocks")
    sizes = [sum(model.get_parameter(name).numel() for name in block.last) for block in free]
    pool = Pool(
        name="depth",
        structure="depth",
        members=tuple(block.name for block in free),
        weights=tuple(size / max(sizes) for size in sizes),
        costs=tuple(1.0 for _ in free),
        budget=keep,
    )
    return plan.model_copy(update={"pools": (*plan.pools, pool)})


def shares(plan: Plan) -> bool:
    """Return whether there is anything to share a budget: a width that is narrowed and costs time."""
    return any(0 < w.keep < w.dense and w.cost_s > 0 for w in plan.widths)


def powers(graph: Graph, model: nn.Module) -> dict[str, float]:
    """Return the mean squared norm of the channels of every width."""
    norms = group([Filter(width) for width in graph.cuttable], model).norms(dict(model.named_parameters()))
    parts = torch.split(norms, [width.size for width in graph.cuttable])
    return {w.name: float(part.square().mean()) for w, part in zip(graph.cuttable, parts, strict=True)}
