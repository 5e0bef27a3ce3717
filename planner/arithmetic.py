"""How units pass through arithmetic: elementwise combination, contraction (matmul, einsum) and reduction."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from planner.axes import Propagation, Track, Value, arg, kind, place, shape

Part = tuple[Value, tuple[int, ...]]  # an operand's tracks and shape
Operand = tuple[Value, tuple[int, ...], Sequence[str | None]]  # the same with a letter per axis; None: mixed


def part(state: Propagation, argument: object) -> Part:
    """Return an operand of an elementwise operation."""
    return state.of(argument), shape(argument)


def combine(state: Propagation, node: Node, parts: Sequence[Part], *, product: bool) -> Value:
    """Return the tracks of an elementwise function of broadcast tensors: a product of them, or a sum.

    Elements that meet are tied. A product is zero where any factor is, a sum where all terms are.
    """
    dims = max((len(size) for _, size in parts), default=0)
    tracks = [[_aligned(track, dims) for track in value] for value, _ in parts]
    sizes = [(1,) * (dims - len(size)) + size for _, size in parts]
    out: list[Track] = []
    while any(tracks):
        seed = next(own[0] for own in tracks if own)
        found, axes = _cluster(tracks, seed.axes)
        joint = any(len(track.axes) > 1 for track in found if track)
        fixed = {a for a in axes for size, track in zip(sizes, found, strict=True) if size[a] > 1 and not _on(track, a)}
        for own, track in zip(tracks, found, strict=True):
            own[:] = [t for t in own if t is not track]
        if joint and (fixed or len({track.axes for track in found if track}) > 1):
            free = [axis for axis in axes if axis not in fixed]
            for own, track in zip(tracks, found, strict=True):
                own += [state.single(track, free)] if track else []
        elif fixed:
            for track in filter(None, found):
                state.freeze(track, f"meets an axis that is not cut, {place(node)}")
        else:
            out.append(_met(state, found, product=product))
    return tuple(out)


def _on(track: Track | None, axis: int) -> bool:
    return track is not None and axis in track.axes


def _aligned(track: Track, dims: int) -> Track:
    return track.moved(lambda array: array.reshape((1,) * (dims - array.ndim) + array.shape))


def _cluster(tracks: Sequence[Sequence[Track]], axes: tuple[int, ...]) -> tuple[list[Track | None], list[int]]:
    """Return for each operand its first track that overlaps with the others', and all their axes."""
    reached = set(axes)
    while True:
        found = [next((t for t in own if reached.intersection(t.axes)), None) for own in tracks]
        more = reached.union(*(t.axes for t in found if t))
        if more == reached:
            return found, sorted(reached)
        reached = more


def _met(state: Propagation, found: Sequence[Track | None], *, product: bool) -> Track:
    """Return the one track of elements that meet."""
    present = [track for track in found if track is not None]
    first = present[0]
    for other in present[1:]:
        state.tie(first.units, other.units)
    if product:
        return Track(first.units, any_zero(state, present))
    if len(present) < len(found):  # what is broadcast over the units is not zero
        return Track(first.units, np.zeros_like(first.zero))
    zero = np.logical_and.reduce([track.zero for track in present])
    if zero.any():
        for track in present:
            state.settle(track)
    return Track(first.units, zero)


def any_zero(state: Propagation, tracks: Sequence[Track]) -> NDArray[np.bool_]:
    """Return where the product of tracks is zero; penalises parameters only where the others are not zero already."""
    given = np.logical_or.reduce([t.zero for t in tracks if not t.promise] or [np.zeros_like(tracks[0].zero)])
    if np.all(given):
        return np.asarray(given)
    for track in tracks:
        state.settle(track)
    return np.asarray(np.logical_or.reduce([track.zero for track in tracks]))


def contract(
    state: Propagation, node: Node, operands: Sequence[Operand], out: Sequence[str | None], *, made: str | None = None
) -> Value:
    """Return the tracks of a sum of products over all letters that are not in `out`, as of einsum.

    The letter `made`, and those that only a parameter has, are the channels that the operation produces.
    """
    dims = len(out)
    result: list[Track] = []
    lines = [_lines(state, node, operand, out) for operand in operands]
    for letter in dict.fromkeys(letter for _, _, letters in operands for letter in letters if letter):
        held = [
            (lines[i].get(letter), size[list(letters).index(letter)])
            for i, (_, size, letters) in enumerate(operands)
            if letter in letters
        ]
        wide = [track for track, size in held if size > 1]
        present = [track for track in wide if track is not None]
        if letter not in out:
            state.reading |= {axis for track in present for axis in track.promise}
        if not present:
            continue
        if len(present) < len(wide):
            for track in present:
                state.freeze(track, f"meets an axis that is not cut, {place(node)}")
            continue
        track = _product(state, present)
        if letter == made or (len(present) == 1 and present[0].promise and letter in out):
            state.make(track.units, node)
        if letter in out:
            result.append(track.moved(lambda a: a.reshape([-1 if out[i] == letter else 1 for i in range(dims)])))  # noqa: B023
        elif not track.zero.all():
            state.freeze(track, f"summed over by {place(node)}, though not zero")
    return tuple(result)


def _lines(state: Propagation, node: Node, operand: Operand, out: Sequence[str | None]) -> dict[str, Track]:
    """Return the tracks of an operand by letter, each one-dimensional."""
    value, _, letters = operand
    found: dict[str, Track] = {}
    kept = [axis for axis, letter in enumerate(letters) if letter is not None and letter in out]
    for whole in value:
        track = state.single(whole, kept)
        (axis,) = track.axes
        letter = letters[axis]
        if letter is None:
            state.freeze(whole, f"axis mixed by {place(node)}")
        else:
            found[letter] = track.moved(lambda array: array.reshape(-1))
    return found


def _product(state: Propagation, present: Sequence[Track]) -> Track:
    for other in present[1:]:
        state.tie(present[0].units, other.units)
    return Track(present[0].units, any_zero(state, present))


_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def matmul(state: Propagation, node: Node) -> Value:
    """`a @ b` with broadcast batch axes, and torch.bmm and mm."""
    left, right = node.args[:2]
    a, b = shape(left), shape(right)
    if len(a) < 2 or len(b) < 2:
        return unknown(state, node)
    batch = _LETTERS[: max(len(a), len(b)) - 2]
    first, second = [*batch[len(batch) - len(a) + 2 :], "X", "Y"], [*batch[len(batch) - len(b) + 2 :], "Y", "Z"]
    operands = [(state.of(left), a, first), (state.of(right), b, second)]
    return contract(state, node, operands, [*batch, "X", "Z"])


def addmm(state: Propagation, node: Node) -> Value:
    """`bias + a @ b`."""
    bias, left, right = node.args[:3]
    operands = [(state.of(left), shape(left), "XY"), (state.of(right), shape(right), "YZ")]
    return biased(state, node, contract(state, node, operands, "XZ"), bias)


def baddbmm(state: Propagation, node: Node) -> Value:
    """`input + a @ b` over a batch."""
    given, left, right = node.args[:3]
    operands = [(state.of(left), shape(left), "bXY"), (state.of(right), shape(right), "bYZ")]
    product = contract(state, node, operands, "bXZ")
    return combine(state, node, [(product, shape(node)), part(state, given)], product=False)


def biased(state: Propagation, node: Node, value: Value, bias: object, axis: int = -1) -> Value:
    """Return the tracks of a value plus a bias along one axis."""
    if not isinstance(bias, Node):
        return value
    size, (length,) = shape(node), shape(bias)[-1:]
    form = [length if i == axis % len(size) else 1 for i in range(len(size))]
    spread = tuple(t.moved(lambda a: np.broadcast_to(a.reshape(-1), length).reshape(form)) for t in state.of(bias))
    return combine(state, node, [(value, size), (spread, tuple(form))], product=False)


def einsum(state: Propagation, node: Node) -> Value:
    """torch.einsum without repeated letters in one operand; "..." stands for the leading axes."""
    equation, tensors = str(node.args[0]).replace(" ", ""), arg(node, 1, "operands")
    given, _, wanted = equation.partition("->")
    letters = given.split(",")
    if "->" not in equation or any(len(set(own)) < len(own.replace(".", "")) for own in letters):
        return unknown(state, node)
    spread = max(
        (len(shape(t)) - len(own.replace("...", "")) for t, own in zip(tensors, letters, strict=True)), default=0
    )
    dots = "0123456789"[:spread]

    def full(own: str, tensor: object = None) -> str:
        count = spread if tensor is None else len(shape(tensor)) - len(own.replace("...", ""))
        return own.replace("...", dots[len(dots) - count :] if count else "")

    operands = [(state.of(t), shape(t), full(own, t)) for t, own in zip(tensors, letters, strict=True)]
    return contract(state, node, operands, full(wanted))


def reduce(state: Propagation, node: Node) -> Value:
    """A sum, mean, norm or extremum over axes: exact over a cut axis where its elements are zero and it is a sum.

    A mean divides by the length of the axis, which is put right in the rebuild.
    """
    name = kind(node)
    value, size = state.of(node.args[0]), shape(node.args[0])
    index = 2 if name == "linalg_vector_norm" else 1
    dims = arg(node, index, "dim")
    wanted = [dims] if isinstance(dims, int) else dims or range(len(size))  # none named: all
    gone = {dim % len(size) for dim in wanted}
    keeps = len(shape(node)) == len(size)
    out = []
    for whole in value:
        track = state.single(whole, [axis for axis in range(len(size)) if axis not in gone])
        (axis,) = track.axes
        if axis not in gone:
            out.append(track if keeps else track.moved(lambda a: a.squeeze(tuple(gone))))
        elif name in ("sum", "linalg_vector_norm", "mean") and state.settle(track).zero.all():
            if name == "mean":
                state.counted.append((node, track.along(axis)))
        else:
            state.freeze(track, f"reduced over by {place(node)}")
    return tuple(out)


def cosine_similarity(state: Propagation, node: Node) -> Value:
    """cosine_similarity(a, b, dim): exact over a cut axis where the elements of both are zero."""
    parts = [part(state, a) for a in node.args[:2]]
    dims = max(len(size) for _, size in parts)
    axis = arg(node, 2, "dim", 1) % dims
    out = []
    for whole in combine(state, node, parts, product=False):
        track = state.single(whole, [other for other in range(dims) if other != axis])
        if axis not in track.axes:
            out.append(Track(track.units.squeeze(axis), np.zeros_like(track.zero.squeeze(axis))))
        elif not state.settle(track).zero.all():
            state.freeze(track, f"reduced over by {place(node)}")
    return tuple(out)


def outer(state: Propagation, node: Node) -> Value:
    """outer(a, b)."""
    left, right = node.args[:2]
    operands = [(state.of(left), shape(left), "a"), (state.of(right), shape(right), "b")]
    return contract(state, node, operands, "ab")


def along(state: Propagation, node: Node) -> Value:
    """A softmax or cumulative sum: its elements depend on others along one axis; no softmax is zero."""
    axis = arg(node, 1, "dim") % len(shape(node))
    out = []
    for whole in state.of(node.args[0]):
        track = state.single(whole, [other for other in range(len(shape(node))) if other != axis])
        if axis in track.axes:
            state.freeze(track, f"mixed along the axis by {place(node)}")
        else:
            out.append(track if kind(node).startswith("cum") else Track(track.units, np.zeros_like(track.zero)))
    return tuple(out)


def unknown(state: Propagation, node: Node) -> Value:
    """Freeze every unit that reaches an operation which is not understood."""
    for argument in node.all_input_nodes:
        found: Any = state.of(argument) or state.values.get(argument, ())
        for value in found if isinstance(found, list) else [found]:
            for track in value:
                state.freeze(track, f"reaches {place(node)}, which is not followed")
    return ()
