"""The operations that cost time, how wide each is under a choice, and what a choice is."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from planner.axes import Ids, Propagation, arg, kind, place, shape
from planner.blocks import Block, module_path


@dataclass(frozen=True)
class Choice:
    """What a smaller model keeps: channels per width, and the residual blocks that left."""

    keep: Mapping[str, int]
    removed: frozenset[str]


@dataclass(frozen=True)
class Extent:
    """The length of an axis under a choice: fixed + sum of multiplicity × kept channels."""

    fixed: int
    parts: tuple[tuple[str, int], ...]  # (width, elements per channel)

    def under(self, choice: Choice) -> int:
        """Return the length under `choice`."""
        return self.fixed + sum(times * choice.keep[width] for width, times in self.parts)


@dataclass(frozen=True)
class Operation:
    """A convolution or linear layer with what is fused behind it."""

    name: str
    signature: str  # everything that decides its time but its two widths
    inputs: Extent
    outputs: Extent
    macs_per_pair: int  # multiply-accumulates per (input channel, output channel); per output channel if grouped
    grouped: bool
    blocks: frozenset[str]  # it vanishes with any of these
    where: str  # "conv2d at file:line"

    def present(self, choice: Choice) -> bool:
        """Whether the operation is still there under `choice`."""
        return self.blocks.isdisjoint(choice.removed)

    def widths(self, choice: Choice) -> tuple[int, int]:
        """Return its input and output channels under `choice`."""
        return self.inputs.under(choice), self.outputs.under(choice)

    def macs(self, choice: Choice) -> int:
        """Return its multiply-accumulates under `choice`."""
        if not self.present(choice):
            return 0
        inputs, outputs = self.widths(choice)
        return self.macs_per_pair * outputs * (1 if self.grouped else inputs)

    @property
    def kind(self) -> str:
        """The name that profiles use for it."""
        return self.signature.split()[0]


def find_operations(
    nodes: Sequence[Node], state: Propagation, extent: Callable[[Ids | None, int], Extent], blocks: Sequence[Block]
) -> tuple[Operation, ...]:
    """Return every convolution and linear layer of an exported graph, in order."""
    found = []
    for node in nodes:
        if kind(node) in ("conv1d", "conv2d", "linear") and state.name(node.args[1]) is not None:
            inside = frozenset(block.name for block in blocks if node.name in block.body)
            found.append(_operation(node, state, extent, inside))
    return tuple(found)


_KINDS = {(False, False): "", (False, True): "", (True, False): "grouped_", (True, True): "depthwise_"}


def _operation(
    node: Node, state: Propagation, extent: Callable[[Ids | None, int], Extent], blocks: frozenset[str]
) -> Operation:
    source, weight = node.args[:2]
    outputs, per_group, *kernel = shape(weight)
    axis = len(shape(source)) - 1 if kind(node) == "linear" else len(shape(source)) - len(kernel) - 1
    size = shape(source)
    inputs = extent(_units(state, source, axis), size[axis])
    groups = 1 if kind(node) == "linear" else arg(node, 6, "groups", 1)
    grouped = groups > 1
    positions = math.prod(shape(node)) // outputs
    macs = positions * math.prod(kernel) * (per_group if grouped else 1)
    spatial = size[axis + 1 :] if kernel else size[:-1]
    words = [_KINDS[grouped, per_group == 1] + kind(node), "x".join(map(str, kernel)), _geometry(node, kernel)]
    words += [f"g{groups}" if grouped and per_group > 1 else ""]
    words += ["@" + "x".join(map(str, (size[0], *spatial) if kernel else spatial)), _epilogue(node)]
    outgoing = extent(_units(state, node, axis), outputs)
    name = module_path(node) or node.name
    return Operation(name, " ".join(filter(None, words)), inputs, outgoing, macs, grouped, blocks, place(node))


def _units(state: Propagation, argument: object, axis: int) -> Ids | None:
    """Return the units along one axis of a tensor."""
    track = next((track for track in state.of(argument) if axis in track.axes), None)
    return None if track is None else track.along(axis)


def _geometry(node: Node, kernel: Sequence[int]) -> str:
    if not kernel:
        return ""

    def flat(index: int, name: str, default: int) -> str:
        value = arg(node, index, name, default)
        return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    return f"s{flat(3, 'stride', 1)} p{flat(4, 'padding', 0)} d{flat(5, 'dilation', 1)}"


def _epilogue(node: Node) -> str:
    """Return what runtimes fuse behind an operation: "add", "relu", "add+relu" or nothing."""
    words: list[str] = []
    while len(node.users) == 1:
        (node,) = node.users
        if kind(node) == "batch_norm":
            continue
        word = kind(node).rstrip("_")
        if word not in ("add", "relu", "relu6", "hardswish", "silu", "gelu") or words[-1:] == ["relu"]:
            break
        words.append(word)
    return "+".join(words)
