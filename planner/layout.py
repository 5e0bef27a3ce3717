"""How units pass through operations that only move elements: reshapes, permutations, slices, joins, padding."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from planner.arithmetic import Part, combine, unknown
from planner.axes import Propagation, Track, Value, arg, kind, number, place, shape

Array = NDArray[Any]


def same(state: Propagation, node: Node) -> Value:
    """A function of each element alone that keeps zero."""
    return state.of(node.args[0])


def _compressed(track: Track) -> Track | None:
    """Return the track without the axes that it does not vary along; None if it varies along none."""
    for axis in track.axes:
        first = track.units.take([0], axis)
        if (track.units == first).all():
            track = Track(first, np.asarray(track.zero.all(axis=axis, keepdims=True)), track.promise)
    return track if track.axes else None


def moved(value: Value, move: Callable[[Track], Track]) -> Value:
    """Return the tracks that still vary after a move."""
    return tuple(track for track in (_compressed(move(old)) for old in value) if track is not None)


def permute(state: Propagation, node: Node) -> Value:
    """permute(dims)."""
    order: Any = arg(node, 1, "dims")
    return tuple(
        track.moved(lambda a: a.transpose([axis % a.ndim for axis in order])) for track in state.of(node.args[0])
    )


def transpose(state: Propagation, node: Node) -> Value:
    """transpose(dim0, dim1), t() and .mT."""
    a, b = (arg(node, 1, "dim0"), arg(node, 2, "dim1")) if len(node.args) > 1 else (-2, -1)
    return tuple(track.moved(lambda array: array.swapaxes(a, b)) for track in state.of(node.args[0]))


def movedim(state: Propagation, node: Node) -> Value:
    """movedim(source, destination)."""
    return tuple(t.moved(lambda a: np.moveaxis(a, node.args[1], node.args[2])) for t in state.of(node.args[0]))  # type: ignore[arg-type]


def reshape(state: Propagation, node: Node) -> Value:
    """Any change of shape that keeps the order of the elements."""
    source = node.args[0]
    before, after = shape(source), shape(node)
    segments = matched(before, after)
    out: list[tuple[Track, Track]] = []
    for track in sorted(state.of(source), key=lambda track: track.axes):
        new = _reshaped(track, before, after, [own for own in segments if set(own[0]).intersection(track.axes)])
        out += [(track, new)] if new is not None else []
    taken: set[int] = set()
    result = []
    for track, new in out:
        if taken.intersection(new.axes):  # the outermost stays
            state.freeze(track, f"axis merged with another that can be cut by {place(node)}")
        else:
            taken.update(new.axes)
            result.append(new)
    return tuple(result)


def _reshaped(
    track: Track, before: Sequence[int], after: Sequence[int], segments: Sequence[tuple[list[int], list[int]]]
) -> Track | None:
    """Return a track after a reshape of the runs of axes that it varies along."""
    touched, made = ({axis for own in segments for axis in own[side]} for side in (0, 1))
    form = [size if axis in made else 1 for axis, size in enumerate(after)]
    full = [size if axis in touched else 1 for axis, size in enumerate(before)]
    return _compressed(track.moved(lambda a: np.broadcast_to(a, full).reshape(form)))


def matched(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair runs of axes of two shapes whose products agree, e.g. (2,3,4)->(2,12): [([0],[0]), ([1,2],[1])]."""
    pairs, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(old), j + len(new)
        while (left := math.prod(before[k] for k in old)) != (right := math.prod(after[k] for k in new)):
            if left < right and i < len(before):
                old.append(i)
                i += 1
            else:
                new.append(j)
                j += 1
        pairs.append((old, new))
    return pairs


def expand(state: Propagation, node: Node) -> Value:
    """expand(sizes), broadcast_to and expand_as: new leading axes, and axes of length one repeated at will."""
    size = shape(node)
    dims, before = len(size), shape(node.args[0])
    value = moved(state.of(node.args[0]), lambda t: t.moved(lambda a: a.reshape((1,) * (dims - a.ndim) + a.shape)))
    before = (1,) * (dims - len(before)) + before
    repeated = []
    for axis in range(dims):
        if size[axis] > before[axis]:
            form = [-1 if i == axis else 1 for i in range(dims)]
            repeated.append(Track(state.fresh(size[axis]).reshape(form), np.zeros(size[axis], bool).reshape(form)))
    return (*value, *repeated)


def repeat(state: Propagation, node: Node) -> Value:
    """repeat(times) and tile."""
    times = tuple(
        number(n.meta["val"]) if isinstance(n, Node) else n for n in arg(node, 1, "repeats", arg(node, 1, "dims"))
    )
    dims = len(shape(node))
    times = (1,) * (dims - len(times)) + times

    def tiled(array: Array) -> Array:
        array = array.reshape((1,) * (dims - array.ndim) + array.shape)
        return np.tile(array, [n if size > 1 else 1 for n, size in zip(times, array.shape, strict=True)])

    return moved(state.of(node.args[0]), lambda t: t.moved(tiled))


def repeat_interleave(state: Propagation, node: Node) -> Value:
    """repeat_interleave(number, dim)."""
    times, dim = arg(node, 1, "repeats"), arg(node, 2, "dim")
    if not isinstance(times, int) or dim is None:
        return unknown(state, node)
    return moved(
        state.of(node.args[0]),
        lambda t: t.moved(lambda a: np.repeat(a, times if a.shape[dim] > 1 else 1, axis=dim)),
    )


def roll(state: Propagation, node: Node) -> Value:
    """roll(shifts, dims)."""
    shifts, dims = arg(node, 1, "shifts"), arg(node, 2, "dims")
    if not dims:
        return unknown(state, node)
    return tuple(t.moved(lambda a: np.roll(a, shifts, dims)) for t in state.of(node.args[0]))


def flip(state: Propagation, node: Node) -> Value:
    """flip(dims)."""
    return tuple(t.moved(lambda a: np.flip(a, arg(node, 1, "dims"))) for t in state.of(node.args[0]))


def picked(state: Propagation, node: Node, value: Value, move: Callable[[Array], Array]) -> Value:
    """Return the tracks of what `move` takes of a tensor; a unit that is taken alone has to stay."""
    out = []
    for whole in value:
        part = whole.moved(move)
        track = _compressed(part)
        if track is None:
            state.freeze(part, f"taken alone by {place(node)}")
        else:
            out.append(track)
    return tuple(out)


def _taken(state: Propagation, node: Node, axis: int, positions: slice) -> Value:
    """Return the tracks of some positions of an axis of a node's input."""

    def take(array: Array) -> Array:
        if array.shape[axis] == 1:
            return array
        return array[tuple(positions if i == axis % array.ndim else slice(None) for i in range(array.ndim))]

    return picked(state, node, state.of(node.args[0]), take)


def slices(state: Propagation, node: Node) -> Value:
    """x[..., start:end:step, ...] and narrow."""
    first, last, step = arg(node, 2, "start"), arg(node, 3, "end"), arg(node, 4, "step", 1)
    axis = arg(node, 1, "dim", 0)
    if kind(node) == "narrow":
        last = first + last
    if any(isinstance(bound, Node) for bound in (first, last)):
        first, last = (number(b.meta["val"]) if isinstance(b, Node) else b for b in (first, last))
    return _taken(state, node, axis, slice(first, last, step))


def select(state: Propagation, node: Node) -> Value:
    """x[..., index, ...]."""
    axis, index = arg(node, 1, "dim") % len(shape(node.args[0])), arg(node, 2, "index")
    return _without(state, node, axis, index)


def _without(state: Propagation, node: Node, axis: int, index: int) -> Value:
    return picked(state, node, state.of(node.args[0]), lambda a: a.take(index if a.shape[axis] > 1 else 0, axis))


def unbind(state: Propagation, node: Node) -> list[Value]:
    """unbind(dim): a tuple of selections."""
    axis, size = arg(node, 1, "dim", 0), shape(node.args[0])
    return [_without(state, node, axis % len(size), index) for index in range(size[axis])]


def split(state: Propagation, node: Node) -> list[Value]:
    """split, split_with_sizes, chunk and tensor_split: a tuple of runs."""
    axis, parts, out, first = arg(node, 2, "dim", 0), node.meta["val"], [], 0
    for piece in parts:
        length = number(piece.shape[axis])
        out.append(_taken(state, node, axis, slice(first, first + length)))
        first += length
    return out


def item(state: Propagation, node: Node) -> Value:
    """An element of a tuple."""
    whole: Any = node.args[0]
    index: Any = node.args[1]
    found = state.values.get(whole, [])
    return found[index] if isinstance(found, list) and found else ()


def cat(state: Propagation, node: Node) -> Value:
    """Join along an axis that the tensors have; their other axes are tied."""
    tensors: Any = [t for t in arg(node, 0, "tensors") if 0 not in shape(t)]
    return _joined(state, node, tensors, [(state.of(t), shape(t)) for t in tensors])


def stack(state: Propagation, node: Node) -> Value:
    """Join along a new axis."""
    axis, tensors = arg(node, 1, "dim", 0) % len(shape(node)), arg(node, 0, "tensors")
    parts = []
    for tensor in tensors:
        size = shape(tensor)
        value = tuple(t.moved(lambda a: np.expand_dims(a, axis)) for t in state.of(tensor))
        parts.append((value, (*size[:axis], 1, *size[axis:])))
    return _joined(state, node, tensors, parts)


def _joined(state: Propagation, node: Node, tensors: Sequence[Node], parts: Sequence[Part]) -> Value:
    dims = len(shape(node))
    axis = arg(node, 1, "dim", 0) % dims
    lines, others = [], []
    crossed = [next((t.axes for t in value if axis in t.axes), (axis,)) for value, _ in parts]
    alike = len(set(crossed)) == 1
    every = all(any(axis in t.axes for t in value) for value, _ in parts)
    for value, size in parts:
        prefer = [axis] if every else [other for other in range(dims) if other != axis]
        single = [state.settle(t if alike or axis not in t.axes else state.single(t, prefer)) for t in value]
        lines.append(next((t for t in single if axis in t.axes), None))
        others.append((tuple(t for t in single if axis not in t.axes), (*size[:axis], 1, *size[axis + 1 :])))
    rest = combine(state, node, others, product=False)
    if all(line is None for line in lines):
        return rest
    form = [-1 if i == axis else 1 for i in range(dims)]
    wide = np.broadcast_shapes(
        *[(*line.units.shape[:axis], 1, *line.units.shape[axis + 1 :]) for line in lines if line]
    )
    pieces = [
        (line.units, line.zero) if line else _kept_whole(state, node, size[axis], form)
        for line, (_, size) in zip(lines, parts, strict=True)
    ]

    def whole(array: Array) -> Array:
        return np.broadcast_to(array, [array.shape[i] if i == axis else n for i, n in enumerate(wide)])

    units, zero = (np.concatenate([whole(a) for a in arrays], axis) for arrays in zip(*pieces, strict=True))
    return (*rest, Track(units, zero))


def _kept_whole(state: Propagation, node: Node, length: int, form: Sequence[int]) -> tuple[Array, Array]:
    """Return units for elements that nobody cuts, which are frozen."""
    units = state.fresh(length).reshape(form)
    state.freeze(units, f"not cut before {place(node)}")
    return units, np.zeros_like(units, dtype=bool)


def pad(state: Propagation, node: Node) -> Value:
    """Padding: what is added to an axis that can be cut are zeros with units of their own."""
    amounts: Any = node.args[1]
    is_pad = kind(node) == "pad"
    constant = not is_pad or arg(node, 2, "mode", "constant") == "constant"
    blank = constant and not arg(node, 3 if is_pad else 2, "value")
    out = []
    for whole in state.of(node.args[0]):
        dims = whole.units.ndim
        width = {
            dims - 1 - i // 2: tuple(amounts[i : i + 2]) for i in range(0, len(amounts), 2) if any(amounts[i : i + 2])
        }
        track = state.single(whole, [axis for axis in whole.axes if axis in width])
        (axis,) = track.axes
        if axis not in width:
            out.append(track if blank or not constant else Track(track.units, np.zeros_like(track.zero)))
        elif not constant or min(width[axis]) < 0:
            state.freeze(track, f"padded by {place(node)}")
        else:
            out.append(_padded(state, state.settle(track), axis, width[axis], blank))
    return tuple(out)


def _padded(state: Propagation, track: Track, axis: int, width: tuple[int, ...], blank: bool) -> Track:
    def around(array: Array, make: Callable[[int], Array]) -> Array:
        form = [-1 if i == axis else 1 for i in range(array.ndim)]
        return np.concatenate([make(width[0]).reshape(form), array, make(width[1]).reshape(form)], axis)

    return Track(around(track.units, state.fresh), around(track.zero, lambda n: np.full(n, blank)))


def pixel_shuffle(state: Propagation, node: Node) -> Value:
    """pixel_shuffle: the r² channels of one pixel are one group."""
    r, size = arg(node, 1, "upscale_factor"), shape(node.args[0])
    out = []
    for whole in state.of(node.args[0]):
        track = state.single(whole, [len(size) - 3])
        if track.axes[0] == len(size) - 3:
            blocks = track.moved(lambda a: a.reshape(-1, r * r))
            state.tie(blocks.units, blocks.units[:, :1])
            form = [-1 if i == len(size) - 3 else 1 for i in range(len(size))]
            track = Track(blocks.units[:, 0].reshape(form), np.asarray(blocks.zero.all(1)).reshape(form), track.promise)
            out += [track] if track.axes else []
        elif track.axes[0] < len(size) - 3:
            out.append(track)
        else:
            state.freeze(track, f"axis mixed by {place(node)}")
    return tuple(out)


def pixel_unshuffle(state: Propagation, node: Node) -> Value:
    """pixel_unshuffle: a channel becomes r² of them."""
    r, dims, out = arg(node, 1, "downscale_factor"), len(shape(node)), []
    for whole in state.of(node.args[0]):
        track = state.single(whole, [dims - 3])
        if track.axes[0] > dims - 3:
            state.freeze(track, f"axis mixed by {place(node)}")
        else:
            times = r * r if track.axes[0] == dims - 3 else 1
            out.append(track.moved(lambda a: np.repeat(a, times, axis=dims - 3)))  # noqa: B023
    return tuple(out)
