"""Which elements of which tensor axes must be cut together: the state that planner.rules fills.

A *unit* is one position on one axis of a *leaf*: a parameter, a buffer or a constant. Every tensor of the program
carries *tracks*: arrays of units, broadcastable to the tensor, that say which unit each element belongs to. Operations
act on tracks as they act on the data: a concatenation concatenates them, a reshape reshapes them, an addition ties
them. An axis that no track varies along is not followed and cannot be cut.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

Ids = NDArray[np.int64]
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Slice:
    """The elements of one axis of a parameter or buffer, by unit.

    `penalised`: they must be zero for the unit to be. `reads`: an operation sums over the axis, so that where they are
    zero it does not read the unit.
    """

    tensor: str
    axis: int
    units: Ids
    penalised: bool
    reads: bool = False


@dataclass(frozen=True)
class Track:
    """The units of a tensor's elements, broadcastable to it, and whether an element is zero once its unit is."""

    units: Ids
    zero: NDArray[np.bool_]  # of the shape of `units`
    promise: frozenset[tuple[str, int]] = frozenset()  # (parameter, axis): zero only if these are penalised

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """The axes that it varies along."""
        return tuple(i for i, size in enumerate(self.units.shape) if size > 1)

    def moved(self, move: Callable[[NDArray[Any]], NDArray[Any]]) -> "Track":
        """Return the track of elements moved as `move` moves an array."""
        return Track(move(self.units), move(self.zero), self.promise)

    def along(self, axis: int) -> Ids:
        """Return the units along the one axis that it varies along."""
        return np.moveaxis(self.units, axis, 0).reshape(self.units.shape[axis], -1)[:, 0]


Value = tuple[Track, ...]
"""The tracks of a tensor; no two vary along one axis."""


@dataclass
class Propagation:
    """The state of one pass over a graph: tracks per node, ties between units, and what each leaf owns of them."""

    names: dict[str, str]  # placeholder -> parameter, buffer or constant
    trained: frozenset[str]  # the names of parameters: what penalties can make zero
    lossy: bool = False  # whether layer normalisations over a cut axis are let pass, with an error
    count: int = 0
    constants: set[Node] = field(
        default_factory=set
    )  # tensors that depend on neither inputs nor parameters nor buffers
    current: Node | None = None
    ties: list[Ids] = field(default_factory=list)  # (2, n) pairs of units that are the same group
    tied_at: list[Node | None] = field(default_factory=list)  # the operation that made each of them
    siblings: list[Ids] = field(default_factory=list)  # (2, n) pairs of units of one producer
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    values: dict[Node, Value | list[Value]] = field(default_factory=dict)
    makers: list[tuple[Ids, Node]] = field(default_factory=list)
    leaves: dict[tuple[str, int], Ids] = field(default_factory=dict)  # (leaf, axis) -> its units
    penalised: set[tuple[str, int]] = field(default_factory=set)
    reading: set[tuple[str, int]] = field(default_factory=set)  # axes of parameters that operations sum over
    counted: list[tuple[Node, Ids]] = field(default_factory=list)  # operations that divide by the length of an axis
    inexact: list[tuple[Ids, str]] = field(default_factory=list)  # units that are cut with an error, and why

    def fresh(self, size: int) -> Ids:
        """Return `size` new units."""
        units = np.arange(self.count, self.count + size)
        self.count += size
        return units

    def make(self, units: Ids, node: Node) -> None:
        """Record that `node` produces `units`: they are channels of one width."""
        units = units.reshape(-1)
        self.siblings.append(np.stack([units[:-1], units[1:]]))
        self.makers.append((units, node))

    def tie(self, a: Ids, b: Ids) -> None:
        """Make the elements of `a` and `b`, broadcast to each other, the same groups."""
        left, right = np.broadcast_arrays(a, b)
        differ = left != right
        if differ.any():
            self.ties.append(np.stack([left[differ], right[differ]]))
            self.tied_at.append(self.current)

    def freeze(self, units: Ids | Track | None, reason: str) -> None:
        """Forbid cutting `units`, because of `reason`."""
        if units is not None:
            self.frozen.append((np.unique(units.units if isinstance(units, Track) else units), reason))

    def settle(self, track: Track) -> Track:
        """Penalise what must be penalised for the track's zeros to be zero."""
        self.penalised |= track.promise
        return replace(track, promise=frozenset()) if track.promise else track

    def single(self, track: Track, prefer: Sequence[int] = ()) -> Track:
        """Tie a track that varies along several axes so that it varies along one: the first of `prefer` or of all."""
        if len(track.axes) < 2:
            return track
        axis = next((axis for axis in prefer if axis in track.axes), track.axes[0])
        rest = tuple(other for other in track.axes if other != axis)
        first = track.units[tuple(slice(0, 1) if i in rest else slice(None) for i in range(track.units.ndim))]
        self.tie(track.units, first)
        return Track(first, np.asarray(track.zero.all(axis=rest, keepdims=True)), track.promise)

    def name(self, argument: object) -> str | None:
        """Return the name of the leaf that an argument of a node is, or None."""
        if not isinstance(argument, Node):
            return None
        return self.names.get(argument.name, argument.name if argument in self.constants else None)

    def is_constant(self, node: Node) -> bool:
        """Whether a node makes a tensor from numbers and constants alone."""
        if node.op != "call_function" or not shape(node) or kind(node).endswith("_"):
            return False
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor | tuple | list)]
        return all(n in self.constants for n in tensors)

    def leaf(self, node: Node, axis: int) -> Track:
        """Return the track of one axis of a leaf."""
        name = self.name(node)
        assert name is not None
        size = shape(node)
        if (name, axis) not in self.leaves:
            self.leaves[name, axis] = self.fresh(size[axis])
        form = [-1 if i == axis else 1 for i in range(len(size))]
        own = name in self.trained
        zero = np.full(size[axis], own or kind(node).startswith(("zeros", "new_zeros")))
        promise = frozenset({(name, axis)}) if own else frozenset[tuple[str, int]]()
        return Track(self.leaves[name, axis].reshape(form), zero.reshape(form), promise)

    def of(self, argument: object) -> Value:
        """Return the tracks of an argument of a node."""
        if not isinstance(argument, Node):
            return ()
        if argument not in self.values and self.name(argument) is not None:
            self.values[argument] = tuple(self.leaf(argument, i) for i, n in enumerate(shape(argument)) if n > 1)
        found = self.values.get(argument, ())
        return found if isinstance(found, tuple) else ()


def shape(argument: object) -> tuple[int, ...]:
    """Return the shape of the tensor that a node makes, () for anything else; of dynamic sizes those of the example."""
    value = argument.meta.get("val") if isinstance(argument, Node) else None
    return tuple(number(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def number(size: Any) -> int:
    """Return a size as a number: of a dynamic one, or a node that makes one, that of the example."""
    if isinstance(size, Node):
        size = size.meta["val"]
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def arg(node: Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument of a node, however it was passed."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def place(node: Node) -> str:
    """Return "operation at file:line" of the user's code that made a node."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [f"{file}:{line}" for file, line in frames if not file.startswith(_TORCH)]
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    return f"{name} at {own[-1]}" if own else name


def kind(node: Node) -> str:
    """Return the name of the operation of a node without its overload, e.g. "conv2d"."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__ if packet is not None else getattr(node.target, "__name__", node.target))
