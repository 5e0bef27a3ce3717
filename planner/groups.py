"""Groups of weights: group-id maps over parameters, their norms, and multiplication by a scale per group."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce

from planner.parallel import held, is_split, local, shard_groups
from planner.structures import Structure

_CHUNK_CPU = 2**18  # weights whose float32 copies stay in the cache
_CHUNK_DEVICE = 2**26  # 256 MiB in float32
_JOINED = 2**20  # ids: below, all members are handled in one call, which saves the time that launching many takes


@dataclass(frozen=True)
class Member:
    """The groups within one parameter, or within the shard of it that this process holds."""

    tensor: str
    ids: Tensor  # int64, broadcastable to the weights; the number of groups m where a weight belongs to none
    reduced: tuple[int, ...]  # the parameter's dimensions that the ids do not vary along
    span: slice | None  # the ids are these numbers in order, as they are for whole layers: no gather is needed
    split: bool = False  # other processes hold other weights of these groups

    def parts(self, weights: Tensor) -> Iterator[tuple["Member", Tensor]]:
        """Yield runs of the first dimension with their weights, so that float32 copies and gathers stay small."""
        length = _CHUNK_CPU if weights.is_cpu else _CHUNK_DEVICE
        if weights.dim() == 0 or weights.numel() <= length:
            yield self, weights
            return
        rows = max(1, length * len(weights) // weights.numel())
        for first in range(0, len(weights), rows):
            yield self._rows(first, rows), weights[first : first + rows]

    def _rows(self, first: int, rows: int) -> "Member":
        if 0 in self.reduced:
            return self
        ids = self.ids[first : first + rows]
        start = 0 if self.span is None else self.span.start + first * self.ids[0].numel()
        return replace(self, ids=ids, span=None if self.span is None else slice(start, start + ids.numel()))

    def add_(self, sums: Tensor, values: Tensor) -> None:
        """Add `values`, reduced to the shape of the ids, to the sums of their groups, (m + 1,)."""
        if self.span is not None:
            sums[self.span].add_(values.reshape(-1))
        else:
            _add_(sums, self.ids.expand_as(values).flatten(), values.to(sums.dtype).flatten())

    def spread(self, per_group: Tensor) -> Tensor:
        """Give every weight the number of its group: (m + 1,) -> broadcastable to the weights."""
        return per_group[self.ids] if self.span is None else per_group[self.span].view(self.ids.shape)


@dataclass(frozen=True)
class Joined:
    """The ids of many small members: one call for all of them saves the time that launching many takes."""

    ids: Tensor  # of all members, one after another
    once: Tensor  # the same without repetitions: a filter, its bias and its normalisation have one and the same
    lengths: list[int]  # of what `once` consists of
    uses: list[tuple[int, torch.Size | None]]  # per member: which of them, and its shape if it is no vector

    def spread(self, per_group: Tensor) -> list[Tensor]:
        """Give every weight of every member the number of its group: (m + 1,) -> broadcastable to the weights."""
        pieces = torch.split(per_group[self.once], self.lengths)
        return [pieces[i] if shape is None else pieces[i].view(shape) for i, shape in self.uses]


@dataclass(frozen=True)
class Groups:
    """m groups, numbered in the order of their structures; holds ids, never weights.

    Of sharded parameters (`fully_shard`) each process holds the ids of its own shards. Sums over groups are then added
    up over the processes in one call, so that every process knows all groups and none a whole parameter.
    """

    structures: tuple[Structure, ...]
    members: tuple[Member, ...]
    structure: Tensor  # (m,) int64: the position of the structure that each group belongs to
    shards: tuple[ProcessGroup, ...] = ()  # the processes that hold parts of the split members
    joined: Joined | None = None  # of all members, where they are few

    @property
    def count(self) -> int:
        """The number of groups m."""
        return len(self.structure)

    def sums(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of `values`, shaped (and sharded) like the parameters, over each group, (m,), in float32."""
        return self._added(values, _sum)

    @torch.no_grad()
    def norms(self, parameters: Mapping[str, Tensor], *, out: Tensor | None = None) -> Tensor:
        """Return the Euclidean norm of each group, (m,), in float32: new, or the first m of `out`, (m + 1,)."""
        if self.joined is not None:
            sums = torch.zeros(self.count + 1, device=self.structure.device) if out is None else out.zero_()
            norms = [_norm(member, parameters[member.tensor]) for member in self.members]
            if norms:
                values = [each if each.dim() == 1 else each.flatten() for each in norms]
                _add_(sums, self.joined.ids, torch.cat(values).square_())
            return sums[:-1].sqrt_()
        if out is not None and self._alone:
            for member in self.members:
                torch.abs(parameters[member.tensor].flatten(), out=out[member.span])
            return out[:-1]
        return self._added(parameters, _square, out=out).sqrt_()

    @cached_property
    def _alone(self) -> bool:
        """Whether every group is a single weight, in the order of its parameter."""
        plain = all(not m.reduced and not m.split and m.span is not None for m in self.members)
        return plain and sum(m.ids.numel() for m in self.members) == self.count

    def sizes(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the number of weights in each group, (m,)."""
        return self._added(parameters, _size)

    def _added(
        self, values: Mapping[str, Tensor], reduce: Callable[[Member, Tensor], Tensor], *, out: Tensor | None = None
    ) -> Tensor:
        sums = torch.zeros(self.count + 1, device=self.structure.device) if out is None else out.zero_()
        for split in (True, False):  # what every process holds whole is added once the parts are
            for member in self.members:
                if member.split == split:
                    for part, weights in member.parts(local(values[member.tensor]).detach()):
                        part.add_(sums, reduce(part, weights))
            for shards in self.shards if split else ():
                all_reduce(sums, group=shards)
        return sums[:-1]

    @torch.no_grad()
    def scale_(self, parameters: Mapping[str, Tensor], scale: Tensor) -> None:
        """Multiply the weights of each group by its entry of `scale`, (m,)."""
        gathers = self.joined is not None or any(member.span is None for member in self.members)
        padded = torch.cat([scale, scale.new_ones(1)]) if gathers else scale
        if self.joined is not None and self.members:
            torch._foreach_mul_([parameters[member.tensor] for member in self.members], self.joined.spread(padded))
            return
        for member in self.members:
            for part, weights in member.parts(local(parameters[member.tensor])):
                weights.mul_(part.spread(padded).to(weights.dtype))

    def to(self, device: torch.device) -> "Groups":
        """Return the groups with their ids on another device."""
        members = tuple(replace(member, ids=member.ids.to(device)) for member in self.members)
        joined = None
        if self.joined is not None:
            joined = replace(self.joined, ids=self.joined.ids.to(device), once=self.joined.once.to(device))
        return replace(self, members=members, structure=self.structure.to(device), joined=joined)


def _sum(member: Member, weights: Tensor) -> Tensor:
    return weights.sum(member.reduced, True, dtype=torch.float32) if member.reduced else weights


def _norm(member: Member, weights: Tensor) -> Tensor:
    if not member.reduced:
        return weights if weights.dtype == torch.float32 else weights.to(torch.float32)
    # In one pass, without a copy of float32 weights.
    norms: Tensor = torch.linalg.vector_norm(weights, dim=member.reduced, keepdim=True, dtype=torch.float32)
    return norms


def _square(member: Member, weights: Tensor) -> Tensor:
    return _norm(member, weights).square()


def _add_(sums: Tensor, ids: Tensor, values: Tensor) -> None:
    if sums.is_cpu:
        sums.index_add_(0, ids, values)
    else:  # sorts first, so that replicas of a model get the same bits, which index_add_ does not promise
        sums.index_put_((ids,), values, accumulate=True)


def _size(member: Member, weights: Tensor) -> Tensor:
    shape = [1 if i in member.reduced else size for i, size in enumerate(weights.shape)]
    return weights.new_full(shape, math.prod(weights.shape[i] for i in member.reduced), dtype=torch.float32)


def group(structures: Sequence[Structure], model: nn.Module) -> Groups:
    """Return the groups of `structures` over the parameters of `model`, on the parameters' device.

    The parameters may be sharded; raises PlanError if they are so in different ways.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    counts = torch.tensor([structure.count for structure in structures], dtype=torch.int64)
    total, first = int(counts.sum()), 0
    members: list[Member] = []
    for structure in structures:
        for tensor, ids in structure.maps(shapes):
            members.append(_member(tensor, torch.where(ids < 0, total, ids + first), parameters[tensor], total))
        first += structure.count
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
    shards = shard_groups((member.tensor, parameters[member.tensor]) for member in members)
    few = device.type == "cpu" or len({m.tensor for m in members}) == len(members)  # others multiply all at once
    few = few and not any(m.split for m in members) and sum(m.ids.numel() for m in members) <= _JOINED
    few = few and sum(parameters[m.tensor].numel() for m in members) <= _CHUNK_DEVICE
    few = few and all(parameters[m.tensor].dtype == torch.float32 for m in members)  # others are faster in chunks
    return Groups(tuple(structures), tuple(members), owner, shards, _joined(members) if few else None).to(device)


def _joined(members: Sequence[Member]) -> Joined:
    """Return the ids of members that are on the CPU."""
    every = [member.ids.flatten() for member in members]
    once: dict[bytes, Tensor] = {}
    places: dict[bytes, int] = {}
    uses = []
    for member, ids in zip(members, every, strict=True):
        key = ids.numpy().tobytes()
        once.setdefault(key, ids)
        uses.append((places.setdefault(key, len(places)), None if member.ids.dim() == 1 else member.ids.shape))
    none, different = torch.zeros(0, dtype=torch.int64), list(once.values())
    return Joined(torch.cat([none, *every]), torch.cat([none, *different]), [len(ids) for ids in different], uses)


def _member(tensor: str, ids: Tensor, parameter: Tensor, total: int) -> Member:
    """Return the groups of the part of `parameter` that is held here; `ids` are those of all of it."""
    reduced = tuple(i for i, size in enumerate(ids.shape) if size == 1 and parameter.shape[i] > 1)
    ids = ids[tuple(slice(None) if i in reduced else part for i, part in enumerate(held(parameter)))]
    start = int(ids.flatten()[0]) if ids.numel() else total
    end = start + ids.numel()
    in_order = end <= total and bool((ids.flatten() == torch.arange(start, end)).all())
    return Member(tensor, ids, reduced, slice(start, end) if in_order else None, is_split(parameter))
