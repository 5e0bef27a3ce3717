"""Input channels that weights are zero for, W[:, c]: what nothing reads is not made, what others read is not selected.

Where all readers of a channel are zero for it, it can be cut with what makes it, though that is not zero (`unread`).
Where another layer reads it, the one that does not can select the channels that it reads (`select`).
"""

import copy
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from backends.equivalence import proven
from backends.layers import own_forward, replaced, weight_of
from backends.record import SELECTED, copied, record_
from backends.shapes import CroppedConv
from planner.axes import arg, kind
from planner.graph import Graph
from planner.groups import group
from planner.structures import Filter
from planner.widths import Width
from profiles.errors import BuildError

__all__ = ["select", "unread"]

log = logging.getLogger(__name__)


class _Selecting(nn.Module):
    """A layer before which `channels` of its input are selected: its own attributes are those of the smaller layer."""

    channels: Tensor

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        """Select along the axis of the channels, and go on as the layer does."""
        axis = 1 - self.get_parameter("weight").dim()
        out: Tensor = super().forward(x.index_select(axis, self.channels), *more)
        return out


class SelectedLinear(_Selecting, nn.Linear):
    """A linear layer of selected features."""


class SelectedConv1d(_Selecting, nn.Conv1d):
    """A convolution of selected channels."""


class SelectedConv2d(_Selecting, nn.Conv2d):
    """A convolution of selected channels."""


class SelectedConv3d(_Selecting, nn.Conv3d):
    """A convolution of selected channels."""


class SelectedConvTranspose1d(_Selecting, nn.ConvTranspose1d):
    """A transposed convolution of selected channels."""


class SelectedConvTranspose2d(_Selecting, nn.ConvTranspose2d):
    """A transposed convolution of selected channels."""


class SelectedConvTranspose3d(_Selecting, nn.ConvTranspose3d):
    """A transposed convolution of selected channels."""


class SelectedCroppedConv(_Selecting, CroppedConv):
    """A cropped convolution of selected channels."""


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: SelectedLinear,
    nn.Conv1d: SelectedConv1d,
    nn.Conv2d: SelectedConv2d,
    nn.Conv3d: SelectedConv3d,
    nn.ConvTranspose1d: SelectedConvTranspose1d,
    nn.ConvTranspose2d: SelectedConvTranspose2d,
    nn.ConvTranspose3d: SelectedConvTranspose3d,
    CroppedConv: SelectedCroppedConv,
}


def select(model: nn.Module, graph: Graph, where: Collection[str]) -> nn.Module:
    """Return a copy of `model` in which the layers named by `where` select the input channels that they read.

    They are linear layers and convolutions, of graphs too; of a grouped convolution every group selects alike. The
    channels are copied, which costs time: what nothing reads at all is better cut, as `rebuild` does. `graph` is
    `planner.trace(model, inputs)`, or that of the model that this one was rebuilt from.

    Raises BuildError, naming the layer, if it cannot select, has no channel to leave out, or computes anything else on
    random inputs (float64: 1e-9).
    """
    find = _in_graph if isinstance(model, GraphModule) else _in_modules
    dense = selected(model, {name: find(model, name) for name in where})
    try:
        if where:
            proven(graph, model, dense)
    except BuildError as error:
        raise BuildError(f"{', '.join(sorted(where))} cannot select its inputs: {error}") from error
    return dense


def selected(model: nn.Module, stays: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of `model` in which the layers named select the input channels that stay.

    What stays is of the shape of the weight, but 1 along all axes other than that of the input channels.
    """
    dense = copied(model)
    if isinstance(dense, GraphModule):
        for name, mask in stays.items():
            _select_in_graph(dense, name, mask)
    else:
        weights: dict[int, nn.Parameter] = {}  # a weight that several modules hold stays one
        made: dict[int, nn.Module] = {}
        for name, mask in stays.items():
            layer = dense.get_submodule(name)
            if id(layer) not in made:
                old: Any = layer.weight
                weight = weights.setdefault(id(old), _smaller(old, mask))
                made[id(layer)] = _selecting(layer, weight, mask)
        dense = replaced(dense, made)
    record_(dense, SELECTED, {weight_of(name): mask for name, mask in stays.items()})
    return dense


def _smaller(weight: Tensor, mask: Tensor) -> nn.Parameter:
    keep = mask.flatten().nonzero().flatten().to(weight.device)
    new = weight.detach().index_select(_axis(mask), keep)
    return nn.Parameter(new, requires_grad=weight.requires_grad)


def _axis(mask: Tensor) -> int:
    return next(i for i, size in enumerate(mask.shape) if size > 1)


def _selecting(layer: nn.Module, weight: nn.Parameter, mask: Tensor) -> nn.Module:
    own = _KINDS[next(k for k in _KINDS if isinstance(layer, k))]
    made: Any = own.__new__(own)
    vars(made).update({name: copy.copy(x) if isinstance(x, dict) else x for name, x in vars(layer).items()})
    channels = _positions(mask, getattr(layer, "groups", 1))
    made.weight = weight
    # Not in the state: weights of one choice of channels are no weights of another.
    made.register_buffer("channels", channels.to(weight.device), persistent=False)
    setattr(made, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(channels))
    return made  # type: ignore[no-any-return]


def _positions(mask: Tensor, groups: int) -> Tensor:
    """Return the channels of the input that stay: those of the weight in every group, or, transposed, its rows."""
    return mask.flatten().repeat(groups if _axis(mask) else 1).nonzero().flatten()


# --- which inputs a layer reads ---------------------------------------------------------------------------------------


def _stays(name: str, weight: Tensor, axis: int, groups: int) -> Tensor:
    """Return which input channels a weight is not zero for, of its shape but 1 along other axes; of none the first."""
    mask = (weight.detach() != 0).movedim(axis, 0).flatten(1).any(1).cpu()
    if mask.all():
        raise BuildError(f"{name} cannot select its inputs: its weight is zero for none of them")
    parts = mask.view(groups if axis == 0 else 1, -1)
    parts[~parts.any(1), 0] = True
    if (parts.sum(1) != parts[0].sum()).any():
        raise BuildError(f"{name} cannot select its inputs: its groups read different numbers of them")
    return mask.view([-1 if i == axis else 1 for i in range(weight.dim())])


def _in_modules(model: nn.Module, name: str) -> Tensor:
    modules = dict(model.named_modules(remove_duplicate=False))
    layer: Any = modules.get(name)
    if layer is None:
        raise BuildError(f"{name} cannot select its inputs: the model has no such layer")
    if not own_forward(layer, tuple(_KINDS)):
        kinds = "linear layer or convolution with PyTorch's own forward"
        raise BuildError(f"{name} cannot select its inputs: {type(layer).__name__} is no {kinds}")
    holders = [m for m in modules.values() if any(p is layer.weight for p in m._parameters.values())]
    if any(not own_forward(m, tuple(_KINDS)) for m in holders):
        raise BuildError(f"{name} cannot select its inputs: a module of another kind holds its weight too")
    axis = 0 if isinstance(layer, _TRANSPOSED) else 1
    return _stays(name, layer.weight, axis, getattr(layer, "groups", 1))


def _readers(model: GraphModule, name: str) -> list[Node]:
    """Return the nodes that multiply by a layer's weight."""
    held = [n for n in model.graph.nodes if n.op == "get_attr" and n.target == weight_of(name)]
    users = [user for node in held for user in node.users]
    if not users or any(not kind(user).startswith(("conv", "linear")) or user.args[1] not in held for user in users):
        raise BuildError(f"{name} cannot select its inputs: the graph has no convolution or linear layer of its weight")
    return users


def _in_graph(model: nn.Module, name: str) -> Tensor:
    assert isinstance(model, GraphModule)
    reader = _readers(model, name)[0]
    axis = 0 if kind(reader).startswith("conv_transpose") else 1
    return _stays(name, model.get_parameter(weight_of(name)), axis, arg(reader, 6, "groups", 1))


def _select_in_graph(dense: GraphModule, name: str, mask: Tensor) -> None:
    path, _, attribute = weight_of(name).rpartition(".")
    readers = _readers(dense, name)
    owner, old = dense.get_submodule(path), dense.get_parameter(weight_of(name))
    setattr(owner, attribute, _smaller(old, mask))
    positions = _positions(mask, arg(readers[0], 6, "groups", 1)).to(old.device)
    buffer = f"_selected_{weight_of(name).replace('.', '_')}"
    dense.register_buffer(buffer, positions)
    for node in readers:
        with dense.graph.inserting_before(node):
            chosen = dense.graph.get_attr(buffer)
            given = (node.args[0], 1 - mask.dim(), chosen)
            node.update_arg(0, dense.graph.call_function(torch.ops.aten.index_select.default, given))
    dense.recompile()


# --- channels that nothing reads --------------------------------------------------------------------------------------


def unread(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    """Return the channels that something reads, of each width that has others: these can be cut though not zero.

    Nothing reads a channel if the weights of all operations that sum over it are zero for it, or are read by nothing
    themselves. One channel stays of each width. Widths whose channels are also counted, as by a normalisation, or of
    which the model computes something else without the others on random inputs (float64: 1e-9), have none.
    """
    counted = {name for _, extent in graph.counted for name, _ in extent.parts}
    able = [w for w in graph.cuttable if w.lossy is None and w.name not in counted and any(s.reads for s in w.slices)]
    found = _unread(model, able)
    if found and not _same(model, graph, [graph.width[name] for name in found], found):
        right = [graph.width[name] for name in found if _same(model, graph, [graph.width[name]], found)]
        log.info("channels of %d widths are read by more than their layers' weights", len(found) - len(right))
        found = _unread(model, right)
        if not _same(model, graph, right, found):
            return {}
    return {name: stays.nonzero().flatten() for name, stays in found.items()}


def _unread(model: nn.Module, widths: Sequence[Width]) -> dict[str, Tensor]:
    """Return for each width that has channels that nothing reads which of its channels stay, (size,) bool."""
    masked = copy.deepcopy(model)
    before = {width.name: torch.ones(width.size, dtype=torch.bool) for width in widths}
    while True:
        parameters = dict(masked.named_parameters())
        stays = {width.name: before[width.name] & _read(width, parameters) for width in widths}
        for name, own in stays.items():
            if not own.any():
                own[before[name].nonzero()[0]] = True
        if all(torch.equal(own, before[name]) for name, own in stays.items()):
            return {name: own for name, own in stays.items() if not own.all()}
        _zero_(masked, widths, stays)
        before = stays


def _read(width: Width, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return which channels of a width a weight is not zero for, (size,) bool."""
    stays = torch.zeros(width.size, dtype=torch.bool)
    for piece in width.slices:
        if piece.reads:
            weight = parameters[piece.tensor].detach() != 0
            units = torch.from_numpy(piece.units)
            stays[units[weight.movedim(piece.axis, 0).flatten(1).any(1).cpu() & (units >= 0)]] = True
    return stays


def _zero_(model: nn.Module, widths: Sequence[Width], stays: Mapping[str, Tensor]) -> None:
    groups = group([Filter(width) for width in widths], model)
    scale = torch.cat([stays[width.name] for width in widths])
    groups.scale_(dict(model.named_parameters()), scale.to(groups.structure.device, torch.float32))


def _same(model: nn.Module, graph: Graph, widths: Sequence[Width], stays: Mapping[str, Tensor]) -> bool:
    """Whether a model computes the same without all other channels of some widths."""
    if not widths:
        return True
    masked = copy.deepcopy(model)
    _zero_(masked, widths, stays)
    try:
        proven(graph, model, masked)
    except BuildError:
        return False
    return True
