"""What every operation does to unit ids: once per kind of operation, and sent through a whole model.

Operations act on the ids as they act on the data: a concatenation concatenates them, an addition ties them. An
operation that is not known freezes every unit that reaches it, with its place.
"""

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from planner.axes import Axes, Ids, Propagation, arg, kind, place, shape


def _convolution(state: Propagation, node: Node) -> Axes:
    source, weight, bias = node.args[0], node.args[1], arg(node, 2, "bias")
    groups = arg(node, 6, "groups", 1)
    if state.parameter(weight) is None:
        return _unknown(state, node)
    outputs, per_group, *kernel = shape(weight)
    axis = len(shape(source)) - len(kernel) - 1
    channels = _only(state, node, axis)
    depthwise = groups > 1 and per_group == 1
    if groups == 1:
        units = state.fresh(outputs, node)
        if channels is not None:
            state.own(node, weight, axis=1, units=channels, penalised=False)
    elif depthwise and channels is not None and (channels >= 0).all():
        units = np.repeat(channels, outputs // groups)
    else:
        state.freeze(channels, f"grouped {place(node)}")
        return (None,) * len(shape(source))
    fixed = depthwise and state.parameter(weight) not in state.trained  # a filter of zeros gives zeros all the same
    state.own(node, weight, axis=0, units=units, penalised=not fixed)
    state.own(node, bias, axis=0, units=units, penalised=True)
    return tuple(units if i == axis else None for i in range(len(shape(source))))


def _only(state: Propagation, node: Node, axis: int) -> Ids | None:
    """Return the units of one axis of a node's input; those of its other axes, which the node mixes, are frozen."""
    incoming = state.of(node.args[0])
    for other, units in enumerate(incoming):
        if other != axis % len(incoming):
            state.freeze(units, f"axis mixed by {place(node)}")
    return incoming[axis]


def _linear(state: Propagation, node: Node) -> Axes:
    weight, features = node.args[1], _only(state, node, -1)
    if state.parameter(weight) is None:
        return _unknown(state, node)
    if features is not None:
        state.own(node, weight, axis=1, units=features, penalised=False)
    units = state.fresh(shape(weight)[0], node)
    for argument in (weight, arg(node, 2, "bias")):
        state.own(node, argument, axis=0, units=units, penalised=True)
    return (*[None] * (len(shape(node)) - 1), units)


def _batch_norm(state: Propagation, node: Node) -> Axes:
    source, weight, bias, mean, variance = node.args[:5]
    units = _only(state, node, 1)
    if units is None or (units < 0).any():  # shifted zeros are zeros no more
        return _unknown(state, node)
    if state.parameter(weight) is None or state.parameter(bias) is None:
        state.freeze(units, f"normalisation without scale and shift, {place(node)}")
    for argument, penalised in ((weight, True), (bias, True), (mean, False), (variance, False)):
        state.own(node, argument, axis=0, units=units, penalised=penalised)
    return state.of(source)


def _prelu(state: Propagation, node: Node) -> Axes:
    units = state.of(node.args[0])[1] if len(shape(node)) > 1 else None
    if units is not None and len(units) > 1 and shape(node.args[1]) == (len(units),):
        state.own(node, node.args[1], axis=0, units=units, penalised=False)
    return _same(state, node)


def _same(state: Propagation, node: Node) -> Axes:
    return state.of(node.args[0])


def _pool(state: Propagation, node: Node) -> Axes:
    incoming, spatial = state.of(node.args[0]), 1 if "1d" in kind(node) else 2
    for units in incoming[-spatial:]:
        state.freeze(units, f"axis mixed by {place(node)}")
    return (*incoming[:-spatial], *[None] * spatial)


def _aligned(axes: Axes, dims: int) -> Axes:
    return (*[None] * (dims - len(axes)), *axes)


def _add(state: Propagation, node: Node) -> Axes:
    tensors = [argument for argument in node.args[:2] if isinstance(argument, Node)]
    if len(tensors) < 2 or any(state.parameter(tensor) for tensor in tensors):
        return _unknown(state, node)
    size = shape(node)
    left, right = (_aligned(state.of(tensor), len(size)) for tensor in tensors)
    out: list[Ids | None] = []
    for axis, (a, b) in enumerate(zip(left, right, strict=True)):
        if a is not None and b is not None and len(a) == len(b) == size[axis]:
            out.append(state.tie(a, b))
        else:
            state.freeze(a, f"added to an axis that is not cut, {place(node)}")
            state.freeze(b, f"added to an axis that is not cut, {place(node)}")
            out.append(None)
    return tuple(out)


def _scale(state: Propagation, node: Node) -> Axes:
    """A product with a number keeps zeros; with a tensor it may tie other axes, which is not followed."""
    tensors = [argument for argument in node.args[:2] if isinstance(argument, Node)]
    return state.of(tensors[0]) if len(tensors) == 1 else _unknown(state, node)


def _mean(state: Propagation, node: Node) -> Axes:
    incoming = state.of(node.args[0])
    dims = arg(node, 1, "dim")
    wanted = [dims] if isinstance(dims, int) else dims or range(len(incoming))  # none named: all
    gone = {dim % len(incoming) for dim in wanted}
    for axis in gone:
        state.freeze(incoming[axis], f"reduced over by {place(node)}")
    if arg(node, 2, "keepdim", False):
        return tuple(None if axis in gone else units for axis, units in enumerate(incoming))
    return tuple(units for axis, units in enumerate(incoming) if axis not in gone)


def _cat(state: Propagation, node: Node) -> Axes:
    tensors: Any = node.args[0]
    axis = arg(node, 1, "dim", 0) % len(shape(node))
    parts = [state.of(tensor) for tensor in tensors]
    for part in parts:
        for other, units in enumerate(part):
            if other != axis and any(units is not rest[other] for rest in parts):
                state.freeze(units, f"joined along another axis by {place(node)}")
    if all(part[axis] is None for part in parts):
        return parts[0]
    return tuple(_joined(state, node, parts, axis) if i == axis else units for i, units in enumerate(parts[0]))


def _joined(state: Propagation, node: Node, parts: list[Axes], axis: int) -> Ids:
    ids: list[Ids] = []
    for tensor, part in zip(arg(node, 0, "tensors"), parts, strict=True):
        units = part[axis]
        if units is None:  # elements that nobody cuts get units of their own, which are frozen
            units = state.fresh(shape(tensor)[axis], node)
            state.freeze(units, f"not cut before {place(node)}")
        ids.append(units)
    return np.concatenate(ids)


def _slice(state: Propagation, node: Node) -> Axes:
    incoming = list(state.of(node.args[0]))
    axis = arg(node, 1, "dim", 0) % len(incoming)
    units = incoming[axis]
    if units is not None:
        kept = units[slice(arg(node, 2, "start"), arg(node, 3, "end"), arg(node, 4, "step", 1))]
        if len(kept) != len(units):
            state.freeze(units, f"sliced at fixed positions by {place(node)}")
        incoming[axis] = kept
    return tuple(incoming)


def _pad(state: Propagation, node: Node) -> Axes:
    incoming = list(state.of(node.args[0]))
    amounts: Any = node.args[1]
    is_pad = kind(node) == "pad"
    constant = not is_pad or arg(node, 2, "mode", "constant") == "constant"
    if constant and arg(node, 3 if is_pad else 2, "value"):
        return _unknown(state, node)
    for index in range(0, len(amounts), 2):
        axis, width = len(incoming) - 1 - index // 2, tuple(amounts[index : index + 2])
        units = incoming[axis]
        if units is not None and any(width):
            state.freeze(units, f"padded by a fixed number of channels, {place(node)}")
            incoming[axis] = np.pad(units, width, constant_values=-1) if constant and min(width) >= 0 else None
    return tuple(incoming)


def _clamp(state: Propagation, node: Node) -> Axes:
    low, high = arg(node, 1, "min_val", arg(node, 1, "min")), arg(node, 2, "max_val", arg(node, 2, "max"))
    if isinstance(low, Node) or isinstance(high, Node):
        return _unknown(state, node)
    keeps_zero = (low is None or low <= 0) and (high is None or high >= 0)
    return _same(state, node) if keeps_zero else _unknown(state, node)


def _permute(state: Propagation, node: Node) -> Axes:
    incoming = state.of(node.args[0])
    order: Any = node.args[1]
    return tuple(incoming[axis] for axis in order)


def _transpose(state: Propagation, node: Node) -> Axes:
    incoming = list(state.of(node.args[0]))
    a, b = arg(node, 1, "dim0"), arg(node, 2, "dim1")
    incoming[a], incoming[b] = incoming[b], incoming[a]
    return tuple(incoming)


def _spread(units: Ids | None, dims: int, axis: int) -> Ids | None:
    """Return `units` as an array of `dims` dimensions that varies along `axis` only."""
    return None if units is None else units.reshape([-1 if i == axis else 1 for i in range(dims)])


def _reshape(state: Propagation, node: Node) -> Axes:
    source: Any = node.args[0]
    before, after = shape(source), shape(node)
    incoming = state.of(source)
    out: list[Ids | None] = [None] * len(after)
    for old, new in _matched(before, after):
        tracked = [axis for axis in old if incoming[axis] is not None]
        if len(tracked) != 1:
            for axis in tracked:
                state.freeze(incoming[axis], f"axis merged by {place(node)}")
            continue
        units = _spread(incoming[tracked[0]], len(old), old.index(tracked[0]))
        whole = np.broadcast_to(units, [before[axis] for axis in old]).reshape([after[axis] for axis in new])  # type: ignore[arg-type]
        varying = [i for i in range(whole.ndim) if whole.shape[i] > 1 and (np.diff(whole, axis=i) != 0).any()]
        if len(varying) > 1 or not new:
            state.freeze(incoming[tracked[0]], f"axis merged by {place(node)}")
        else:
            axis = varying[0] if varying else 0
            out[new[axis]] = np.moveaxis(whole, axis, 0).reshape(whole.shape[axis], -1)[:, 0]
    return tuple(out)


def _matched(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair runs of axes of two shapes whose products agree, e.g. (2,3,4)->(2,12): [([0],[0]), ([1,2],[1])]."""
    pairs, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(old), j + len(new)
        while math.prod(before[k] for k in old) != math.prod(after[k] for k in new):
            if math.prod(before[k] for k in old) < math.prod(after[k] for k in new) and i < len(before):
                old.append(i)
                i += 1
            else:
                new.append(j)
                j += 1
        pairs.append((old, new))
    return pairs


def _item(state: Propagation, node: Node) -> Axes:
    """Elements of tuples (chunk, split) are not followed: the producer of the tuple has frozen its units."""
    return (None,) * len(shape(node))


def _unknown(state: Propagation, node: Node) -> Axes:
    for argument in node.all_input_nodes:
        for units in state.of(argument):
            state.freeze(units, f"reaches {place(node)}, which is not followed")
    return (None,) * len(shape(node))


# Functions with f(0) = 0 that act on each element alone.
ZERO_KEEPING = (
    *("relu", "relu_", "relu6", "relu6_", "leaky_relu", "leaky_relu_", "silu", "silu_", "gelu", "tanh"),
    *("hardswish", "hardswish_", "mish", "elu", "elu_", "selu", "neg", "abs"),
    *("dropout", "dropout_", "feature_dropout", "clone", "contiguous", "to", "_to_copy", "alias", "detach"),
)
RULES: dict[str, Callable[[Propagation, Node], Axes]] = {
    **dict.fromkeys(ZERO_KEEPING, _same),
    **dict.fromkeys(("conv1d", "conv2d"), _convolution),
    **dict.fromkeys(("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "upsample_nearest2d"), _pool),
    **dict.fromkeys(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "upsample_bilinear2d"), _pool),
    **dict.fromkeys(("add", "add_", "sub"), _add),
    **dict.fromkeys(("mul", "mul_", "div"), _scale),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"), _reshape),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("hardtanh", "hardtanh_", "clamp", "clamp_"), _clamp),
    "linear": _linear,
    "batch_norm": _batch_norm,
    "mean": _mean,
    "cat": _cat,
    "concat": _cat,
    "prelu": _prelu,
    "_assert_tensor_metadata": _same,
    "slice": _slice,
    "permute": _permute,
    "transpose": _transpose,
}


def propagate(nodes: Sequence[Node], names: dict[str, str], trained: frozenset[str]) -> Propagation:
    """Send unit ids through the nodes of an exported graph, in order."""
    state = Propagation(names, trained)
    for node in nodes:
        if node.op == "call_function":
            rule = _item if node.target is operator.getitem else RULES.get(kind(node), _unknown)
            state.axes[node] = rule(state, node)
        elif node.op == "output":
            for argument in node.all_input_nodes:
                for units in state.of(argument):
                    state.freeze(units, "it is an output of the model")
    _freeze_shared(state, nodes)
    return state


def _freeze_shared(state: Propagation, nodes: Sequence[Node]) -> None:
    """Freeze what owns a part of a parameter that some operation uses in a way that was not recorded."""
    users: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        if node.name in state.names:
            users[state.names[node.name]] += node.users
    for piece in state.slices:
        for user in users[piece.tensor]:
            if (piece.tensor, piece.axis, user) not in state.uses:
                state.freeze(piece.units, f"{piece.tensor} is also used by {place(user)}")
