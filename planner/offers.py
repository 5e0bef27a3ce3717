"""Offers: the layers whose inputs, kernels or weights of every M a plan may trim, since that pays on the device."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from planner.graph import Graph, aliases
from planner.operations import Extent, Operation, crops
from planner.scope import Scope
from planner.structures import NM, Channel, Kernel
from planner.trims import Trim
from profiles import Profile
from profiles.evidence import UNPROVEN
from profiles.schema import Structure

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FEW = 4  # numbers of inputs that are considered for one layer
Kind = type[Channel | Kernel | NM]


def trimmable(graph: Graph, model: nn.Module, profile: Profile, scope: Scope) -> Graph:
    """Return the graph with the trims that pay on the device.

    That is where the profile says so with evidence, and states the conditions, if any, so that they can be checked
    here; or, forced, wherever the pattern is known.
    """
    known: dict[Kind, Structure | None] = {own: profile.pays(own.profile_kind) for own in (Channel, Kernel, NM)}
    kinds = {own: said for own, said in known.items() if scope.force or _pays(said)}
    trims = tuple(_Offers(graph, model, profile, scope, kinds).all()) if kinds else ()
    patterns = {trim.groups.tensor: trim.name.split()[-1] for trim in trims if not trim.thins}
    operations = tuple(own.with_pattern(patterns.get(own.weight, "")) for own in graph.operations)
    return replace(graph, trims=trims, operations=operations)


def _pays(known: Structure | None) -> bool:
    if known is None or known.confidence in UNPROVEN:
        return False
    return known.pays == "yes" or known.where is not None


@dataclass(frozen=True)
class _Layer:
    """A layer that holds a weight alone, and one of the operations that it makes."""

    tensor: str
    module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    operation: Operation

    @property
    def inputs(self) -> int:
        """The inputs of each group."""
        return self.module.weight.shape[1]


@dataclass(frozen=True)
class _Offers:
    graph: Graph
    model: nn.Module
    profile: Profile
    scope: Scope
    kinds: dict[Kind, Structure | None]

    def all(self) -> Iterator[Trim]:
        """Yield the trims of every layer, inputs first."""
        for layer in self._layers():
            selects = list(self._inputs(layer)) if Channel in self.kinds else []
            yield from selects
            yield from self._kernel(layer) if Kernel in self.kinds else ()
            yield from self._pattern(layer, selects) if NM in self.kinds else ()

    def _layers(self) -> Iterator[_Layer]:
        """Yield the layers of PyTorch's own kinds whose weights nothing else holds, and that the scope allows."""
        modules, names = dict(self.model.named_modules()), aliases(self.model)
        first = {own.weight: own for own in reversed(self.graph.operations) if len(names.get(own.weight, ())) == 1}
        for tensor, operation in reversed(first.items()):
            path = tensor.rpartition(".")[0]
            module = modules.get(path)
            if type(module) in (nn.Linear, *_CONVOLUTIONS) and self.scope.reason([path], modules) is None:
                yield _Layer(tensor, module, operation)  # type: ignore[arg-type]

    def _inputs(self, layer: _Layer) -> Iterator[Trim]:
        """Yield how many inputs a layer may select, of what others read too: the rest is decided with its width."""
        least = self.scope.min_width if isinstance(self.scope.min_width, int) else 1
        if layer.operation.grouped or self._alone(layer):
            return
        quantum = self.profile.quantum(layer.operation.kind, "in_channels", layer.operation.kernel)
        step = quantum * max(1, math.ceil(layer.inputs / quantum / _FEW))
        counts = (*(n for n in range(step, layer.inputs, step) if n >= least), layer.inputs)
        if len(counts) > 1:
            yield Trim(Channel(layer.tensor, layer.inputs), layer.inputs, counts, self._whole(layer.operation.inputs))

    def _alone(self, layer: _Layer) -> bool:
        """Whether all that a layer reads are widths that nothing else reads."""
        names = [name for name, _ in layer.operation.inputs.parts]
        pieces = [piece for name in names for piece in self.graph.width[name].slices if piece.reads]
        return layer.operation.inputs.fixed == 0 and all(piece.tensor == layer.tensor for piece in pieces)

    def _kernel(self, layer: _Layer) -> Iterator[Trim]:
        """Yield the kernels that one of odd size can be cropped to, where its padding is wide enough for all."""
        conv = layer.module
        if not isinstance(conv, _CONVOLUTIONS):
            return
        size, padding = conv.kernel_size, conv.padding
        borders = [d * (k // 2) for d, k in zip(conv.dilation, size, strict=True)]
        pads = [0] * len(size) if isinstance(padding, str) else padding
        wide = padding == "same" or all(pad >= own for pad, own in zip(pads, borders, strict=True))
        if wide and max(size) > 1 and all(each % 2 for each in size):
            counts = tuple(math.prod(own) for own in crops(size))
            yield Trim(Kernel(layer.tensor, tuple(size)), counts[-1], counts, {})

    def _pattern(self, layer: _Layer, selects: list[Trim]) -> Iterator[Trim]:
        """Yield N of every M weights, where all inputs stay, as M that follow each other must be neighbours at last."""
        known = self.kinds[NM]
        if known is None or layer.operation.grouped:
            return
        n, m = map(int, (known.pattern or "").split(":"))
        needs = self._where(layer, known)
        if needs is not None and layer.inputs % m == 0:
            needs |= self._whole(layer.operation.inputs) | {own.name: frozenset({own.size}) for own in selects}
            yield Trim(NM(layer.tensor, layer.module.weight.numel(), n, m), m, (n, m), needs)

    def _where(self, layer: _Layer, known: Structure) -> dict[str, frozenset[int]] | None:
        """Return what the outputs must be for the conditions of the profile; None if they cannot hold."""
        where = known.where
        if where is None or self.scope.force:
            return {}
        if (where.ops and layer.operation.kind not in where.ops) or not where.fits("in_channels", layer.inputs):
            return None
        outputs = layer.operation.outputs
        if len(outputs.parts) != 1:
            return self._whole(outputs) if where.fits("out_channels", outputs.under(self.graph.dense)) else None
        ((name, times),) = outputs.parts
        fits = (n for n in range(1, self._size(name) + 1) if where.fits("out_channels", outputs.fixed + times * n))
        return {name: frozenset(fits)}

    def _whole(self, extent: Extent) -> dict[str, frozenset[int]]:
        """Return that all channels along an axis stay."""
        return {name: frozenset({self._size(name)}) for name, _ in extent.parts}

    def _size(self, name: str) -> int:
        return self.graph.width[name].size
