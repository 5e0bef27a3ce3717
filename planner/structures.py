"""Structures: each says which weights form a group, as integer group-id maps over parameters, and nothing else."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.blocks import Block
from planner.graph import Width


@dataclass(frozen=True)
class Filter:
    """The channels of one width: filters, biases, and the normalisation's scale and shift, of all tied producers."""

    width: Width

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
class Depth:
    """One residual block: the scale and shift that end its body, so that zeros leave the bare shortcut."""

    block: Block

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


Structure = Filter | Depth
"""The closed set of structures."""
