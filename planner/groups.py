"""Groups of weights: group-id maps over parameters, their norms, and multiplication by a scale per group."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from planner.structures import Structure


@dataclass(frozen=True)
class Member:
    """The groups within one parameter."""

    tensor: str
    ids: Tensor  # int64, broadcastable to the parameter; the number of groups m where a weight belongs to none
    reduced: tuple[int, ...]  # the parameter's dimensions that the ids do not vary along
    span: slice | None  # the ids are these numbers in order, as they are for whole layers: no gather is needed


    def add_(self, sums: Tensor, values: Tensor) -> None:
        """Add `values`, reduced to the shape of the ids, to the sums of their groups, (m + 1,)."""
        if self.span is not None:
            sums[self.span].add_(values.reshape(-1))
        else:
            sums.index_add_(0, self.ids.expand_as(values).flatten(), values.to(sums.dtype).flatten())

    def spread(self, per_group: Tensor) -> Tensor:
        """Give every weight the number of its group: (m + 1,) -> broadcastable to the parameter."""
        return per_group[self.ids] if self.span is None else per_group[self.span].view(self.ids.shape)


@dataclass(frozen=True)
class Groups:
    """m groups, numbered in the order of their structures; holds ids, never weights."""

    structures: tuple[Structure, ...]
    members: tuple[Member, ...]
    structure: Tensor  # (m,) int64: the position of the structure that each group belongs to

    @property
    def count(self) -> int:
        """The number of groups m."""
        return len(self.structure)

    def sums(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of `values`, shaped like the parameters, over each group, (m,), in float32."""
        sums = torch.zeros(self.count + 1, device=self.structure.device)
        for member in self.members:
            value = values[member.tensor]
            member.add_(sums, value.sum(member.reduced, True, dtype=torch.float32) if member.reduced else value)
        return sums[:-1]

    def norms(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the Euclidean norm of each group, (m,), in float32."""
        sums = torch.zeros(self.count + 1, device=self.structure.device)
        for member in self.members:
            weights = parameters[member.tensor].detach()
            if member.reduced:  # in one pass, without a copy of the weights
                weights = torch.linalg.vector_norm(weights, dim=member.reduced, keepdim=True, dtype=torch.float32)
            member.add_(sums, weights.to(torch.float32).square())
        return sums[:-1].sqrt_()

    @torch.no_grad()
    def scale_(self, parameters: Mapping[str, Tensor], scale: Tensor) -> None:
        """Multiply the weights of each group by its entry of `scale`, (m,)."""
        padded = torch.cat([scale, scale.new_ones(1)])
        for member in self.members:
            weights = parameters[member.tensor]
            weights.mul_(member.spread(padded).to(weights.dtype))

    def sizes(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the number of weights in each group, (m,)."""
        return self.sums({member.tensor: torch.ones_like(parameters[member.tensor]) for member in self.members})

    def to(self, device: torch.device) -> "Groups":
        """Return the groups with their ids on another device."""
        members = tuple(replace(member, ids=member.ids.to(device)) for member in self.members)
        return Groups(self.structures, members, self.structure.to(device))


def group(structures: Sequence[Structure], model: nn.Module) -> Groups:
    """Return the groups of `structures` over the parameters of `model`, on the parameters' device."""
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    counts = torch.tensor([structure.count for structure in structures], dtype=torch.int64)
    total, first = int(counts.sum()), 0
    members: list[Member] = []
    for structure in structures:
        for tensor, ids in structure.maps(shapes):
            ids = torch.where(ids < 0, total, ids + first)
            reduced = tuple(i for i, size in enumerate(ids.shape) if size == 1 and shapes[tensor][i] > 1)
            start = int(ids.flatten()[0])
            plain = bool((ids.flatten() == torch.arange(start, start + ids.numel())).all()) and ids.max() < total
            full = ids.numel() == math.prod(n for i, n in enumerate(shapes[tensor]) if i not in reduced)
            span = slice(start, start + ids.numel()) if plain and full else None
            members.append(Member(tensor, ids, reduced, span))
        first += structure.count
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
    return Groups(tuple(structures), tuple(members), owner).to(device)
