"""Dense convolutions from kernels with positions that are zero in all filters: SSL's shape fibres W[:, c, y, x].

Wen et al. 2016 leave such fibres zero; where they line up at the borders of a kernel it is cropped (`crop`), and where
they do not, what stays can be gathered into a 1x1 convolution (`gather`).
"""

import copy
import itertools
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backends.equivalence import TOLERANCE_FLOAT64, proven
from backends.layers import as_many, own_forward, replaced, weight_of
from backends.record import CROPPED, GATHERED, copied, record_
from planner.graph import Graph
from profiles.errors import BuildError

__all__ = ["CroppedConv", "GatheredConv2d", "crop", "gather"]

log = logging.getLogger(__name__)
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Pads = tuple[tuple[int, int], ...]  # per axis: positions added before and after; where negative, left out
Windows = tuple[tuple[int, int, int, int], ...]  # y, x, and where its channels begin and end among those gathered
Bounds = tuple[tuple[int, int], ...]  # per axis of a kernel: the first position that stays, and the end


class _Like(nn.Module):
    """What the two convolutions here share: all of the one that they stand for but its kernel and padding."""

    bias: Tensor | None
    in_channels: int
    out_channels: int
    groups: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str

    def __init__(self, conv: "Conv | CroppedConv", weight: nn.Parameter, pads: Pads) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", conv._parameters["bias"])
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.stride, self.dilation = tuple(conv.stride), tuple(conv.dilation)
        self.pads, self.padding_mode = pads, conv.padding_mode
        self.train(conv.training)

    def extra_repr(self) -> str:
        """Return what is printed of it."""
        return (
            f"{self.in_channels}, {self.out_channels}, weight={tuple(self.weight.shape)}, stride={self.stride}, "
            f"pads={self.pads}, dilation={self.dilation}, groups={self.groups}, padding_mode={self.padding_mode}"
        )


class CroppedConv(_Like):
    """A convolution in one, two or three dimensions whose padding differs before and after, or is negative."""

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve."""
        convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(self.pads) - 1]
        x = _padded(x, self.pads, self.padding_mode)
        return convolve(x, self.weight, self.bias, stride=self.stride, dilation=self.dilation, groups=self.groups)


class GatheredConv2d(_Like):
    """y = Σ_p W_p x[c_p, s·i + d·y_p, s·j + d·x_p] + b over the P positions p = (c, y, x) that stay of a kernel.

    `weight` is (outputs, P, 1, 1), ordered by y, x and channel; of groups each has the same positions.
    """

    channels: Tensor

    def __init__(self, conv: nn.Conv2d | CroppedConv, alive: Tensor) -> None:
        """Take what is `alive`, (inputs per group, height, width), of the kernel of `conv`."""
        places = itertools.product(*map(range, alive.shape[1:]))
        found = [(y, x, alive[:, y, x].nonzero().flatten()) for y, x in places if alive[:, y, x].any()]
        ends = list(itertools.accumulate(len(own) for _, _, own in found))
        windows = tuple((y, x, end - len(own), end) for (y, x, own), end in zip(found, ends, strict=True))
        channels = torch.cat([own for _, _, own in found])
        weight = _taken(conv.weight.detach(), windows, channels)
        super().__init__(conv, nn.Parameter(weight, requires_grad=conv.weight.requires_grad), _pads(conv))
        self.kernel, self.windows = tuple(alive.shape[1:]), windows
        # Not in the state: weights of one choice of positions are no weights of another.
        self.register_buffer("channels", channels, persistent=False)

    def take(self, weight: Tensor) -> Tensor:
        """Return, as (outputs, P, 1, 1), what stays of a tensor of the shape of the whole kernel."""
        return _taken(weight, self.windows, self.channels.to(weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Gather the positions that stay, window by window, and multiply."""
        x = _padded(x, self.pads, self.padding_mode)
        inputs = self.in_channels // self.groups
        if self.groups > 1:
            x = x.view(*x.shape[:-3], self.groups, inputs, *x.shape[-2:])
        pieces = []
        for row, column, first, end in self.windows:
            piece = x[..., self._along(0, row), self._along(1, column)]
            pieces.append(piece if end - first == inputs else piece.index_select(-3, self.channels[first:end]))
        gathered = torch.cat(pieces, -3) if len(pieces) > 1 else pieces[0]
        if self.groups > 1:
            gathered = gathered.flatten(-4, -3)
        return F.conv2d(gathered, self.weight, self.bias, groups=self.groups)

    def _along(self, axis: int, position: int) -> slice:
        """Return what a kernel's position sees: of static bounds, so that no size becomes part of an exported graph."""
        step = self.dilation[axis]
        rest = step * (self.kernel[axis] - 1 - position)
        return slice(step * position, -rest or None, self.stride[axis])


def _taken(weight: Tensor, windows: Windows, channels: Tensor) -> Tensor:
    pieces = [weight[:, channels[first:end], y, x] for y, x, first, end in windows]
    return torch.cat(pieces, 1)[:, :, None, None]


def crop(model: nn.Module, graph: Graph, *, ignored_layers: Collection[str] = ()) -> nn.Module:
    """Return a copy of `model` whose convolutions have no rows or columns of zeros at the borders of their kernels.

    y[i] = Σ_{k=a}^{K-1-b} W[k] x[s·i + d·k - l]: the K - a - b positions from a on, with padding l - d·a before and
    r - d·b after; a 3x3 kernel with nothing but its centre becomes 1x1. Where both are equal and not negative the
    module stays what it is, else a `CroppedConv` takes its place. Modules whose forward or weight is not PyTorch's own
    (hooks, parametrisations, weights that other kinds of modules hold too) stay as they are; so do exported graphs.
    `graph` is `planner.trace(model, inputs)`, or that of the model that this one was rebuilt from.

    Raises BuildError, naming the layer, if the copy computes anything else on random inputs (float64: 1e-9).
    """
    bounds = {name: _bounds(_alive(layer.weight).any(0)) for name, layer in _croppable(model, ignored_layers).items()}
    dense = cropped(model, bounds)
    for name in bounds:
        _prove_layer(name, model.get_submodule(name), dense.get_submodule(name))
    try:
        if bounds:
            proven(graph, model, dense)
    except BuildError as error:
        worst = next((name for name in bounds if not _fits(graph, model, cropped(model, {name: bounds[name]}))), "")
        named = worst or ", ".join(bounds)
        raise BuildError(f"{named} cannot be cropped: {error}; name it in ignored_layers") from error
    return dense


def crop_where_right(model: nn.Module, graph: Graph) -> nn.Module:
    """Return what `crop` returns, without the layers for which it raises; these are logged."""
    return as_many(lambda own, names: crop(own, graph, ignored_layers=_but(own, names)), model, _croppable(model, ()))


def _but(model: nn.Module, names: Collection[str]) -> list[str]:
    return [name for name in _croppable(model, ()) if name not in names]


def gather(model: nn.Module, graph: Graph, where: Collection[str]) -> nn.Module:
    """Return a copy of `model` in which the two-dimensional convolutions named by `where` are `GatheredConv2d`.

    It multiplies only at the (channel, y, x) positions of a kernel that are not zero in all filters, but copies their
    inputs into one tensor first, which a convolution proper does not. That pays on few devices, and where it does only
    for kernels most of whose positions are zero: measure, and name the layers that gain. What can be cropped, crop
    first. A saved state fits the modules that are made from the same zeros.

    Raises BuildError, naming the layer, if it is no such convolution, has no position to leave out, or computes
    anything else on random inputs (float64: 1e-9).
    """
    alive = {name: _alive(_gatherable(model, name).weight) for name in where}
    dense = gathered(model, alive)
    for name in where:
        _prove_layer(name, model.get_submodule(name), dense.get_submodule(name))
    try:
        if where:
            proven(graph, model, dense)
    except BuildError as error:
        raise BuildError(f"{', '.join(sorted(where))} cannot be gathered: {error}") from error
    return dense


# --- which convolutions -----------------------------------------------------------------------------------------------


def _croppable(model: nn.Module, ignored: Collection[str]) -> dict[str, Conv]:
    """Return the convolutions, by all their names, that have zeros at the borders and weights held by no others."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if unknown := sorted(set(ignored) - set(modules)):
        raise BuildError(f"the model has no layer {unknown[0]}, which ignored_layers names")
    left = {id(modules[name]) for name in ignored}
    found = {name: layer for name, layer in modules.items() if own_forward(layer) and id(layer) not in left}
    mine = {id(layer) for layer in found.values()}
    others = {id(p) for module in modules.values() if id(module) not in mine for p in module._parameters.values()}
    return {name: layer for name, layer in found.items() if id(layer.weight) not in others and not _is_whole(layer)}


def _gatherable(model: nn.Module, name: str) -> nn.Conv2d | CroppedConv:
    modules = dict(model.named_modules(remove_duplicate=False))
    layer = modules.get(name)
    if layer is None:
        raise BuildError(f"{name} cannot be gathered: the model has no such layer")
    flat = isinstance(layer, CroppedConv) and len(layer.pads) == 2
    if not flat and not (isinstance(layer, nn.Conv2d) and own_forward(layer)):
        raise BuildError(f"{name} cannot be gathered: {type(layer).__name__} is no Conv2d with PyTorch's own forward")
    assert isinstance(layer, nn.Conv2d | CroppedConv)
    if any(p is layer.weight for m in modules.values() if m is not layer for p in m._parameters.values()):
        raise BuildError(f"{name} cannot be gathered: another module holds its weight too")
    if _alive(layer.weight).all():
        raise BuildError(f"{name} cannot be gathered: none of its (channel, y, x) positions is zero in all filters")
    return layer


# --- what stays of a kernel -------------------------------------------------------------------------------------------


def _alive(weight: Tensor) -> Tensor:
    """Return which (channel, *position) are not zero in all filters; of nothing but zeros the centre."""
    alive = (weight.detach() != 0).any(0)
    if not alive.any():
        alive[(0, *(size // 2 for size in alive.shape[1:]))] = True
    return alive


def _bounds(alive: Tensor) -> Bounds:
    """Return along each axis the first position at which anything stays, and the end."""
    places = alive.nonzero()
    return tuple(zip(places.amin(0).tolist(), (places.amax(0) + 1).tolist(), strict=True))


def _is_whole(layer: Conv) -> bool:
    return _bounds(_alive(layer.weight).any(0)) == tuple((0, size) for size in layer.kernel_size)


def _pads(layer: Conv | CroppedConv) -> Pads:
    """Return what a convolution pads before and after along each axis."""
    if isinstance(layer, CroppedConv):
        return layer.pads
    if layer.padding == "valid":
        return tuple((0, 0) for _ in layer.kernel_size)
    if isinstance(layer.padding, str):  # "same": one more after than before where the sum is odd
        sums = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in sums)
    return tuple((size, size) for size in layer.padding)


def _padded(x: Tensor, pads: Pads, padding_mode: str) -> Tensor:
    """Return `x` with what the padding adds to it, then without what it leaves out."""
    added = [max(0, size) for pair in reversed(pads) for size in pair]
    if any(added):
        x = F.pad(x, added, mode="constant" if padding_mode == "zeros" else padding_mode)
    if min(map(min, pads)) < 0:
        index: tuple[Any, ...] = tuple(slice(max(0, -before) or None, min(0, after) or None) for before, after in pads)
        x = x[(..., *index)]
    return x


# --- the copy ---------------------------------------------------------------------------------------------------------


def cropped(model: nn.Module, bounds: Mapping[str, Bounds]) -> nn.Module:
    """Return a copy of `model` in which the kernels of the convolutions named have these bounds."""
    dense = copied(model)
    weights: dict[int, nn.Parameter] = {}  # a weight that several modules hold stays one
    made: dict[int, nn.Module] = {}
    for name, own in bounds.items():
        layer = dense.get_submodule(name)
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if id(layer) not in made:
            old = layer.weight
            weight = weights.setdefault(id(old), nn.Parameter(within(old.detach(), own), old.requires_grad))
            made[id(layer)] = _narrowed(layer, weight, own)
            log.info("%s: kernel %s cropped to %s", name, tuple(old.shape[2:]), tuple(weight.shape[2:]))
    before: dict[str, Bounds] = vars(dense)[CROPPED]
    after = {weight_of(name): _shifted(own, before.get(weight_of(name))) for name, own in bounds.items()}
    dense = replaced(dense, made)
    record_(dense, CROPPED, after)
    return dense


def gathered(model: nn.Module, alive: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of `model` in which the convolutions named gather what is alive of their kernels."""
    dense = copied(model)
    made: dict[int, nn.Module] = {}
    for name, own in alive.items():
        layer = dense.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | CroppedConv)
        made.setdefault(id(layer), GatheredConv2d(layer, own))
    dense = replaced(dense, made)
    record_(dense, GATHERED, {weight_of(name): own for name, own in alive.items()})
    return dense


def within(tensor: Tensor, bounds: Bounds) -> Tensor:
    """Return a copy of what lies within `bounds` along the last axes of `tensor`."""
    index: tuple[Any, ...] = tuple(slice(*each) for each in bounds)
    return tensor[(..., *index)].clone()


def _shifted(bounds: Bounds, before: Bounds | None) -> Bounds:
    """Return bounds in the kernel as it was before it was cropped for the first time."""
    starts = [first for first, _ in before] if before else [0] * len(bounds)
    return tuple((start + first, start + end) for start, (first, end) in zip(starts, bounds, strict=True))


def _narrowed(layer: Conv, weight: nn.Parameter, bounds: Bounds) -> nn.Module:
    """Return a convolution with what `bounds` leave of its kernel: itself, where it can say so."""
    sizes = zip(_pads(layer), bounds, layer.kernel_size, layer.dilation, strict=True)
    pads = tuple((left - d * first, right - d * (k - end)) for (left, right), (first, end), k, d in sizes)
    if any(before != after or before < 0 for before, after in pads):
        return CroppedConv(layer, weight, pads)
    layer.weight = weight
    layer.kernel_size = tuple(weight.shape[2:])
    layer.padding = tuple(before for before, _ in pads)
    layer._reversed_padding_repeated_twice = [size for pair in reversed(pads) for size in pair]
    return layer


# --- the proof --------------------------------------------------------------------------------------------------------


def _prove_layer(name: str, before: nn.Module, after: nn.Module) -> None:
    """Raise BuildError if two convolutions differ on random inputs of two sizes, in float64."""
    assert isinstance(before, Conv | CroppedConv)
    old, new = (copy.deepcopy(layer).to("cpu", torch.float64) for layer in (before, after))
    spans = [d * (k - 1) + 1 for d, k in zip(before.dilation, before.weight.shape[2:], strict=True)]
    generator = torch.Generator().manual_seed(0)
    for more in (1, 4):
        sizes = [span + sum(map(abs, pads)) + more for span, pads in zip(spans, _pads(before), strict=True)]
        x = torch.randn(2, before.in_channels, *sizes, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            expected, found = old(x), new(x)
        if expected.shape != found.shape or not _near(found, expected):
            raise BuildError(f"{name} would compute something else with fewer positions; this is a fault of espalier")


def _near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE_FLOAT64 * expected.abs().max())


def _fits(graph: Graph, model: nn.Module, dense: nn.Module) -> bool:
    with suppress(BuildError):
        proven(graph, model, dense)
        return True
    return False
