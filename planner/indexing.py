"""How units pass through operations that look elements up by numbers: the axes looked up in cannot be cut."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from planner.arithmetic import Part, combine, unknown
from planner.axes import Propagation, Track, Value, arg, kind, place, shape


def index(state: Propagation, node: Node) -> Value:
    """x[:, indices, :] with index tensors side by side: the indexed axes cannot be cut."""
    if kind(node) == "index_select":
        return _indexed(state, node, [arg(node, 1, "dim") % len(shape(node))], 1)
    given: Any = node.args[1]
    places = [i for i, one in enumerate(given) if one is not None]
    if not places or places != list(range(places[0], places[-1] + 1)):
        return unknown(state, node)
    grown = len(shape(node)) - (len(shape(node.args[0])) - len(places))
    return _indexed(state, node, places, grown)


def _indexed(state: Propagation, node: Node, places: Sequence[int], grown: int) -> Value:
    out = []
    for whole in state.of(node.args[0]):
        track = state.single(whole, [axis for axis in whole.axes if axis not in places])
        if track.axes[0] in places:
            state.freeze(track, f"indexed by {place(node)}")
            continue
        form = list(track.units.shape)
        form[places[0] : places[-1] + 1] = [1] * grown
        out.append(track.moved(lambda a: a.reshape(form)))  # noqa: B023
    return tuple(out)


def gather(state: Propagation, node: Node) -> Value:
    """gather(x, dim, index): elements of one axis chosen anew for each of the others."""
    source, axis, chosen = node.args[0], int(arg(node, 1, "dim")), node.args[2]
    rest, size = _beside(state, node, source, axis)
    if any(a != b for a, b in zip(size, shape(node), strict=True) if a > 1):
        return unknown(state, node)
    spread = tuple(Track(t.units, np.zeros_like(t.zero)) for t in state.of(chosen))
    return combine(state, node, [(rest, size), (spread, shape(chosen))], product=True)


def _beside(state: Propagation, node: Node, argument: object, axis: int) -> Part:
    """Return a tensor without one axis, which has to stay as it is indexed."""
    size, rest = shape(argument), []
    axis %= len(size)
    for whole in state.of(argument):
        track = state.single(whole, [other for other in whole.axes if other != axis])
        if axis in track.axes:
            state.freeze(track, f"indexed by {place(node)}")
        else:
            rest.append(track)
    return tuple(rest), (*size[:axis], 1, *size[axis + 1 :])


def index_add(state: Propagation, node: Node) -> Value:
    """index_add(x, dim, index, source): a sum but for one axis, which has to stay."""
    axis = int(arg(node, 1, "dim"))
    return combine(state, node, [_beside(state, node, a, axis) for a in (node.args[0], node.args[3])], product=False)


def scatter_add(state: Propagation, node: Node) -> Value:
    """scatter_add(x, dim, index, source): the same, with an index for each element."""
    axis, chosen = int(arg(node, 1, "dim")), node.args[2]
    sizes = [_without_axis(shape(a), axis) for a in (node.args[0], chosen, node.args[3])]
    if len(set(sizes)) > 1:  # a part alone is added to
        return unknown(state, node)
    parts = [_beside(state, node, a, axis) for a in (node.args[0], node.args[3])]
    rest, size = _beside(state, node, chosen, axis)
    spread = (tuple(Track(t.units, np.zeros_like(t.zero)) for t in rest), size)
    return combine(state, node, [(combine(state, node, parts, product=False), size), spread], product=True)


def _without_axis(size: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(size) if i != axis % len(size))
