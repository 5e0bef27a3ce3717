"""Which elements of which tensor axes must be cut together: the state that planner.rules fills.

A *unit* is one output channel of one producing layer. Every tensor axis carries either None (not tracked) or an integer
array with the unit of each element; -1 marks an element that is constantly zero.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import Node

Ids = NDArray[np.int64]
Axes = tuple[Ids | None, ...]
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
    trained: frozenset[str]  # the names of parameters: what penalties can make zero
    count: int = 0
    ties: list[Ids] = field(default_factory=list)  # (2, n) pairs of units that are the same group
    siblings: list[Ids] = field(default_factory=list)  # (2, n) pairs of units of one producer
    slices: list[Slice] = field(default_factory=list)
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    axes: dict[Node, Axes] = field(default_factory=dict)
    makers: list[tuple[Ids, Node]] = field(default_factory=list)
    uses: set[tuple[str, int, Node]] = field(default_factory=set)  # (tensor, axis, node that is known to use it so)

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

    def own(self, node: Node, argument: object, *, axis: int, units: Ids, penalised: bool) -> None:
        """Record that `units` own the elements of an axis of a parameter of `node`; a second use of it ties both."""
        tensor = self.parameter(argument)
        if tensor is None:
            return
        self.uses.add((tensor, axis, node))
        if penalised and tensor not in self.trained:
            self.freeze(units, f"{tensor} is no parameter that could become zero, {place(node)}")
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


def kind(node: Node) -> str:
    """Return the name of the operation of a node without its overload, e.g. "conv2d"."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__ if packet is not None else getattr(node.target, "__name__", node.target))
