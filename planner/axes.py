"""Which elements of which tensor axes must be cut together, found by sending unit ids through a model's operations.

A *unit* is one output channel of one producing layer. Every tensor axis carries either None (not tracked) or an integer
array with the unit of each element; -1 marks an element that is constantly zero. Operations act on these arrays as they
act on the data: a concatenation concatenates them, an addition ties them. What an operation does to an axis is written
here once per kind of operation; an operation that is not known freezes every unit that reaches it, with its place.
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

Ids = NDArray[np.int64]
Axes = tuple[Ids | None, ...]
aten = torch.ops.aten
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Slice:
    """The elements of one axis of a parameter or buffer, by unit; `penalised`: they must be zero for the unit to be."""

    tensor: str
    axis: int
    units: Ids
    penalised: bool


@dataclass
class Propagation:
    """The state of one pass over a graph: ids per node, ties between ids, and the slices of parameters they own."""

    names: dict[str, str]  # placeholder -> parameter or buffer name
    count: int = 0
    ties: list[Ids] = field(default_factory=list)  # (2, n) pairs of units that are the same group
    siblings: list[Ids] = field(default_factory=list)  # (2, n) pairs of units of one producer
    slices: list[Slice] = field(default_factory=list)
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    axes: dict[Node, Axes] = field(default_factory=dict)
    makers: list[tuple[Ids, Node]] = field(default_factory=list)

    def fresh(self, size: int, node: Node) -> Ids:
        """Return `size` new units made by `node`."""
        units = np.arange(self.count, self.count + size)
        self.count += size
        self.siblings.append(np.stack([units[:-1], units[1:]]))
        self.makers.append((units, node))
        return units

    def tie(self, a: Ids, b: Ids) -> Ids:
        """Make elements of `a` and `b` one group where both are units; return the units of their sum."""
        both = (a >= 0) & (b >= 0)
        self.ties.append(np.stack([a[both], b[both]]))
        return np.where(a >= 0, a, b)

    def own(self, tensor: str, axis: int, units: Ids, *, penalised: bool) -> None:
        """Record that `units` own the elements of an axis of a parameter; a second use of the parameter ties both."""
        known = next((s for s in self.slices if s.tensor == tensor and s.axis == axis), None)
        if known is not None:
            self.tie(known.units, units)
        else:
            self.slices.append(Slice(tensor, axis, units, penalised))

    def freeze(self, units: Ids | None, reason: str) -> None:
        """Forbid cutting `units`, because of `reason`."""
        if units is not None and (units >= 0).any():
            self.frozen.append((np.unique(units[units >= 0]), reason))

    def parameter(self, argument: object) -> str | None:
        """Return the parameter or buffer that an argument of a node is, or None."""
        return self.names.get(argument.name) if isinstance(argument, Node) else None

    def of(self, argument: object) -> Axes:
        """Return the ids of the axes of an argument."""
        if not isinstance(argument, Node):
            return ()
        return self.axes.get(argument, (None,) * len(shape(argument)))


def shape(argument: object) -> tuple[int, ...]:
    """Return the shape of the tensor that a node makes, () for anything else."""
    value = argument.meta.get("val") if isinstance(argument, Node) else None
    return tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def arg(node: Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument of a node, however it was passed."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def place(node: Node) -> str:
    """Return "operation at file:line" of the user's code that made a node."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [f"{file}:{line}" for file, line in frames if not file.startswith(_TORCH)]
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    return f"{name} at {own[-1]}" if own else name


def spread(units: Ids | None, dims: int, axis: int) -> Ids | None:
    """Return `units` as an array of `dims` dimensions that varies along `axis` only."""
    return None if units is None else units.reshape([-1 if i == axis else 1 for i in range(dims)])


# --- one function per kind of operation: (propagation, node) -> ids of the output's axes -------------------------


def _convolution(state: Propagation, node: Node) -> Axes:
    source, weight = node.args[:2]
    groups = arg(node, 6, "groups", 1)
    name, incoming = state.parameter(weight), state.of(source)
    if name is None:
        return _unknown(state, node)
    outputs, per_group, *kernel = shape(weight)
    axis = len(incoming) - len(kernel) - 1
    channels = incoming[axis]
    if groups == 1:
        units = state.fresh(outputs, node)
        if channels is not None:
            state.own(name, 1, channels, penalised=False)
    elif per_group == 1 and channels is not None:
        units = np.repeat(channels, outputs // groups)
    else:
        state.freeze(channels, f"grouped {place(node)}")
        return (None,) * len(incoming)
    _own_outputs(state, node, units)
    return tuple(units if i == axis else None for i in range(len(incoming)))


def _own_outputs(state: Propagation, node: Node, units: Ids) -> None:
    for argument in (node.args[1], arg(node, 2, "bias")):
        if (name := state.parameter(argument)) is not None:
            state.own(name, 0, units, penalised=True)


def _linear(state: Propagation, node: Node) -> Axes:
    name, incoming = state.parameter(node.args[1]), state.of(node.args[0])
    if name is None:
        return _unknown(state, node)
    if incoming[-1] is not None:
        state.own(name, 1, incoming[-1], penalised=False)
    units = state.fresh(shape(node.args[1])[0], node)
    _own_outputs(state, node, units)
    return (*incoming[:-1], units)


def _batch_norm(state: Propagation, node: Node) -> Axes:
    source, weight, bias, mean, variance = node.args[:5]
    incoming = state.of(source)
    units = incoming[1]
    if units is None:
        return incoming
    if state.parameter(weight) is None or state.parameter(bias) is None:
        state.freeze(units, f"normalisation without scale and shift, {place(node)}")
        return incoming
    for argument, penalised in ((weight, True), (bias, True), (mean, False), (variance, False)):
        if (name := state.parameter(argument)) is not None:
            state.own(name, 0, units, penalised=penalised)
    return incoming


def _same(state: Propagation, node: Node) -> Axes:
    return state.of(node.args[0])


def _pool(state: Propagation, node: Node) -> Axes:
    incoming = state.of(node.args[0])
    for units in incoming[2:]:
        state.freeze(units, place(node))
    return (*incoming[:2], *[None] * (len(incoming) - 2))


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
    wanted = range(len(incoming)) if dims is None else [dims] if isinstance(dims, int) else dims
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
            incoming[axis] = np.pad(units, width, constant_values=-1) if constant else None
    return tuple(incoming)


def _clamp(state: Propagation, node: Node) -> Axes:
    low, high = arg(node, 1, "min_val", arg(node, 1, "min")), arg(node, 2, "max_val", arg(node, 2, "max"))
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
        units = spread(incoming[tracked[0]], len(old), old.index(tracked[0]))
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
    *("relu", "relu_", "relu6", "relu6_", "leaky_relu", "leaky_relu_", "prelu", "silu", "silu_", "gelu", "tanh"),
    *("hardswish", "hardswish_", "mish", "elu", "elu_", "selu", "neg", "abs"),
    *("dropout", "dropout_", "feature_dropout", "clone", "contiguous", "to", "_to_copy", "alias", "detach"),
)
RULES: dict[str, Callable[[Propagation, Node], Axes]] = {
    **dict.fromkeys(ZERO_KEEPING, _same),
    **dict.fromkeys(("conv1d", "conv2d"), _convolution),
    **dict.fromkeys(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"), _pool),
    **dict.fromkeys(("add", "add_", "sub"), _add),
    **dict.fromkeys(("mul", "mul_", "div"), _scale),
    **dict.fromkeys(("view", "reshape", "flatten", "unsqueeze", "squeeze"), _reshape),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("hardtanh", "hardtanh_", "clamp", "clamp_"), _clamp),
    "linear": _linear,
    "batch_norm": _batch_norm,
    "mean": _mean,
    "cat": _cat,
    "slice": _slice,
    "permute": _permute,
    "transpose": _transpose,
}


def propagate(nodes: Sequence[Node], names: dict[str, str]) -> Propagation:
    """Send unit ids through the nodes of an exported graph, in order."""
    state = Propagation(names)
    for node in nodes:
        if node.op == "call_function":
            rule = _item if node.target is operator.getitem else RULES.get(kind(node), _unknown)
            state.axes[node] = rule(state, node)
        elif node.op == "output":
            for argument in node.all_input_nodes:
                for units in state.of(argument):
                    state.freeze(units, "it is an output of the model")
    return state


def kind(node: Node) -> str:
    """Return the name of the operation of a node without its overload, e.g. "conv2d"."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__ if packet is not None else getattr(node.target, "__name__", node.target))
