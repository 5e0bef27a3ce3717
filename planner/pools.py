"""Pools: groups that share a budget, with their weights and costs, and which of them a budget pays for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from planner.graph import Graph
from planner.groups import Groups, group
from planner.spec import Plan, Pool, WidthPlan
from planner.structures import NM, Block, Channel, Depth, FilterShape, Kernel, Structure, of_width
from profiles import Profile
from profiles.errors import PlanError


@dataclass(frozen=True)
class Share:
    """Structures with one budget: `weights` a and `costs` d hold one number per structure, for all of its groups.

    An N:M structure stands alone in its share, and is a pool of budget N for every M weights.
    """

    name: str
    structures: tuple[Structure, ...]
    weights: tuple[float, ...]
    costs: tuple[float, ...]
    budget: float

    @classmethod
    def of(cls, structure: Structure, budget: float) -> "Share":
        """Return a structure with its own budget, in groups."""
        return cls(structure.name, (structure,), (1.0,), (1.0,), budget)

    @property
    def run(self) -> int:
        """How many groups make a pool, 0 for all of them."""
        return next((structure.m for structure in self.structures if isinstance(structure, NM)), 0)

    @property
    def size(self) -> int:
        """The number of groups."""
        return sum(structure.count for structure in self.structures)


@dataclass(frozen=True)
class Pools:
    """The groups of a plan with their WGSEF weights a, costs d, pool ids, (m,) each, and budgets k, (p,), in float64.

    In float32 a budget that is a sum of costs could round below the sum. `layout` says the same as the ids, shorter.
    """

    names: tuple[str, ...]  # of shares; N:M has many pools in one share
    share: Tensor  # (p,) the share that each pool belongs to
    groups: Groups
    a: Tensor
    d: Tensor
    pool: Tensor
    k: Tensor
    size: int = 0  # of every pool, where all are of one size and lie one after another

    @property
    def layout(self) -> Tensor | int | None:
        """The pools as `planner.envelope` takes them: (m,) ids, or the one size of all, or None for one pool."""
        if len(self.k) == 1:
            return None
        return self.size or self.pool

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


def pooled(shares: Sequence[Share], model: nn.Module) -> Pools:
    """Return the pools of `shares` as tensors on the model's device."""
    groups = group([structure for share in shares for structure in share.structures], model)
    device = groups.structure.device

    def per_group(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[groups.structure]

    counts = [share.size // share.run if share.run else 1 for share in shares]
    ids, first = [torch.zeros(0, dtype=torch.int64)], 0
    for share, count in zip(shares, counts, strict=True):
        ids.append(
            first + (torch.arange(share.size) // share.run if share.run else torch.zeros(share.size, dtype=torch.int64))
        )
        first += count
    sizes = {share.run or share.size for share in shares}
    budgets = [share.structures[0].n if isinstance(share.structures[0], NM) else share.budget for share in shares]
    repeats = torch.tensor(counts, dtype=torch.int64)
    return Pools(
        tuple(share.name for share in shares),
        torch.arange(len(shares)).repeat_interleave(repeats).to(device),
        groups,
        per_group([a for share in shares for a in share.weights]),
        per_group([d for share in shares for d in share.costs]),
        torch.cat(ids).to(device),
        torch.tensor(budgets, dtype=torch.float64).repeat_interleave(repeats).to(device),
        size=sizes.pop() if len(sizes) == 1 else 0,
    )


def pools(plan: Plan, model: nn.Module, graph: Graph) -> Pools:
    """Return the pools of `plan` as tensors on the model's device.

    Where widths share a budget, the strongest channels of each, as many as the least that the plan considered, have a
    pool and a budget of their own that spares them: a layer that loses all of its channels cuts the network in two.
    """
    shares = [Share(p.name, structures_of(p, model, graph), p.weights, p.costs, p.budget) for p in plan.pools]
    found = pooled(shares, model)
    fewest = {width.name: min(width.considered) for width in plan.widths}
    together = [len(p.members) > 1 and p.structure != "depth" for p in plan.pools for _ in p.members]
    spared = [fewest.get(own.name, 0) * many for own, many in zip(found.groups.structures, together, strict=True)]
    return _sparing(found, dict(model.named_parameters()), spared) if any(spared) else found


@torch.no_grad()
def _sparing(found: Pools, parameters: Mapping[str, Tensor], counts: Sequence[int]) -> Pools:
    """Return the pools without the strongest so many groups of each structure, and one more of those."""
    structure = found.groups.structure
    order = found.groups.norms(parameters).argsort(descending=True, stable=True)
    order = order[structure[order].argsort(stable=True)]
    sizes = torch.bincount(structure, minlength=len(counts))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[structure[order]]
    spared = rank < torch.tensor(counts, device=order.device)[structure]
    spared &= (found.costs(spared) <= found.k)[found.pool]  # none where a budget does not pay for them
    costs = found.costs(spared)
    return replace(
        found,
        names=(*found.names, "spared"),
        share=torch.cat([found.share, found.share.new_tensor([len(found.names)])]),
        pool=torch.where(spared, len(found.k), found.pool),
        k=torch.cat([found.k - costs, costs.sum()[None]]),
        size=0,
    )


def structures_of(pool: Pool, model: nn.Module, graph: Graph) -> tuple[Structure, ...]:
    """Return the structures that a pool of a plan names; raises PlanError if the model has no such weight or width."""
    return tuple(_structure(pool.structure, name, model, graph) for name in pool.members)


def _structure(kind: str, name: str, model: nn.Module, graph: Graph) -> Structure:
    try:
        match kind:
            case "depth":
                return Depth(graph.block[name])
            case "block":
                width, _, quantum = name.rpartition("/")
                return Block(graph.width[width], int(quantum))
            case "channel":
                return input_channels(model, graph, name)
            case "filter_shape":
                return FilterShape(name, tuple(model.get_parameter(name).shape[1:]))
            case "kernel":
                weight, _, size = name.rpartition(" ")
                return Kernel(weight, model.get_parameter(weight).shape[2:], math.prod(map(int, size.split("x"))))
            case "nm":
                weight, _, pattern = name.rpartition(" ")
                return NM(weight, model.get_parameter(weight).numel(), *map(int, pattern.split(":")))
    except (AttributeError, KeyError, ValueError) as error:
        raise PlanError(f"the plan names {name!r}, of which the model has no {kind}; make it for this model") from error
    return of_width(graph.width[name])


def input_channels(model: nn.Module, graph: Graph, weight: str) -> Channel:
    """Return the input channels of the layer that holds `weight`, whichever way around it is stored."""
    layer = model.get_submodule(weight.rpartition(".")[0])
    around = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    read = (piece.axis for width in graph.widths for piece in width.slices if piece.tensor == weight and piece.reads)
    axis = next(read, 0 if around else 1)
    return Channel(weight, model.get_parameter(weight).shape[axis], axis)


Planned = Block | Channel | FilterShape


def with_structures(
    plan: Plan, profile: Profile, budgets: Sequence[tuple[Planned, int]], *, force: bool = False
) -> Plan:
    """Return the plan with a pool for each (structure, number of its groups that stay).

    Runs of channels take the place of what the plan does with that width. Where structures of several pools share
    weights, each pool's proximal step is its own. Raises PlanError if a structure does not pay on the device and it is
    not forced; where that is unknown or depends, the plan notes it.
    """
    notes, added, names = list(plan.notes), list[Pool](), set[str]()
    for structure, budget in budgets:
        if not 0 < budget <= structure.count:
            raise PlanError(f"{structure.name} has {structure.count} groups, of which {budget} cannot stay")
        notes += [note for note in [pays(structure, profile, force=force)] if note]
        name, kind = structure.name, KIND[type(structure)]
        added.append(Pool(name=name, structure=kind, members=(name,), weights=(1.0,), costs=(1.0,), budget=budget))
        names |= {structure.width.name} if isinstance(structure, Block) else {structure.name}
    runs = [_narrowed(structure, budget) for structure, budget in budgets if isinstance(structure, Block)]
    own = [pool for pool in plan.pools if names.isdisjoint(pool.members)]
    if lost := [pool.name for pool in plan.pools if len(pool.members) > 1 and not names.isdisjoint(pool.members)]:
        raise PlanError(f"the pool {lost[0]} shares its budget with other widths; plan with a budget for each")
    widths = [width for width in plan.widths if width.name not in {run.name for run in runs}]
    changed = {"pools": (*own, *added), "widths": (*widths, *runs), "notes": tuple(dict.fromkeys(notes))}
    return plan.model_copy(update={**changed, "forced": plan.forced or force})


KIND: dict[type[Planned], Literal["block", "channel", "filter_shape"]] = {
    Block: "block",
    Channel: "channel",
    FilterShape: "filter_shape",
}


def pays(structure: Planned | Kernel | NM, profile: Profile, *, force: bool) -> str:
    """Return what is to be noted; raises PlanError if the structure does not pay and is not forced."""
    kind, known = structure.profile_kind, profile.pays(structure.profile_kind)
    if known is None:
        return f"whether cutting {kind} pays on {profile.id} is not known"
    if known.pays == "no":
        told = f"cutting {kind} does not pay on {profile.id}"
        if not force:
            raise PlanError(f"{told}, so {structure.name} is not planned; force=True plans it anyway")
        return told
    return f"cutting {kind} pays on {profile.id} if {'; '.join(known.requires)}" if known.requires else ""


def _narrowed(structure: Block, budget: int) -> WidthPlan:
    width = structure.width
    if width.frozen:
        raise PlanError(f"{width.name} cannot be cut: {width.frozen}")
    keep = min(width.size, budget * structure.quantum)
    return WidthPlan(
        name=width.name,
        dense=width.size,
        keep=keep,
        considered=(keep, width.size),
        structure=width.structure,
        lossless=width.lossy is None,
        cost_s=0.0,
    )


def leaving(plan: Plan, model: nn.Module, graph: Graph) -> frozenset[str]:
    """Return the blocks that leave: those that the plan removes, and those of a shared pool that are zero."""
    shared = [pool for pool in plan.pools if pool.structure == "depth" and len(pool.members) > 1]
    structures = [structure for pool in shared for structure in structures_of(pool, model, graph)]
    if not structures:
        return plan.choice.removed
    norms = group(structures, model).norms(dict(model.named_parameters())).tolist()
    return plan.choice.removed | {each.name for each, norm in zip(structures, norms, strict=True) if norm == 0}


def excess(plan: Plan, model: nn.Module, graph: Graph) -> list[tuple[str, float, float]]:
    """Return (pool, cost of its non-zero groups, budget) of every pool above its budget."""
    state = pools(plan, model, graph)
    costs = state.costs(state.groups.norms(dict(model.named_parameters())) > 0)
    rows = zip(state.share.tolist(), costs.tolist(), state.k.tolist(), strict=True)
    return [(state.names[i], cost, budget) for i, cost, budget in rows if cost > budget * (1 + 1e-6)]


def harden_pools_(state: Pools, parameters: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Zero what the budgets do not pay for; return what is kept, (m,) bool, and how many non-zero groups went."""
    norms = state.groups.norms(parameters)
    kept = state.select(norms)
    changed = int(((norms > 0) & ~kept).sum())
    state.groups.scale_(parameters, kept.to(norms.dtype))
    return kept, changed


@torch.no_grad()
def flush_(model: nn.Module) -> None:
    """Set subnormal numbers in parameters and buffers to zero: they make CPUs several times slower."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.masked_fill_(tensor.abs() < torch.finfo(tensor.dtype).tiny, 0.0)
