"""What stays of a tensor when channels leave: on each axis, the places that it had, followed through operations.

Every function takes shapes of dense tensors and what is kept of those that an operation reads, and returns what is kept
of the one that it makes; BuildError where that is no whole rows and columns.
"""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from profiles.errors import BuildError

__all__ = ["Kept", "Shape", "along", "cut_to", "joined", "lengths", "reshaped", "whole"]

Shape = tuple[int, ...]
Kept = tuple[NDArray[np.int64], ...]


def whole(shape: Shape) -> Kept:
    """Return that all of a tensor is kept."""
    return tuple(map(np.arange, shape))


def lengths(kept: Kept) -> list[int]:
    """Return the shape of what is left."""
    return [len(axis) for axis in kept]


def along(made: Shape, operands: Sequence[tuple[Shape, Kept]]) -> Kept:
    """Follow an operation whose operands are aligned at their last axes: an axis that keeps its length keeps places."""
    if any(len(shape) > len(made) for shape, _ in operands):
        raise BuildError("an operation that drops axes is not one of aligned operands")
    result = []
    for axis in range(-len(made), 0):
        found: NDArray[np.int64] | None = None
        for shape, kept in operands:
            if -axis > len(shape):
                continue
            if shape[axis] != made[axis]:
                if made[axis] != 1 and len(kept[axis]) != shape[axis]:
                    raise BuildError(f"an axis of {shape[axis]} that becomes {made[axis]} cannot lose places")
            elif found is None:
                found = kept[axis]
            elif not np.array_equal(found, kept[axis]):
                raise BuildError(f"{len(found)} channels meet {len(kept[axis])} others")
        result.append(np.arange(made[axis]) if found is None else found)
    return tuple(result)


def cut_to(made: Shape, kept: Kept, constant: Shape) -> Kept:
    """Return what is kept of a constant that such an operation reads, whose result is kept so."""
    axes = range(-len(constant), 0)
    if any(constant[axis] not in (1, made[axis]) for axis in axes):
        raise BuildError(f"a constant of {constant} is no operand of {made}")
    return tuple(kept[axis] if constant[axis] == made[axis] else np.arange(1) for axis in axes)


def joined(axis: int, operands: Sequence[tuple[Shape, Kept]]) -> Kept:
    """Follow a concatenation."""
    first, places, start = operands[0][1], [], 0
    for shape, kept in operands:
        if not all(np.array_equal(a, b) for i, (a, b) in enumerate(zip(first, kept, strict=True)) if i != axis):
            raise BuildError("what is joined has lost different channels")
        places.append(start + kept[axis])
        start += shape[axis]
    return (*first[:axis], np.concatenate(places), *first[axis + 1 :])


def reshaped(old: Shape, kept: Kept, made: Shape) -> Kept:
    """Follow a reshape: what is left of axes that it unites or splits must be whole rows of the new axes."""
    result: list[NDArray[np.int64]] = []
    for before, after in _runs(old, made):
        sizes, shape = [old[axis] for axis in before], tuple(made[axis] for axis in after)
        if all(len(kept[axis]) == old[axis] for axis in before):
            result += whole(shape)
            continue
        grid = np.meshgrid(*(kept[axis] for axis in before), indexing="ij")
        places = np.unravel_index(np.ravel_multi_index([each.ravel() for each in grid], sizes), shape)
        own = [np.unique(each) for each in places]
        if prod(map(len, own)) != grid[0].size:
            raise BuildError(f"a reshape from {tuple(sizes)} to {shape} leaves no rows and columns")
        result += own
    return tuple(result)


def _runs(old: Shape, made: Shape) -> Iterator[tuple[range, range]]:
    """Yield the shortest runs of axes of equal size on both sides, in order."""
    start, end = 0, 0
    while start < len(old) or end < len(made):
        first, second, left, right = start, end, 1, 1
        while (start, end) == (first, second) or left != right:
            if left <= right and start < len(old):
                left, start = left * old[start], start + 1
            else:
                right, end = right * made[end], end + 1
        yield range(first, start), range(second, end)
