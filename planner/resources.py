"""What a choice costs, each as sums of terms that one or two axes decide: time, operations, parameters, activations."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import nn

from planner.graph import Graph
from planner.latency import Costs
from planner.operations import Choice, Extent, Operation
from planner.roofline import BYTES
from profiles import Profile


@dataclass(frozen=True)
class Product:
    """A price that is proportional to the length of every axis."""

    factor: float

    def __call__(self, *lengths: int) -> float:
        """Return the price at these lengths."""
        return self.factor * math.prod(lengths)


@dataclass(frozen=True)
class Term:
    """A cost that depends on the lengths of some axes: gone with any of `blocks`, there once all of `after` left."""

    extents: tuple[Extent, ...]
    blocks: frozenset[str]
    price: Callable[..., float]
    after: frozenset[str] = frozenset()

    def under(self, choice: Choice) -> float:
        """Return the cost under a choice that names every width."""
        if not (self.blocks.isdisjoint(choice.removed) and self.after <= choice.removed):
            return 0.0
        return self.price(*(extent.under(choice) for extent in self.extents))


@dataclass(frozen=True)
class Resource:
    """What can be limited: the largest of several sums of terms; what one choice needs may be known better."""

    name: str
    unit: str
    sums: tuple[tuple[Term, ...], ...]
    constant: float = 0.0
    known: tuple[Choice, float] | None = None

    def under(self, choice: Choice) -> float:
        """Return how much of it a choice needs."""
        if self.known is not None and choice == self.known[0]:
            return self.known[1]
        return self.constant + max((sum(term.under(choice) for term in terms) for terms in self.sums), default=0.0)


def time(graph: Graph, costs: Costs, name: str) -> Resource:
    """Return the seconds of one run."""
    sums, each_s, kept_s = [_priced(graph, costs, 0.0)], 0.0, 0.0
    for reload in sorted(costs.reloads, key=lambda own: own.beyond):  # the latency is convex in all weights
        each_s, kept_s = each_s + reload.each_s, kept_s + reload.each_s * reload.beyond
        sums.append((*_priced(graph, costs, each_s), Term((), frozenset(), Product(-kept_s))))
    whole_s = costs.whole_s(graph)
    known = None if whole_s is None else (graph.dense, whole_s)
    return Resource(name, "s", tuple(sums), costs.overhead_s, known)


def _priced(graph: Graph, costs: Costs, each_s: float) -> tuple[Term, ...]:
    """Return the operations' costs, with so many seconds for each of their weights."""
    terms, known = [], dict[Operation, dict[tuple[int, int], float]]()
    for operation in graph.operations:
        own = tuple(trim.name for trim in graph.trims_of.get(operation.weight, ()))
        extents = (operation.inputs, operation.outputs, *map(_count, own))
        made = operation.moved(frozenset()) if costs.moves_strides else operation
        price = _Cost(costs, made, own, each_s, known)
        terms.append(Term(extents, operation.blocks, price))
        for gone, change in _changes(operation, price) if costs.moves_strides else ():
            terms.append(Term(extents, operation.blocks, change, gone))
    return tuple(terms)


def _changes(operation: Operation, price: "_Cost") -> Iterator[tuple[frozenset[str], "_Change"]]:
    """Yield what an operation costs more once blocks have left, so that the sum is what it costs then.

    What it is under a set of them is what the largest known set within says, and known sets are closed under union:
    each adds its own cost less that of the whole and less what the smaller ones within have added.
    """
    shares: dict[frozenset[str], dict[Operation, int]] = {}
    for gone, made in operation.strided:
        if not gone:
            continue
        own = Counter({made: 1})
        own.subtract({price.operation: 1})
        for smaller, added in shares.items():
            if smaller < gone:
                own.subtract(added)
        shares[gone] = {each: times for each, times in own.items() if times}
        yield gone, _Change(tuple((replace(price, operation=each), times) for each, times in shares[gone].items()))


@dataclass(frozen=True)
class _Change:
    """A sum of prices, each as often as it says."""

    prices: tuple[tuple["_Cost", int], ...]

    def __call__(self, *lengths: int) -> float:
        return sum(times * price(*lengths) for price, times in self.prices)


@dataclass(frozen=True)
class _Cost:
    costs: Costs
    operation: Operation
    trims: tuple[str, ...]
    each_s: float  # of its weights
    known: dict[Operation, dict[tuple[int, int], float]]  # of all operations: many of a network are alike

    def __call__(self, inputs: int, outputs: int, *kept: int) -> float:
        if kept:
            return self._price(*self.operation.trimmed(dict(zip(self.trims, kept, strict=True)), inputs, outputs))
        if (inputs, outputs) not in self._alike:
            self._alike[inputs, outputs] = self._price(self.operation, inputs, outputs)
        return self._alike[inputs, outputs]

    def _price(self, made: Operation, inputs: int, outputs: int) -> float:
        return self.costs.cost(made, inputs, outputs) + self.each_s * made.weights(inputs, outputs)

    @cached_property
    def _alike(self) -> dict[tuple[int, int], float]:
        """What is known of operations that differ in where they are, and in what decides their widths, alone."""
        alike = replace(self.operation, name="", where="", weight="", blocks=frozenset(), strided=())
        alike = replace(alike, inputs=_NOWHERE, outputs=_NOWHERE)
        return self.known.setdefault(alike, {})


_NOWHERE = Extent(0, ())


def _count(name: str) -> Extent:
    return Extent(0, ((name, 1),))


def _thinned(graph: Graph, tensor: str, axes: tuple[Extent, ...], factor: float) -> tuple[tuple[Extent, ...], Product]:
    """Return the axes with those of the trims that leave fewer weights, and the price per length of each.

    Inputs are selected where all channels of the axis stay only, so that the product counts those that are read.
    """
    thin = [trim for trim in graph.trims_of.get(tensor, ()) if trim.thins]
    return (*axes, *(_count(trim.name) for trim in thin)), Product(factor / math.prod(trim.size for trim in thin))


def operations(graph: Graph) -> Resource:
    """Return the multiply-accumulates of one run."""
    terms = []
    for o in graph.operations:
        if o.macs_per_pair:
            axes = (o.outputs,) if o.grouped else (o.inputs, o.outputs)
            extents, price = _thinned(graph, o.weight, axes, o.macs_per_pair)
            terms.append(Term(extents, o.blocks, price))
    return Resource("macs", "", (tuple(terms),))


def parameters(graph: Graph, model: nn.Module) -> Resource:
    """Return the number of trained numbers."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    axes = _axes(graph, shapes)
    inside = {block.name: block.modules for block in graph.blocks}
    terms = []
    for name, shape in shapes.items():
        blocks = frozenset(b for b, modules in inside.items() if name.rpartition(".")[0] in modules)
        whole = math.prod(size for axis, size in enumerate(shape) if (name, axis) not in axes)
        extents = tuple(axes[name, axis] for axis in range(len(shape)) if (name, axis) in axes)
        extents, price = _thinned(graph, name, extents, whole)
        terms.append(Term(extents, blocks, price))
    return Resource("parameters", "", (tuple(terms),))


def _axes(graph: Graph, shapes: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], Extent]:
    """Return the length of every axis of a parameter that a width can cut."""
    parts: dict[tuple[str, int], dict[str, int]] = {}
    for width in graph.cuttable:
        for piece in width.slices:
            if piece.tensor in shapes:
                own = parts.setdefault((piece.tensor, piece.axis), {})
                own[width.name] = own.get(width.name, 0) + int(np.count_nonzero(piece.units >= 0)) // width.size
    return {
        (tensor, axis): Extent(
            shapes[tensor][axis] - sum(times * graph.width[name].size for name, times in own.items()),
            tuple(own.items()),
        )
        for (tensor, axis), own in parts.items()
    }


def model_bytes(graph: Graph, model: nn.Module, profile: Profile) -> Resource:
    """Return the bytes of the parameters in the profile's number format, without what a file adds."""
    found, each = parameters(graph, model), BYTES[profile.dtype.weights]
    return Resource("model_bytes", "B", tuple(tuple(_times(term, each) for term in terms) for terms in found.sums))


def activation_bytes(graph: Graph, profile: Profile) -> Resource:
    """Return the most bytes of activations that are needed at once, in the profile's number format."""
    each = BYTES[profile.dtype.activations]
    sums = tuple(
        tuple(Term((a.channels,), a.blocks, Product(a.per_channel * each)) for a in alive) for alive in graph.alive
    )
    return Resource("activation_bytes", "B", sums)


def _times(term: Term, factor: float) -> Term:
    assert isinstance(term.price, Product)
    return Term(term.extents, term.blocks, Product(term.price.factor * factor))


def on_chip_bytes(profile: Profile) -> int | None:
    """Return the capacity of the largest memory on the chip, None if the profile does not state one."""
    return max((m.capacity_bytes for m in profile.memory if m.on_chip and m.capacity_bytes), default=None)


def widths_of(extents: Collection[Extent]) -> tuple[str, ...]:
    """Return the widths that decide the lengths of some axes, in order."""
    return tuple(dict.fromkeys(name for extent in extents for name, _ in extent.parts))
