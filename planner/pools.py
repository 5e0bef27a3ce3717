"""Pools: groups that share a budget, with their weights and costs, and which of them a budget pays for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from planner.graph import Graph
from planner.groups import Groups, group
from planner.spec import Plan
from planner.structures import NM, Depth, Structure, of_width


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
    """Return the pools of `plan` as tensors on the model's device."""

    def structure(kind: str, name: str) -> Structure:
        return Depth(graph.block[name]) if kind == "depth" else of_width(graph.width[name])

    shares = [
        Share(p.name, tuple(structure(p.structure, name) for name in p.members), p.weights, p.costs, p.budget)
        for p in plan.pools
    ]
    return pooled(shares, model)


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
