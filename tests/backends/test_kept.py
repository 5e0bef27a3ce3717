"""What is kept of tensors follows what NumPy does to those that are cut before; memory of tensors does not overlap."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.kept import Kept, Shape, along, cut_to, joined, lengths, reshaped, whole
from backends.remainder import offsets
from profiles.errors import BuildError

SHAPE = (1, 5, 6)
KEPT = (np.arange(1), np.array([0, 1, 2, 3, 4]), np.array([0, 1, 4, 5]))


def numbered(shape: Shape) -> NDArray[Any]:
    return np.arange(np.prod(shape)).reshape(shape)


@pytest.mark.parametrize(
    ("made", "follow"),
    [
        ((1, 5, 2, 3), lambda x: x.reshape(1, 5, 2, 2)),
        ((5, 6), lambda x: x.reshape(5, 4)),
        ((1, 30), lambda x: x.reshape(1, 20)),
        ((1, 5, 6, 1, 1), lambda x: x.reshape(1, 5, 4, 1, 1)),
        ((5, 1, 2, 3), lambda x: x.reshape(5, 1, 2, 2)),
    ],
)
def test_a_reshape_keeps_the_elements_that_the_cut_tensor_has(
    made: Shape, follow: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    runs = (*KEPT[:2], np.array([0, 1, 3, 4]))  # two of each three
    expected = follow(numbered(SHAPE)[np.ix_(*runs)])
    found = numbered(SHAPE).reshape(made)[np.ix_(*reshaped(SHAPE, runs, made))]
    assert np.array_equal(found, expected)


def test_a_reshape_that_leaves_no_rows_and_columns_is_refused() -> None:
    with pytest.raises(BuildError, match=r"a reshape from \(6,\) to \(2, 3\) leaves no rows and columns"):
        reshaped((6,), (np.arange(5),), (2, 3))


def test_operands_are_aligned_at_their_last_axes_and_reduced_axes_are_whole() -> None:
    scale = ((6,), (KEPT[2],))
    assert lengths(along(SHAPE, [(SHAPE, KEPT), scale])) == [1, 5, 4]
    assert lengths(along((1, 5, 1), [(SHAPE, KEPT)])) == [1, 5, 1]
    assert lengths(cut_to(SHAPE, KEPT, (1, 6))) == [1, 4]
    with pytest.raises(BuildError, match="4 channels meet 6 others"):
        along(SHAPE, [(SHAPE, KEPT), (SHAPE, whole(SHAPE))])
    with pytest.raises(BuildError, match="an axis of 6 that becomes 3 cannot lose places"):
        along((1, 5, 3), [(SHAPE, KEPT)])
    with pytest.raises(BuildError, match="drops axes"):
        along((1, 5), [(SHAPE, KEPT)])
    with pytest.raises(BuildError, match="is no operand of"):
        cut_to(SHAPE, KEPT, (5,))


def test_a_concatenation_keeps_what_its_parts_keep() -> None:
    other: tuple[Shape, Kept] = ((1, 5, 3), (np.arange(1), np.arange(5), np.array([2])))
    found = joined(2, [(SHAPE, KEPT), other])
    assert found[2].tolist() == [0, 1, 4, 5, 8]
    with pytest.raises(BuildError, match="has lost different channels"):
        joined(1, [(SHAPE, KEPT), other])


def test_tensors_that_are_there_at_once_do_not_overlap() -> None:
    random = np.random.default_rng(0)
    sizes = [int(size) for size in 16 * random.integers(1, 40, 60)]
    spans = [(int(first), int(first + length)) for first, length in random.integers(0, 12, (60, 2))]
    places = offsets(sizes, spans)
    for a in range(60):
        for b in range(a):
            at_once = spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]
            apart = places[a] + sizes[a] <= places[b] or places[b] + sizes[b] <= places[a]
            assert apart or not at_once
    most = max(sum(s for s, (first, last) in zip(sizes, spans, strict=True) if first <= t <= last) for t in range(24))
    assert most <= max(map(sum, zip(places, sizes, strict=True))) < 1.5 * most  # close to what must be there at once
