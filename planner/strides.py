"""Strides that a compiler moves: where only every s-th position of a tensor is read, what makes it computes no others.

A strided 1x1 convolution reads every s-th position of its input. If nothing else reads that input, the stride can move
to what makes it, through functions of each element, so that a convolution with a larger kernel in front of it is
computed at those positions alone. In a residual network that happens where a block with a strided shortcut leaves its
shortcut alone: then the last convolution of the block before it takes a quarter of its time. OpenVINO does so
(StridesOptimization); a profile says it by a [[rewrite]].
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from planner.axes import arg, kind, number, shape
from planner.blocks import Block

if TYPE_CHECKING:
    from planner.operations import Operation

Strides = tuple[int, ...]
Demand = tuple[frozenset[str], Strides]  # once these blocks have left, so many positions apart along each axis
_MOST = 16  # demands of one tensor that are told apart
_EACH = frozenset(
    "add sub mul div relu relu6 hardtanh clamp sigmoid tanh elu leaky_relu silu hardswish hardsigmoid gelu batch_norm "
    "neg abs exp sqrt".split()
)


def demands(nodes: Sequence[Node], blocks: Sequence[Block]) -> dict[Node, list[Demand]]:
    """Return of which tensors not all positions are read, if some blocks have left: the fewest blocks first."""
    free = [block for block in blocks if not block.frozen]
    found: dict[Node, list[Demand]] = {}
    for node in reversed(nodes):
        users = [user for user in node.users if kind(user) != "_assert_tensor_metadata"]
        options: list[tuple[frozenset[str], Strides | None]] = [(frozenset(), None)]  # None: nothing reads it
        for user in users if _spatial(node) else ():
            own: list[tuple[frozenset[str], Strides | None]] = [*_read(user, node, found)]
            own += [(frozenset({b.name}), None) for b in free if user.name in b.body and node.name not in b.body]
            options = [
                (gone | more, stride or other)
                for gone, stride in options
                for more, other in own
                if stride is None or other is None or stride == other
            ]
        found[node] = _fewest([(gone, stride) for gone, stride in options if stride is not None])
    return found


def _spatial(node: Node) -> bool:
    return node.op == "call_function" and len(shape(node)) > 2


def _read(user: Node, node: Node, found: dict[Node, list[Demand]]) -> list[Demand]:
    """Return which positions of `node` a user reads, where those are not all."""
    if pointwise(user) and user.args[0] is node:
        own = strides_of(user)
        later: list[Demand] = [(frozenset(), (1,) * len(own)), *found.get(user, ())]
        products = [(gone, tuple(a * b for a, b in zip(own, each, strict=True))) for gone, each in later]
        return [(gone, stride) for gone, stride in products if max(stride) > 1]
    if kind(user).rstrip("_") in _EACH and shape(user) == shape(node):
        return found.get(user, [])
    return []


def _fewest(options: Sequence[Demand]) -> list[Demand]:
    """Return the demands in order of the blocks that they need, without those that need more for no more."""
    kept: list[Demand] = []
    for gone, stride in sorted(options, key=lambda own: _order(own[0])):
        if not any(fewer <= gone and other == stride for fewer, other in kept):
            kept.append((gone, stride))
    return kept[:_MOST]


def convolution(node: Node) -> bool:
    """Whether a node is a convolution of all channels, whose stride a compiler moves."""
    return kind(node) in ("conv1d", "conv2d", "conv3d") and number(arg(node, 6, "groups", 1)) == 1


def pointwise(node: Node) -> bool:
    """Whether a node is a convolution that reads one position for each that it writes."""
    if not convolution(node) or isinstance(arg(node, 4, "padding", 0), str):
        return False
    weight: Any = node.args[1]
    return all(size == 1 for size in shape(weight)[2:]) and not any(_each(node, 4, "padding", 0))


def strides_of(node: Node) -> Strides:
    """Return the strides of a convolution."""
    return _each(node, 3, "stride", 1)


def _each(node: Node, index: int, name: str, default: int) -> Strides:
    weight: Any = node.args[1]
    value: Any = arg(node, index, name, default)
    listed = tuple(value) if isinstance(value, list | tuple) else (value,)
    return tuple(int(n) for n in (listed if len(listed) > 1 else listed * (len(shape(weight)) - 2)))


def variants(
    operation: "Operation", node: Node, read: Mapping[Node, Sequence[Demand]]
) -> list[tuple[frozenset[str], "Operation"]]:
    """Return what a convolution is once blocks have left and strides have moved, for more and more of them.

    Its own stride grows by what is read of its output. That of a 1x1 convolution moves to its input, of which all is
    then read, where nothing else needs the rest.
    """
    source: Any = node.args[0]
    own = strides_of(node)
    ones = (1,) * len(own)
    found: dict[frozenset[str], tuple[tuple[int, ...], tuple[int, ...]]] = {}  # less of the input, stride
    for gone, stride in read.get(node, ()):
        found[gone] = ones, tuple(a * b for a, b in zip(own, stride, strict=True))
    for gone, stride in read.get(source, ()) if pointwise(node) else ():
        found[gone] = stride, ones
    found = {gone: made for gone, made in found.items() if operation.blocks.isdisjoint(gone)}
    new = {one | other for one, other in combinations(found, 2)} - found.keys()
    while new and len(found) <= _MOST:  # all unions too, so that the largest set within says all
        for both in sorted(new, key=_order):
            found[both] = found[max((gone for gone in found if gone < both), key=_order)]
        new = {one | other for one, other in combinations(found, 2)} - found.keys()
    ordered = sorted(found.items(), key=lambda item: _order(item[0]))
    return [(gone, _made(operation, node, *made)) for gone, made in ordered]


def _order(blocks: frozenset[str]) -> tuple[int, list[str]]:
    return len(blocks), sorted(blocks)


def _made(operation: "Operation", node: Node, less: Sequence[int], stride: Sequence[int]) -> "Operation":
    """Return a convolution with another stride, on an input of fewer positions."""
    source: Any = node.args[0]
    axis = len(shape(source)) - len(less)
    size = tuple(-(-n // by) for n, by in zip(shape(source)[axis:], less, strict=True))
    before = shape(node)[axis:]
    after = tuple(-(-n * own // by) for n, own, by in zip(before, strides_of(node), stride, strict=True))
    if math.prod(less) > 1:
        after = tuple(-(-n // by) for n, by in zip(size, stride, strict=True))
    shrunk, fewer = Fraction(math.prod(after), math.prod(before)), Fraction(1, math.prod(less))
    first, _, last = operation.signature.partition(" @")
    words, rest = first.split(" "), last.split(" ")
    words[2] = "s" + "x".join(map(str, stride))
    rest[0] = "x".join(map(str, (shape(source)[0], *size)))
    return replace(
        operation,
        signature=" @".join([" ".join(words), " ".join(rest)]),
        macs_per_pair=round(operation.macs_per_pair * shrunk),
        read_per_input=round(operation.read_per_input * fewer),
        moved_per_output=round(operation.moved_per_output * shrunk),
        whole=operation,
    )
