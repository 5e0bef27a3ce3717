"""Structures: each says which weights form a group, as integer group-id maps over parameters, and nothing else."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from planner.blocks import Block as ResidualBlock
from planner.operations import cropped
from planner.widths import Width
from profiles.errors import PlanError


@dataclass(frozen=True)
class Filter:
    """The channels of one width: filters, biases, and the normalisation's scale and shift, of all tied producers."""

    width: Width
    profile_kind: ClassVar[str] = "filters"  # what device profiles call it
    rebuilt_as: ClassVar[str] = "smaller tensors"

    @property
    def name(self) -> str:
        """The width's name."""
        return self.width.name

    @property
    def count(self) -> int:
        """The number of groups."""
        return self.width.size

    def maps(self, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, group ids broadcastable to its shape); -1 marks weights that belong to no group."""
        for piece in self.width.slices:
            if piece.penalised:
                form = [-1 if i == piece.axis else 1 for i in range(len(shapes[piece.tensor]))]
                yield piece.tensor, torch.from_numpy(piece.units).view(form)


@dataclass(frozen=True)
class Hidden(Filter):
    """The hidden units of a feed-forward or recurrent layer, gates included."""

    profile_kind: ClassVar[str] = "hidden"


@dataclass(frozen=True)
class Head(Filter):
    """Attention heads: their query, key and value features; where queries share keys, whole query groups."""

    profile_kind: ClassVar[str] = "heads"


@dataclass(frozen=True)
class Embedding(Filter):
    """The features of the stream that the blocks of a transformer add to."""

    profile_kind: ClassVar[str] = "hidden"


@dataclass(frozen=True)
class Depth:
    """One residual block: the scale and shift that end its body, so that zeros leave the bare shortcut."""

    block: ResidualBlock
    profile_kind: ClassVar[str] = "depth"
    rebuilt_as: ClassVar[str] = "the bare shortcut"

    @property
    def name(self) -> str:
        """The block's name."""
        return self.block.name

    @property
    def count(self) -> int:
        """The number of groups: the block leaves or stays as a whole."""
        return 1

    def maps(self, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, group ids broadcastable to its shape)."""
        for tensor in self.block.last:
            yield tensor, torch.zeros([1] * len(shapes[tensor]), dtype=torch.int64)


@dataclass(frozen=True)
class Block:
    """Contiguous runs of `quantum` channels of one width: what a device computes at once. The last may be shorter."""

    width: Width
    quantum: int
    profile_kind: ClassVar[str] = "filters"
    rebuilt_as: ClassVar[str] = "smaller tensors"

    @property
    def name(self) -> str:
        """The width's name and the quantum."""
        return f"{self.width.name}/{self.quantum}"

    @property
    def count(self) -> int:
        """The number of groups."""
        return -(-self.width.size // self.quantum)

    def maps(self, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, group ids broadcastable to its shape); -1 marks weights that belong to no group."""
        for tensor, ids in Filter(self.width).maps(shapes):
            yield tensor, torch.where(ids < 0, -1, ids // self.quantum)


@dataclass(frozen=True)
class Channel:
    """The input channels of one layer: W[:, c] (Wen et al. 2016); of grouped convolutions those of every group.

    `axis` is 0 for weights that are stored the other way around, such as those of transposed convolutions.
    """

    tensor: str
    size: int
    axis: int = 1
    profile_kind: ClassVar[str] = "in_channels"
    rebuilt_as: ClassVar[str] = "smaller tensors where nothing else reads them, otherwise a selection of those read"

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.tensor

    @property
    def count(self) -> int:
        """The number of groups."""
        return self.size

    def maps(self, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, group ids broadcastable to its shape)."""
        form = [-1 if i == self.axis else 1 for i in range(len(shapes[self.tensor]))]
        yield self.tensor, torch.arange(self.size).view(form)


@dataclass(frozen=True)
class FilterShape:
    """The positions of a kernel per input channel: the shape fibres W[:, c, y, x] (Wen et al. 2016)."""

    tensor: str
    shape: tuple[int, ...]  # input channels and kernel: the weight's shape without its first dimension
    profile_kind: ClassVar[str] = "kernel_shape"
    rebuilt_as: ClassVar[str] = "a cropped kernel, or a gather and a 1x1 convolution"

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.tensor

    @property
    def count(self) -> int:
        """The number of groups."""
        return math.prod(self.shape)

    def maps(self, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, group ids broadcastable to its shape)."""
        yield self.tensor, torch.arange(self.count).view(1, *self.shape)


@dataclass(frozen=True)
class Kernel:
    """The positions of a kernel, W[:, :, y, x], from its centre outwards; the first `inner` stay and are no groups."""

    tensor: str
    size: tuple[int, ...]  # odd along every axis
    inner: int = 0
    profile_kind: ClassVar[str] = "kernel_shape"
    rebuilt_as: ClassVar[str] = "a cropped kernel"

    @property
    def name(self) -> str:
        """The weight's name and the kernel that stays."""
        return f"{self.tensor} {'x'.join(map(str, cropped(self.size, self.inner))) if self.inner else 'kernel'}"

    @property
    def count(self) -> int:
        """The number of groups."""
        return math.prod(self.size) - self.inner

    def maps(self, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, group ids broadcastable to its shape); -1 marks weights that belong to no group."""
        places = torch.cartesian_prod(*(torch.arange(size) - size // 2 for size in self.size))
        away = places.abs().view(math.prod(self.size), -1).amax(1)
        ids = torch.empty_like(away).index_copy_(0, away.argsort(stable=True), torch.arange(len(away))) - self.inner
        yield self.tensor, ids.clamp_min(-1).view(1, 1, *self.size)


@dataclass(frozen=True)
class Rows:
    """Runs of `size` rows of named tensors: filters or heads without the graph that says what is tied to them."""

    tensors: tuple[str, ...]  # e.g. the weights and biases of query, key and value
    count: int
    size: int
    profile_kind: ClassVar[str] = "filters"
    rebuilt_as: ClassVar[str] = "zeros in place"

    @property
    def name(self) -> str:
        """The first tensor's name."""
        return self.tensors[0]

    def maps(self, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, group ids broadcastable to its shape); fused projections hold the heads several times."""
        for tensor in self.tensors:
            times = shapes[tensor][0] // (self.count * self.size)
            ids = torch.arange(self.count).repeat_interleave(self.size).repeat(times)
            yield tensor, ids.view([-1 if i == 0 else 1 for i in range(len(shapes[tensor]))])


@dataclass(frozen=True)
class Weight:
    """Every weight of one tensor is a group."""

    tensor: str
    count: int
    profile_kind: ClassVar[str] = "unstructured"
    rebuilt_as: ClassVar[str] = "zeros in place, for runtimes with sparse kernels"

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.tensor

    def maps(self, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, group ids of its shape)."""
        yield self.tensor, torch.arange(self.count).view(shapes[self.tensor])


@dataclass(frozen=True)
class NM:
    """N of every M weights that follow each other along the input axis: a pool per M weights, budget N each."""

    tensor: str
    count: int
    n: int
    m: int
    profile_kind: ClassVar[str] = "nm_sparsity"
    rebuilt_as: ClassVar[str] = "zeros in place, for runtimes with sparse kernels"

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m or self.count % self.m:
            raise PlanError(f"{self.tensor}: {self.n}:{self.m} does not divide {self.count} weights")

    @property
    def name(self) -> str:
        """The weight's name and the pattern."""
        return f"{self.tensor} {self.n}:{self.m}"

    @property
    def runs(self) -> int:
        """Weights per pool: the structure has count / runs pools."""
        return self.m

    def maps(self, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter, group ids of its shape), counted along the input axis first."""
        shape = shapes[self.tensor]
        if shape[1] % self.m:
            raise PlanError(f"{self.tensor} has {shape[1]} inputs, which {self.m} does not divide; keep it dense")
        order = torch.arange(self.count).view(shape[0], *shape[2:], shape[1])
        yield self.tensor, order.movedim(-1, 1)


Structure = Filter | Block | Channel | FilterShape | Kernel | Depth | Rows | NM | Weight
"""The closed set of structures; Hidden, Head and Embedding are filters of other layers."""

OF_WIDTH: dict[str, type[Filter]] = {"filter": Filter, "hidden": Hidden, "head": Head, "embedding": Embedding}


def of_width(width: Width) -> Filter:
    """Return the structure whose groups are the channels of a width."""
    return OF_WIDTH[width.structure](width)


def ranked(structure: Structure, scores: Tensor) -> Tensor:
    """Return what the first group that is kept adds to a score, the second, and so on.

    The strongest of all come first, of a kernel its centre; of N:M the strongest of each M weights, added up.
    """
    if isinstance(structure, Kernel):
        return scores
    if isinstance(structure, NM):
        return scores.view(-1, structure.m).sort(dim=1, descending=True).values.sum(0)
    return scores.sort(descending=True).values


def kept(structure: Structure, scores: Tensor, count: int) -> Tensor:
    """Return 1 for the groups that stay, those ranked first, and else 0; of N:M `count` of each M stay."""
    stays = torch.zeros_like(scores)
    if isinstance(structure, Kernel):
        stays[:count] = 1
    elif isinstance(structure, NM):
        runs = stays.view(-1, structure.m)
        runs.scatter_(1, scores.view(-1, structure.m).topk(count, dim=1).indices, 1.0)
    else:
        stays[scores.topk(count).indices] = 1
    return stays
