"""How units pass through layers of channels: convolutions, normalisations, pooling, activations."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from planner.arithmetic import Operand, any_zero, biased, combine, contract, part, unknown
from planner.axes import Propagation, Track, Value, arg, kind, number, place, shape
from planner.layout import picked


def linear(state: Propagation, node: Node) -> Value:
    """`x @ weight.T + bias`."""
    source, weight = node.args[:2]
    size = shape(source)
    batch = [str(axis) for axis in range(len(size) - 1)]
    operands = [(state.of(source), size, [*batch, "in"]), (state.of(weight), shape(weight), ["out", "in"])]
    return biased(state, node, contract(state, node, operands, [*batch, "out"], made="out"), arg(node, 2, "bias"))


def convolution(state: Propagation, node: Node) -> Value:
    """Convolutions of one to three dimensions, transposed or not; grouped ones are cut by whole groups."""
    source, weight = node.args[:2]
    transposed = kind(node).startswith("conv_transpose")
    groups = number(arg(node, 6, "groups", 1))
    size, form = shape(source), shape(weight)
    if groups > 1:
        return _grouped(state, node, groups, transposed)
    axis = len(size) - len(form) + 1
    spatial: list[str | None] = [None] * (len(form) - 2)
    letters = ["in", "out"] if transposed else ["out", "in"]
    batch = ["n"] * axis
    operands: list[Operand] = [
        (state.of(source), size, [*batch, "in", *spatial]),
        (state.of(weight), form, [*letters, *spatial]),
    ]
    found = contract(state, node, operands, [*batch, "out", *spatial], made="out")
    return biased(state, node, found, arg(node, 2, "bias"), axis)


def _grouped(state: Propagation, node: Node, groups: int, transposed: bool) -> Value:
    """The channels of one group, into and out of it, are one unit; a depthwise convolution has groups of one."""
    source, weight, bias = node.args[0], node.args[1], arg(node, 2, "bias")
    size = shape(source)
    axis = len(size) - len(shape(weight)) + 1
    channels = _only(state, node, axis)
    filters = [track for track in state.of(weight) if track.axes == (0,)]
    if channels is None or not filters:
        for track in [*filters, *([channels] if channels else [])]:
            state.freeze(track, f"grouped by {place(node)}")
        return ()
    into = channels.along(axis).reshape(groups, -1)
    state.tie(into, into[:, :1])
    state.tie(filters[0].along(0).reshape(groups, -1), into[:, :1])
    outputs = shape(node)[axis]
    units = np.repeat(into[:, 0], outputs // groups)
    zero = any_zero(state, [_lengthened(channels, axis, outputs), _lengthened(filters[0], 0, outputs)])
    state.settle(filters[0])
    form = [-1 if i == axis else 1 for i in range(len(size))]
    return biased(state, node, (Track(units.reshape(form), zero.reshape(form)),), bias, axis)


def _lengthened(track: Track, axis: int, length: int) -> Track:
    """Return a track of `length` elements with the zeros of a shorter or longer one, group by group."""
    zero = np.full(length, bool(track.zero.all()))
    return Track(np.resize(track.along(axis), length), zero, track.promise)


def _only(state: Propagation, node: Node, axis: int) -> Track | None:
    """Return the track of one axis of a node's input; those of its other axes, which the node mixes, are frozen."""
    found = None
    for whole in state.of(node.args[0]):
        track = state.single(whole, [axis])
        if track.axes[0] == axis:
            found = track
        elif track.axes[0] > axis:
            state.freeze(track, f"axis mixed by {place(node)}")
    return found


def batch_norm(state: Propagation, node: Node) -> Value:
    """Batch and instance normalisation, a channel at a time: zero once its scale and shift are."""
    return _per_channel(state, node, node.args[1:5], running=kind(node) == "batch_norm")


def group_norm(state: Propagation, node: Node) -> Value:
    """Group normalisation: the channels that are normalised together are one unit."""
    groups, channels = arg(node, 1, "num_groups"), _only(state, node, 1)
    if channels is not None:
        rows = channels.along(1).reshape(groups, -1)
        if groups == 1 and not state.lossy:
            state.freeze(channels, f"normalised over by {place(node)}")
            for argument in node.args[2:4]:
                for track in state.of(argument):
                    state.freeze(track, f"normalised over by {place(node)}")
            return ()
        if groups > 1:
            state.tie(rows, rows[:, :1])
        else:
            state.inexact.append((rows.reshape(-1), f"normalised over by {place(node)}"))
    return _per_channel(state, node, node.args[2:4], running=False)


def _per_channel(state: Propagation, node: Node, parameters: Sequence[object], *, running: bool) -> Value:
    channels = _only(state, node, 1)
    size = shape(node)
    form = [-1 if i == 1 else 1 for i in range(len(size))]
    owned = [state.of(p) for p in parameters if isinstance(p, Node)]
    tracks = [track for value in owned for track in value]
    if channels is None:
        for track in tracks:
            state.freeze(track, f"meets an axis that is not cut, {place(node)}")
        return ()
    for track in tracks:
        state.tie(channels.units, track.units.reshape(form))
    learned = [track for track in tracks if track.promise]
    whole = all(isinstance(p, Node) for p in parameters[:2])
    for track in learned:
        state.settle(track)
    if whole:
        return (Track(channels.units, np.full(channels.zero.shape, len(learned) == 2)),)
    zero = channels.zero if not running and not whole else np.zeros_like(channels.zero)
    return (state.settle(Track(channels.units, zero, channels.promise)),)


def layer_norm(state: Propagation, node: Node) -> Value:
    """layer_norm and rms_norm over the last axes; a cut axis among them is exact for rms_norm alone."""
    over: Any = arg(node, 1, "normalized_shape")
    size, square = shape(node), kind(node) == "rms_norm"
    first = len(size) - len(over)
    given = [arg(node, 2, "weight")] + ([] if square else [arg(node, 3, "bias")])
    parameters = [p for p in given if isinstance(p, Node)]
    stay, out = [], []
    for whole in state.of(node.args[0]):
        track = state.single(whole, range(first))
        if track.axes[0] < first:
            zero = track.zero if square or len(parameters) < 2 else np.zeros_like(track.zero)
            out.append(state.settle(Track(track.units, zero, track.promise)))
        elif square and state.settle(track).zero.all():
            state.counted.append((node, track.along(track.axes[0])))
            stay.append(track)
        elif state.lossy:
            state.inexact.append((track.along(track.axes[0]), f"normalised over by {place(node)}"))
            stay.append(Track(track.units, np.zeros_like(track.zero)))
        else:
            state.freeze(track, f"normalised over by {place(node)}")
    parts = [(tuple(stay), (*[1] * first, *size[first:]))]
    scaled = combine(state, node, [*parts, *[part(state, p) for p in parameters[:1]]], product=True)
    if len(parameters) == 2:
        scaled = combine(
            state, node, [(scaled, (*[1] * first, *size[first:])), part(state, parameters[1])], product=False
        )
    return (*out, *scaled)


def pool(state: Propagation, node: Node) -> Any:
    """Pooling and interpolation of the last axes."""
    spatial = next((int(digit) for digit in "123" if f"{digit}d" in kind(node)), 2)
    if kind(node).endswith("linear1d"):
        spatial = 1
    first, out = len(shape(node.args[0])) - spatial, []
    for whole in state.of(node.args[0]):
        track = state.single(whole, range(first))
        if track.axes[0] >= first:
            state.freeze(track, f"axis mixed by {place(node)}")
        else:
            out.append(track)
    return tuple(out) if shape(node) else [tuple(out)] * len(node.meta["val"])


def glu(state: Propagation, node: Node) -> Value:
    """`a * sigmoid(b)` of the two halves of an axis."""
    axis, size = arg(node, 1, "dim", -1), shape(node.args[0])
    half = size[axis] // 2

    def half_of(first: int) -> Value:
        def take(a: Any) -> Any:
            return a.take(range(first, first + half), axis) if a.shape[axis] > 1 else a

        return picked(state, node, state.of(node.args[0]), take)

    gate = tuple(Track(t.units, np.zeros_like(t.zero)) for t in half_of(half))
    form = shape(node)
    return combine(state, node, [(half_of(0), form), (gate, form)], product=True)


def prelu(state: Propagation, node: Node) -> Value:
    """PReLU: a slope per channel goes with it; zero stays zero."""
    value, size = state.of(node.args[0]), shape(node)
    slopes = shape(node.args[1])
    form = tuple(slopes[0] if i == 1 and len(slopes) else 1 for i in range(len(size)))
    spread = tuple(
        t.moved(lambda a: a.reshape([-1 if i == 1 else 1 for i in range(len(size))])) for t in state.of(node.args[1])
    )
    return combine(
        state, node, [(value, size), (tuple(Track(t.units, np.zeros_like(t.zero)) for t in spread), form)], product=True
    )


def elementwise(*, product: bool, scalar_zero: bool = False) -> Callable[[Propagation, Node], Value]:
    """Return the rule of an elementwise function of several tensors; numbers count as terms that are not zero."""

    def rule(state: Propagation, node: Node) -> Value:
        parts = [
            part(state, a) for a in node.args[:2] if isinstance(a, Node) and shape(a) is not None and _is_tensor(a)
        ]
        if len(parts) < 2 and not product and not scalar_zero:
            others = [a for a in node.args[:2] if not (isinstance(a, Node) and _is_tensor(a))]
            parts += [] if others and others[0] == 0 else [((), ())]
        return combine(state, node, parts, product=product)

    return rule


def _is_tensor(node: Node) -> bool:
    return hasattr(node.meta.get("val"), "shape")


def divide(state: Propagation, node: Node) -> Value:
    """`a / b`: zero where a is, if b is not zero there."""
    top, bottom = node.args[:2]
    below = state.of(bottom)
    for track in below:
        if track.zero.any() and not track.promise:
            state.freeze(track, f"divided by at {place(node)}, where it would be zero")
    blunt = tuple(Track(t.units, np.zeros_like(t.zero)) for t in below)
    parts = [part(state, top), *([(blunt, shape(bottom))] if isinstance(bottom, Node) else [])]
    return combine(state, node, parts if state.of(top) or below else [], product=True)


def where(state: Propagation, node: Node) -> Value:
    """where(condition, a, b): zero where both are."""
    condition, a, b = node.args[:3]
    parts = [part(state, x) if isinstance(x, Node) else ((), ()) for x in (a, b)]
    chosen = combine(state, node, parts, product=False)
    mask = tuple(Track(t.units, np.zeros_like(t.zero)) for t in state.of(condition))
    return combine(state, node, [(chosen, shape(node)), (mask, shape(condition))], product=True)


def masked_fill(state: Propagation, node: Node) -> Value:
    """masked_fill(x, mask, value): zero where x is, if the value is."""
    mask = tuple(Track(t.units, np.zeros_like(t.zero)) for t in state.of(node.args[1]))
    value = combine(state, node, [part(state, node.args[0]), (mask, shape(node.args[1]))], product=True)
    filled = node.args[2]
    return value if not isinstance(filled, Node) and not filled else blunted(value)


def blunted(value: Value) -> Value:
    """Return the tracks of a function of each element that does not keep zero."""
    return tuple(Track(track.units, np.zeros_like(track.zero)) for track in value)


def blank(state: Propagation, node: Node) -> Value:
    """zeros_like: of the size of another tensor."""
    return tuple(Track(track.units, np.ones_like(track.zero)) for track in state.of(node.args[0]))


def weight_norm(state: Propagation, node: Node) -> Value:
    """`g * v / |v|` with norms over all axes but one: zero where g is; along the others v itself has to be zero."""
    direction, scale = node.args[:2]
    axis = arg(node, 2, "dim", 0) % len(shape(direction))
    others = tuple(state.settle(track) for track in state.of(direction) if axis not in track.axes)
    own = tuple(Track(t.units, np.zeros_like(t.zero)) for t in state.of(direction) if axis in t.axes)
    parts = [(own, shape(direction)), part(state, scale)]
    return (*others, *combine(state, node, parts, product=True))


def nonzero(state: Propagation, node: Node) -> Value:
    """A function of each element alone with f(0) ≠ 0: what reads it must be zero instead."""
    return blunted(state.of(node.args[0]))


def clamp(state: Propagation, node: Node) -> Value:
    """clamp(low, high) with numbers."""
    low, high = arg(node, 1, "min_val", arg(node, 1, "min")), arg(node, 2, "max_val", arg(node, 2, "max"))
    if isinstance(low, Node) or isinstance(high, Node):
        return unknown(state, node)
    keeps = (low is None or low <= 0) and (high is None or high >= 0)
    return state.of(node.args[0]) if keeps else nonzero(state, node)


def power(state: Propagation, node: Node) -> Value:
    """x ** p: keeps zero for p > 0."""
    exponent: Any = node.args[1]
    if isinstance(node.args[0], Node) and isinstance(exponent, int | float):
        return state.of(node.args[0]) if exponent > 0 else reciprocal(state, node)
    return compared(state, node)


def reciprocal(state: Propagation, node: Node) -> Value:
    """1/x, rsqrt, log: not finite at zero, so that what is zero there cannot be cut."""
    for track in state.of(node.args[0]):
        if track.zero.any() and not track.promise:
            state.freeze(track, f"not finite at zero, {place(node)}")
    return blunted(state.of(node.args[0]))


def compared(state: Propagation, node: Node) -> Value:
    """A comparison or other function of several elements whose value at zero is not known to be zero."""
    parts = [part(state, a) for a in node.args[:2] if isinstance(a, Node) and _is_tensor(a)]
    return blunted(combine(state, node, parts, product=False))
