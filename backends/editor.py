"""Putting right what is written in the nodes of a graph, once it is known which elements of its tensors stay."""

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from planner.axes import Propagation, Track, arg, kind, number, place, shape
from planner.rules import RULES
from profiles.errors import BuildError

Mask = NDArray[np.bool_]

_RESHAPES = frozenset(("view", "reshape", "_unsafe_view", "expand", "unflatten"))
_MOVES = frozenset(("permute", "transpose", "clone", "contiguous", "swapaxes", "movedim", "alias"))


@dataclass
class Editor:
    """Goes through a graph in order and puts right what is written in each node."""

    module: GraphModule
    state: Propagation
    kept: Mask
    numbers: Iterator[int] = field(default_factory=itertools.count)
    lazy: dict[Node, tuple[Node, int, NDArray[np.int64]]] = field(default_factory=dict)  # base, axis, its positions

    def visit(self, node: Node) -> None:
        """Put one node right."""
        if node.op == "get_attr":
            self._shrink(node)
        elif node.op == "call_function":
            if self._ragged(node) or self._gathered(node):
                return
            if self.state.name(node) is not None:
                self._select_axes(node)
            elif kind(node) in _RESHAPES:
                self._resize(node)
            elif (edit := getattr(self, f"_on_{kind(node)}", None)) is not None:
                edit(node)
            self._recount(node)

    # --- what stays of a tensor -------------------------------------------------------------------------------------

    def stays(self, argument: object) -> dict[int, Mask]:
        """Return for each axis of a tensor that is cut which of its elements stay."""
        found = {}
        for track in self.state.of(argument):
            mask = self._mask(track)
            if not mask.all():
                for axis in track.axes:
                    rest = tuple(i for i in range(mask.ndim) if i != axis)
                    found[axis] = np.asarray(mask.any(axis=rest))
        return {axis: mask for axis, mask in found.items() if not mask.all()}

    def _mask(self, track: Track) -> Mask:
        mask: Mask = self.kept[track.units]
        return mask

    def _is_grid(self, node: Node) -> bool:
        """Whether what stays is a tensor: the same along each axis wherever on the others."""
        for track in self.state.of(node):
            mask = self._mask(track)
            grid = np.ones_like(mask)
            for axis in track.axes:
                grid &= mask.any(axis=tuple(i for i in range(mask.ndim) if i != axis), keepdims=True)
            if (grid != mask).any():
                return False
        return True

    def size(self, node: Node) -> dict[int, int]:
        """Return the new length of each axis that is cut."""
        return {axis: int(mask.sum()) for axis, mask in self.stays(node).items()}

    # --- tensors that are no grid between two reshapes --------------------------------------------------------------

    def _ragged(self, node: Node) -> bool:
        """Put off a node whose elements that stay form no tensor; only reshapes and moves can make such."""
        if not shape(node) or self._is_grid(node):
            return False
        source: Any = node.args[0]
        if kind(node) not in _RESHAPES | _MOVES | {"flatten"} or not isinstance(source, Node):
            raise BuildError(f"what stays of the tensor at {place(node)} is no block of it; keep that width")
        base, axis, positions = self.lazy.get(source) or self._positions(source)
        self.lazy[node] = (base, axis, self._moved(node, source, positions))
        return True

    def _positions(self, source: Node) -> tuple[Node, int, NDArray[np.int64]]:
        cut = list(self.stays(source))
        if len(cut) != 1:
            raise BuildError(f"more than one axis of the tensor at {place(source)} is cut and moved; keep one of them")
        size = shape(source)
        form = [-1 if i == cut[0] else 1 for i in range(len(size))]
        return source, cut[0], np.arange(size[cut[0]]).reshape(form)

    def _moved(self, node: Node, source: Node, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Send positions through a reshape or move as if they were the units of a track."""
        fake = Propagation(self.state.names, frozenset())
        fake.values[source] = (Track(positions, np.zeros_like(positions, dtype=bool)),)
        (track,) = RULES[kind(node)](fake, node)
        assert isinstance(track, Track)
        return track.units

    def _gathered(self, node: Node) -> bool:
        """End a chain of put-off moves: gather the positions along the one axis that they came from."""
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or source not in self.lazy:
            if any(other in self.lazy for other in node.all_input_nodes):
                raise BuildError(f"what stays of the tensor at {place(node)} is no block of it; keep that width")
            return False
        base, axis, positions = self.lazy[source]
        if kind(node) not in _RESHAPES | _MOVES | {"flatten"} or shape(node) != shape(base):
            raise BuildError(f"what stays of the tensor at {place(node)} is no block of it; keep that width")
        order = self._moved(node, source, positions)
        if order.shape[axis] != order.size:
            raise BuildError(f"the axis cut at {place(node)} is moved with another; keep that width")
        here = self.kept[next(t for t in self.state.of(node) if axis in t.axes).along(axis)]
        before = self.kept[next(t for t in self.state.of(base) if axis in t.axes).along(axis)]
        rank = np.cumsum(before) - 1
        self._replace(node, self._index(node, base, axis, rank[order.reshape(-1)[here]]))
        return True

    # --- edits ------------------------------------------------------------------------------------------------------

    def _shrink(self, node: Node) -> None:
        """Keep what stays of a parameter, buffer or constant."""
        path, _, attribute = str(node.target).rpartition(".")
        owner = self.module.get_submodule(path)
        tensor = getattr(owner, attribute)
        wanted = shape(node)
        cut = self.stays(node)
        if not isinstance(tensor, Tensor) or not cut or tuple(tensor.shape) != wanted:
            return  # not cut, or done already under another name
        new = tensor.detach()
        for axis, mask in cut.items():
            new = new.index_select(axis, torch.from_numpy(mask.nonzero()[0]).to(new.device))
        setattr(owner, attribute, nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new)

    def _select_axes(self, node: Node) -> None:
        """Keep what stays of a tensor made of numbers."""
        last, users = node, list(node.users)
        for axis, mask in self.stays(node).items():
            last = self._index(last, last, axis, mask.nonzero()[0], after=True)
            self._stand_for(node, last)
        for user in users:
            user.replace_input_with(node, last)

    def _resize(self, node: Node) -> None:
        """Write the new sizes into a reshape; of a size that the program computes, the last free place is -1."""
        at = 2 if kind(node) == "unflatten" else 1
        sizes = list(arg(node, at, "size", arg(node, at, "sizes", arg(node, at, "shape"))))
        first = int(arg(node, 1, "dim")) % len(shape(node.args[0])) if at == 2 else 0
        new = {axis - first: length for axis, length in self.size(node).items()}
        for index, length in new.items():
            if not 0 <= index < len(sizes) or sizes[index] == -1:
                continue
            free = not any(size == -1 for size in sizes) and kind(node) != "expand"
            if isinstance(sizes[index], Node) and not free:  # of batches of any size, the share of it that stays
                sizes[index] = self._share(node, sizes[index], length, shape(node)[first + index])
            else:
                sizes[index] = -1 if isinstance(sizes[index], Node) else length
        node.args = (*node.args[:at], sizes, *node.args[at + 1 :])
        if kind(node) in ("view", "_unsafe_view"):  # what was cut may lie in memory otherwise
            node.target = torch.ops.aten.reshape.default

    def _share(self, node: Node, size: Node, new: int, old: int) -> Node:
        with self.module.graph.inserting_before(node):
            scaled = self.module.graph.call_function(operator.mul, (size, new))
            return self.module.graph.call_function(operator.floordiv, (scaled, old))

    def _on_slice(self, node: Node) -> None:
        first, last, step = arg(node, 2, "start"), arg(node, 3, "end"), arg(node, 4, "step", 1)
        self._take(node, arg(node, 1, "dim", 0), slice(first, last, step))

    def _on_narrow(self, node: Node) -> None:
        self._take(node, arg(node, 1, "dim"), slice(node.args[2], node.args[2] + node.args[3]))  # type: ignore[operator]

    def _take(self, node: Node, axis: int, positions: slice) -> None:
        axis %= len(shape(node))
        mask = self.stays(node.args[0]).get(axis)
        if mask is not None and not any(isinstance(x, Node) for x in (positions.start, positions.stop)):
            rank = np.cumsum(mask) - 1
            chosen = np.arange(len(mask))[positions]
            self._replace(node, self._index(node, node.args[0], axis, rank[chosen[mask[chosen]]]))

    def _on_select(self, node: Node) -> None:
        axis = arg(node, 1, "dim") % len(shape(node.args[0]))
        mask = self.stays(node.args[0]).get(axis)
        if mask is not None:
            node.args = (node.args[0], axis, int(mask[: int(arg(node, 2, "index")) % len(mask)].sum()))

    def _on_roll(self, node: Node) -> None:
        """Turn around the end what stays of those that were turned around it."""
        stays, shifts = self.stays(node.args[0]), list(arg(node, 1, "shifts"))
        for index, axis in enumerate(arg(node, 2, "dims") or ()):
            if (mask := stays.get(axis % len(shape(node)))) is not None:
                shifts[index] = int(mask[len(mask) - shifts[index] % len(mask) :].sum())
        node.args = (node.args[0], shifts, *node.args[2:])

    def _on_getitem(self, node: Node) -> None:
        """Take a part of a split or chunk by its new bounds."""
        whole: Any = node.args[0]
        if kind(whole) not in ("split", "split_with_sizes", "chunk", "tensor_split"):
            return
        axis = arg(whole, 2, "dim", 0) % len(shape(node))
        mask = self.stays(whole.args[0]).get(axis)
        if mask is not None:
            lengths = [number(piece.shape[axis]) for piece in whole.meta["val"]]
            index = int(node.args[1]) % len(lengths)  # type: ignore[arg-type]
            first = sum(lengths[:index])
            inside = np.arange(first, first + lengths[index])
            rank = np.cumsum(mask) - 1
            chosen = inside[mask[inside]]
            self._replace(node, self._index(node, whole.args[0], axis, rank[chosen]))

    def _on_pad(self, node: Node) -> None:
        amounts: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        for axis, mask in self.stays(node).items():
            index = 2 * (mask.ndim and len(shape(node)) - 1 - axis)
            if index < len(amounts) and any(amounts[index : index + 2]):
                before, after = amounts[index], amounts[index + 1]
                amounts[index] = int(mask[:before].sum())
                amounts[index + 1] = int(mask[len(mask) - after :].sum())
        node.args = (node.args[0], amounts, *node.args[2:])

    _on_constant_pad_nd = _on_pad

    def _on_conv2d(self, node: Node) -> None:
        groups = arg(node, 6, "groups", 1)
        axis = len(shape(node.args[0])) - len(shape(node.args[1])) + 1
        mask = self.stays(node.args[0]).get(axis)
        if mask is not None and groups > 1:
            self._set(node, 6, "groups", int(mask.sum()) * groups // len(mask))

    _on_conv1d = _on_conv3d = _on_conv_transpose1d = _on_conv_transpose2d = _on_conv_transpose3d = _on_conv2d

    def _on_group_norm(self, node: Node) -> None:
        mask, groups = self.stays(node).get(1), node.args[1]
        if mask is not None and groups > 1:  # type: ignore[operator]
            node.args = (node.args[0], int(mask.sum()) * groups // len(mask), *node.args[2:])  # type: ignore[operator]

    def _on_layer_norm(self, node: Node) -> None:
        over: Any = node.args[1]
        first = len(shape(node)) - len(over)
        new = [self.size(node).get(first + i, length) for i, length in enumerate(over)]
        node.args = (node.args[0], new, *node.args[2:])

    _on_rms_norm = _on_layer_norm

    def _recount(self, node: Node) -> None:
        """Divide by the number of elements that there were, where an operation divides by that of those that stay."""
        for counting, units in self.state.counted:
            stay = self.kept[units]
            if counting is not node or stay.all():
                continue
            share = len(stay) / int(stay.sum())
            if kind(node) == "rms_norm":
                eps = arg(node, 3, "eps")
                dtype = node.meta["val"].dtype
                self._set(node, 3, "eps", (torch.finfo(dtype).eps if eps is None else eps) * share)
                self._multiply(node, share**0.5)
            else:
                self._multiply(node, 1 / share)

    def _multiply(self, node: Node, by: float) -> None:
        with self.module.graph.inserting_after(node):
            scaled = self.module.graph.call_function(torch.ops.aten.mul.Scalar, (node, by))
        self._stand_for(node, scaled)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    def _index(
        self, node: Node, source: object, axis: int, positions: NDArray[np.int64], *, after: bool = False
    ) -> Node:
        """Return the positions of an axis of a dense tensor: as a slice where they follow each other."""
        graph = self.module.graph
        first = int(positions[0]) if len(positions) else 0
        at = node.next if after else node
        with graph.inserting_before(at):
            if np.array_equal(positions, np.arange(first, first + len(positions))):
                place_ = (source, axis, first, first + len(positions))
                return graph.call_function(torch.ops.aten.slice.Tensor, place_)  # type: ignore[arg-type]
            name = f"_positions_{next(self.numbers)}"
            device = next(self.module.parameters()).device
            self.module.register_buffer(name, torch.from_numpy(positions.copy()).to(device))
            chosen = graph.get_attr(name)
            return graph.call_function(torch.ops.aten.index_select.default, (source, axis, chosen))  # type: ignore[arg-type]

    def _replace(self, node: Node, new: Node) -> None:
        """Let `new` stand for `node` from here on."""
        self._stand_for(node, new)
        node.replace_all_uses_with(new)

    def _stand_for(self, node: Node, new: Node) -> None:
        new.meta = node.meta
        self.state.values[new] = self.state.values[node]

    def _set(self, node: Node, index: int, name: str, value: object) -> None:
        if len(node.args) > index:
            node.update_arg(index, value)  # type: ignore[arg-type]
        else:
            node.update_kwarg(name, value)  # type: ignore[arg-type]
