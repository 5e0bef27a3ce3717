"""Products of two tensors, such as those of attention: which of their axes are widths, and what they multiply."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from planner.axes import Ids, Propagation, arg, kind, shape

Side = tuple[Ids | None, int]  # the units of a width, and its length in the dense model
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW"


@dataclass(frozen=True)
class Product:
    """One product of two tensors.

    Where heads can be cut, the width is heads × features, and what is multiplied is proportional to it: `grouped`.
    """

    name: str
    form: str  # the lengths of all axes but those that are cut
    inputs: Side
    outputs: Side
    macs: int
    grouped: bool
    read: int  # elements


@dataclass(frozen=True)
class _Operand:
    node: Node
    letters: str


def products(state: Propagation, node: Node) -> list[Product]:
    """Return what a node multiplies: nothing, one product, or the two of an attention."""
    if kind(node) == "scaled_dot_product_attention":
        return _attention(state, node)
    operands, out = _operands(node)
    return [_product(state, operands, out)] if operands else []


def _operands(node: Node) -> tuple[tuple[_Operand, ...], str]:
    """Return two operands with a letter for each axis, and the letters of the result; none if it is no product."""
    name, tensors = kind(node), [n for n in node.args if isinstance(n, Node)]
    if name == "einsum":
        tensors = list(arg(node, 1, "operands"))
        given, _, out = str(node.args[0]).replace(" ", "").partition("->")
        letters = given.split(",")
        if len(tensors) != 2 or "." in given or not out or any(len(set(own)) < len(own) for own in letters):
            return (), ""
        return tuple(_Operand(t, own) for t, own in zip(tensors, letters, strict=True)), out
    if name not in ("matmul", "bmm", "mm", "mv", "addmm", "baddbmm"):
        return (), ""
    left, right = tensors[-2:]
    a, b = len(shape(left)), len(shape(right))
    batch = _LETTERS[: max(a, b, 2) - 2]
    first, second = batch[len(batch) - max(a - 2, 0) :] + "XY"[2 - min(a, 2) :], "YZ"[: min(b, 2)]
    second = batch[len(batch) - max(b - 2, 0) :] + second
    out = batch + ("X" if a > 1 else "") + ("Z" if b > 1 else "")
    return (_Operand(left, first), _Operand(right, second)), out


def _product(state: Propagation, operands: Sequence[_Operand], out: str) -> Product:
    left, right = operands
    size: dict[str, int] = {}
    for operand in operands:
        for letter, n in zip(operand.letters, shape(operand.node), strict=True):
            size[letter] = max(size.get(letter, 1), n)
    shared = [letter for letter in left.letters if letter in right.letters]
    batch, summed = [c for c in shared if c in out], [c for c in shared if c not in out]
    rows, columns = ([c for c in own.letters if c not in shared and c in out] for own in operands)
    cut = {letter for operand in operands for letter in _followed(state, operand)}
    crossing = _crossing(state, left, rows, summed)
    grouped = bool(cut.intersection(batch) or crossing)
    if grouped:
        ways = [(right, columns), (left, crossing or summed), (left, rows)]
        operand, features = next((way for way in ways if cut.intersection(way[1])), ways[1])
        outputs = _joint(state, operand, [*batch, *features])
        inputs = outputs
    else:
        inputs = _either(state, operands, summed)
        outputs = _joint(state, left, rows) if cut.intersection(rows) else _joint(state, right, columns)
    form = " ".join("x".join("_" if c in cut else str(size[c]) for c in operand.letters) for operand in operands)
    read = sum(math.prod(shape(operand.node)) for operand in operands)
    return Product("", form, inputs, outputs, math.prod(size.values()), grouped, read)


def _crossing(state: Propagation, operand: _Operand, rows: Sequence[str], summed: Sequence[str]) -> list[str]:
    """Return the rows and summed axes that one track varies along: heads with their features, for keys of one head."""
    for track in state.of(operand.node):
        letters = [operand.letters[axis] for axis in track.axes]
        if set(letters) & set(rows) and set(letters) & set(summed):
            return letters
    return []


def _followed(state: Propagation, operand: _Operand) -> set[str]:
    """Return the letters of the axes that units vary along."""
    return {operand.letters[axis] for track in state.of(operand.node) for axis in track.axes}


def _either(state: Propagation, operands: Sequence[_Operand], letters: Sequence[str]) -> Side:
    """Return some axes as one width, from the operand that follows them."""
    sides = [_joint(state, operand, letters) for operand in operands]
    return next((side for side in sides if side[0] is not None), sides[0])


def _joint(state: Propagation, operand: _Operand, letters: Sequence[str]) -> Side:
    """Return some axes of an operand as one width: the units of the first track that varies along any of them."""
    return joint(state, operand.node, [operand.letters.index(letter) for letter in letters])


def joint(state: Propagation, node: Node, axes: Sequence[int]) -> Side:
    """Return some axes of a tensor as one width."""
    form = tuple(n if axis in axes else 1 for axis, n in enumerate(shape(node)))
    track = next((t for t in state.of(node) if set(t.axes) & set(axes)), None)
    if track is None:
        return None, math.prod(form)
    first = track.units[tuple(slice(None) if axis in axes else slice(0, 1) for axis in range(len(form)))]
    return np.broadcast_to(first, form).reshape(-1), math.prod(form)


def _attention(state: Propagation, node: Node) -> list[Product]:
    """Return the scores, proportional to heads × query features, and the values, to heads × value features."""
    query, key = node.args[0], node.args[1]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    dims, keys = len(shape(query)), shape(key)[-2]
    axes = [axis for axis in (dims - 3, dims - 1) if axis >= 0]
    found = []
    for name, tensor in (("scores", query), ("values", node)):
        side, count = joint(state, tensor, axes), math.prod(shape(tensor))
        form = "x".join("_" if axis in axes else str(n) for axis, n in enumerate(shape(tensor)))
        found.append(Product(name, f"{name} {form} {keys}", side, side, count * keys, True, 2 * count))
    return found
