"""The operations that cost time, how wide each is under a choice, and what a choice is.

Listed are what multiplies (convolutions, linear layers, matrix products, recurrent layers) and what only moves data and
is not fused behind one of these: normalisations, poolings, joins, functions of each element.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch.fx import Node

from planner.axes import Ids, Propagation, arg, kind, number, place, shape
from planner.blocks import Block, module_path
from planner.contractions import Side, products
from planner.strides import convolution, demands, variants


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
    """A node of the program that costs time, with what is fused behind it."""

    name: str
    signature: str  # everything that decides its time but its two widths
    inputs: Extent
    outputs: Extent
    macs_per_pair: int  # multiply-accumulates per (input channel, output channel); per output channel if grouped
    grouped: bool
    blocks: frozenset[str]  # it vanishes with any of these
    where: str  # "conv2d at file:line"
    read_per_input: int = 0  # elements of activations read per input channel
    moved_per_output: int = 0  # elements of activations written per output channel, and read to be added there
    weights_per_pair: int = 0  # elements of weights per (input channel, output channel); per output channel if grouped
    weight: str = ""  # the parameter that it multiplies by, if it is one layer's
    kernel: tuple[int, ...] = ()
    pattern: str = ""  # "n:m" if n of every m of its weights may be kept
    sparse: bool = False  # whether that many are
    copied_per_input: int = 0  # elements that are copied per input channel, where it selects those that it reads
    whole: "Operation | None" = None  # what it was before it was trimmed
    strided: "tuple[tuple[frozenset[str], Operation], ...]" = ()  # what it is with moved strides, once blocks have left

    def present(self, choice: Choice) -> bool:
        """Whether the operation is still there under `choice`."""
        return self.blocks.isdisjoint(choice.removed)

    def widths(self, choice: Choice) -> tuple[int, int]:
        """Return its input and output channels under `choice`."""
        return self.inputs.under(choice), self.outputs.under(choice)

    def under(self, choice: Choice, *, strides: bool = False) -> "tuple[Operation, int, int]":
        """Return what is left of it under `choice`, with its input and output channels.

        With `strides`, as it is in a runtime that moves them, see planner.strides.
        """
        made = self.moved(choice.removed) if strides and self.strided else self
        return made.trimmed(choice.keep, *self.widths(choice))

    def moved(self, removed: frozenset[str]) -> "Operation":
        """Return what it is once these blocks have left and strides have moved."""
        return next((own for gone, own in reversed(self.strided) if gone <= removed), self)

    def with_pattern(self, pattern: str) -> "Operation":
        """Return it with the pattern of which its weights may keep some."""
        strided = tuple((gone, own.with_pattern(pattern)) for gone, own in self.strided)
        return replace(self, pattern=pattern, strided=strided)

    def trimmed(self, keep: Mapping[str, int], inputs: int, outputs: int) -> "tuple[Operation, int, int]":
        """Return it with what `keep` leaves of its kernel, of every m weights, and of the inputs that it reads.

        Its signature says all of that, but for the kernel of another size, as which it is any other operation.
        """
        made, (n, m) = self, map(int, (self.pattern or "1:1").split(":"))
        if keep.get(f"{self.weight} kernel", math.inf) < math.prod(self.kernel):
            made = _of_kernel(made, cropped(self.kernel, keep[f"{self.weight} kernel"]))
        if keep.get(f"{self.weight} {self.pattern}", m) < m:
            made = replace(made, signature=_inserted(made, f"{n}:{m}"), sparse=True)
        if (read := min(inputs, keep.get(f"{self.weight} channel", inputs))) < inputs:
            made = replace(made, signature=_inserted(made, f"of{inputs}"), copied_per_input=self.read_per_input)
        return (self if made is self else replace(made, whole=self)), read, outputs

    def macs(self, choice: Choice) -> int:
        """Return its multiply-accumulates under `choice`, those with zeros included."""
        if not self.present(choice):
            return 0
        made, inputs, outputs = self.under(choice)
        return made.macs_per_pair * outputs * (1 if self.grouped else inputs)

    def weights(self, inputs: int, outputs: int) -> int:
        """Return how many weights it holds at these widths, those with zeros included."""
        return self.weights_per_pair * outputs * (1 if self.grouped else inputs)

    @cached_property
    def additions(self) -> int:
        """How many additions of another tensor are fused behind it."""
        return self.signature.split()[-1].split("+").count("add")

    @cached_property
    def kind(self) -> str:
        """The name that profiles use for it."""
        return self.signature.split()[0]


def cropped(size: Sequence[int], positions: int) -> tuple[int, ...]:
    """Return the kernel of so many positions around the centre of one of odd `size`."""
    return next(own for own in crops(size) if math.prod(own) == positions)


def crops(size: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the kernels around the centre of one of odd `size`, that itself the last."""
    return [tuple(min(each, 2 * ring + 1) for each in size) for ring in range(max(size, default=1) // 2 + 1)]


def _of_kernel(operation: Operation, size: tuple[int, ...]) -> Operation:
    """Return a convolution with a smaller kernel around the same centre, padded less by as much."""
    kind_, _, stride, padding, dilation, *rest = operation.signature.split()
    if padding[1:].lstrip("-")[:1].isdigit():
        pads, steps = ([int(n) for n in word[1:].split("x")] for word in (padding, dilation))
        pads, steps = (own * len(size) if len(own) < len(size) else own for own in (pads, steps))
        less = [step * (k - own) // 2 for step, k, own in zip(steps, operation.kernel, size, strict=True)]
        padding = "p" + "x".join(str(pad - own) for pad, own in zip(pads, less, strict=True))
    fewer, all_ = math.prod(size), math.prod(operation.kernel)
    return replace(
        operation,
        signature=" ".join([kind_, "x".join(map(str, size)), stride, padding, dilation, *rest]),
        macs_per_pair=operation.macs_per_pair * fewer // all_,
        weights_per_pair=operation.weights_per_pair * fewer // all_,
    )


def _inserted(operation: Operation, word: str) -> str:
    """Return a signature with one more word before the last two, the place and what is fused behind."""
    first, _, rest = operation.signature.partition(" @")
    return f"{first} {word} @{rest}"


Measure = Callable[[Ids | None, int], Extent]

# What moves no element, or does not remain in a compiled model.
FREE = frozenset(
    "view reshape flatten unflatten _unsafe_view view_as reshape_as unsqueeze squeeze unsqueeze_ squeeze_ ravel "
    "transpose swapaxes swapdims t mT adjoint numpy_T movedim moveaxis permute expand expand_as broadcast_to split "
    "split_with_sizes chunk tensor_split slice narrow select unbind getitem detach detach_ alias dropout dropout_ "
    "feature_dropout alpha_dropout feature_alpha_dropout to type_as contiguous lift lift_fresh lift_fresh_copy "
    "requires_grad_ _assert_tensor_metadata".split()
)
_FUSED = frozenset("add relu relu6 hardtanh hardswish silu gelu".split())
_MATTERS = 0.25  # of what a product moves on average: a node that moves less is not listed


def find_operations(
    nodes: Sequence[Node], state: Propagation, extent: Measure, blocks: Sequence[Block]
) -> tuple[Operation, ...]:
    """Return every operation of an exported graph that costs time: in order what multiplies, then what only moves.

    None if nothing multiplies.
    """
    found: list[tuple[Operation, int]] = []  # with the elements that it moves
    fused: set[Node] = set()
    read = demands(nodes, blocks)
    for node in nodes:
        if node.op != "call_function" or node in state.constants or not _shape(node):
            continue
        seen = _Seen(node, state, extent)
        multiplying = seen.layer() or seen.products()
        if multiplying:
            fused |= set(_fused(node))
        elif kind(node) in FREE or node in fused:
            continue
        inside = frozenset(b.name for b in blocks if node.name in b.body or (not multiplying and node.name == b.add))
        made = [(replace(o, blocks=inside), moved) for o, moved in multiplying or [seen.moving()]]
        if convolution(node):
            made = [(replace(o, strided=tuple(variants(o, node, read))), moved) for o, moved in made]
        found += made
    products = [(operation, moved) for operation, moved in found if operation.macs_per_pair]
    if not products:
        return ()
    least = _MATTERS * sum(moved for _, moved in products) / len(products)
    moving = (operation for operation, moved in found if not operation.macs_per_pair and moved >= least)
    return (*(operation for operation, _ in products), *moving)


_GROUPS = {(False, False): "", (False, True): "", (True, False): "grouped_", (True, True): "depthwise_"}
_LAYERS = frozenset([f"conv{n}d" for n in (1, 2, 3)] + [f"conv_transpose{n}d" for n in (1, 2, 3)] + ["linear"])
_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh"))
_CELLS = frozenset(("lstm_cell", "gru_cell", "rnn_tanh_cell"))


@dataclass(frozen=True)
class _Seen:
    """A node, as the operations that it is, each with the elements that it moves."""

    node: Node
    state: Propagation
    extent: Measure

    def layer(self) -> list[tuple[Operation, int]]:
        """Return a convolution, transposed or not, a linear or a recurrent layer."""
        node, name = self.node, kind(self.node)
        if name in _RECURRENT and isinstance(arg(node, 3, "has_biases"), bool):
            return self._recurrent(arg(node, 2, "params"))
        if name in _CELLS:
            return self._recurrent([own for own in node.args[2:] if isinstance(own, Node)])
        if name not in _LAYERS:
            return []
        source, weight = node.args[:2]
        size, made, kernel = shape(source), shape(node), shape(weight)[2:]
        axis = len(size) - len(kernel) - 1
        groups = 1 if name == "linear" else number(arg(node, 6, "groups", 1))
        per_group = size[axis] // groups
        positions = math.prod(size) // size[axis] if "transpose" in name else math.prod(made) // made[axis]
        pair = math.prod(kernel) * (per_group if groups > 1 else 1)
        spatial = (size[0], *size[axis + 1 :]) if kernel else size[:-1]
        words = [_GROUPS[groups > 1, per_group == 1] + name, "x".join(map(str, kernel)), _geometry(node, kernel)]
        words += [f"g{groups}" if groups > 1 < per_group else "", "@" + "x".join(map(str, spatial))]
        sides = (_units(self.state, source, axis), size[axis]), (_units(self.state, node, axis), made[axis])
        counts = {"macs_per_pair": positions * pair, "grouped": groups > 1, "weights_per_pair": pair}
        operation, moved = self._made(words, sides, counts, read=numel(source))
        held: Any = weight
        return [(replace(operation, weight=self.state.name(held) or "", kernel=tuple(kernel)), moved)]

    def _recurrent(self, parameters: Any) -> list[tuple[Operation, int]]:
        """Return all layers and directions as one product, from the columns of all matrices to one hidden state."""
        source: Any = self.node.args[0]
        size, matrices = shape(source), [shape(p) for p in parameters if len(shape(p)) == 2]
        hidden, columns = matrices[1][1], sum(columns for _, columns in matrices)  # the second one is of the state
        gates = matrices[0][0] // hidden
        value: Any = self.state.values.get(self.node)
        last = len(_shape(self.node)) - 1
        tracks = value[0] if isinstance(value, list) else value or ()  # an output, or all of them
        units = next((t.along(last)[:hidden] for t in tracks if t.axes == (last,)), None)
        words = [kind(self.node), f"{len(matrices)}", "@" + "x".join(map(str, size[:-1]))]
        counts = {"macs_per_pair": math.prod(size[:-1]) * gates, "grouped": False, "weights_per_pair": gates}
        operation, moved = self._made(words, ((None, columns), (units, hidden)), counts, read=numel(source))
        given = self.extent(_units(self.state, source, len(size) - 1), size[-1])
        times = sum(own == size[-1] for _, own in matrices[::2])
        rest, state = columns - times * size[-1], operation.outputs
        parts = [(name, times * n) for name, n in given.parts]
        parts += [(name, n * rest // hidden) for name, n in state.parts]
        fixed = times * given.fixed + state.fixed * rest // hidden
        return [(replace(operation, inputs=Extent(fixed, tuple(parts))), moved)]

    def products(self) -> list[tuple[Operation, int]]:
        """Return the products of tensors in a node, such as those of an attention: `matmul` in profiles."""
        made = []
        for part in products(self.state, self.node):
            pairs = part.outputs[1] * (1 if part.grouped else part.inputs[1])
            counts = {"macs_per_pair": part.macs // pairs, "grouped": part.grouped, "weights_per_pair": 0}
            operation, moved = self._made(["matmul", part.form], (part.inputs, part.outputs), counts, read=part.read)
            made.append((replace(operation, name=f"{operation.name} {part.name}".rstrip()), moved))
        return made

    def moving(self) -> tuple[Operation, int]:
        """Return a node that multiplies nothing, by the widths of its largest operand and of its output."""
        operands = sorted((n for n in self.node.all_input_nodes if self.state.name(n) is None), key=numel)
        sides = side_of(self.state, operands[-1] if operands else None), side_of(self.state, self.node)
        cut = ["cut" if self.extent(*side).parts else "whole" for side in sides]
        words = [kind(self.node).rstrip("_"), *cut, "@" + "x".join(map(str, _shape(self.node)))]
        counts = {"macs_per_pair": 0, "grouped": True, "weights_per_pair": 0}
        operation, moved = self._made(words, sides, counts, read=sum(map(numel, operands)))
        return replace(operation, moved_per_output=numel(self.node) // sides[1][1]), moved

    def _made(
        self, words: Sequence[str], sides: tuple[Side, Side], counts: Mapping[str, Any], *, read: int
    ) -> tuple[Operation, int]:
        fused = [] if not counts["macs_per_pair"] else [kind(n).rstrip("_") for n in _fused(self.node)]
        fused = [word for word in fused if word in _FUSED]
        written = numel(self.node) * (1 + fused.count("add"))
        operation = Operation(
            name=module_path(self.node) or self.node.name,
            signature=" ".join(filter(None, [*words, "+".join(fused)])),
            inputs=self.extent(*sides[0]),
            outputs=self.extent(*sides[1]),
            blocks=frozenset(),
            where=place(self.node),
            read_per_input=read // sides[0][1],
            moved_per_output=written // sides[1][1],
            **counts,
        )
        return operation, read + written


def _shape(node: Node) -> tuple[int, ...]:
    """Return the shape of the first tensor that a node makes."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, tuple | list) and value else value
    return tuple(number(size) for size in getattr(first, "shape", ()))


def side_of(state: Propagation, node: Node | None) -> Side:
    """Return the axes of a tensor that are followed first, as one; of none length one."""
    tracks = state.of(node)
    return (tracks[0].units.reshape(-1), tracks[0].units.size) if tracks else (None, 1)


def numel(node: Any) -> int:
    """Return the number of elements that a node makes."""
    return math.prod(_shape(node)) if _shape(node) else 0


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

    more, dilation = ("", 5) if "transpose" not in kind(node) else (f" o{flat(5, 'output_padding', 0)}", 7)
    return f"s{flat(3, 'stride', 1)} p{flat(4, 'padding', 0)}{more} d{flat(dilation, 'dilation', 1)}"


def _fused(node: Node) -> list[Node]:
    """Return what runtimes fuse behind an operation: normalisation, addition, activation."""
    found: list[Node] = []
    activated = False
    while len(node.users) == 1:
        (node,) = node.users
        word = kind(node).rstrip("_")
        if word != "batch_norm" and (word not in _FUSED or activated):
            break
        found.append(node)
        activated = word == "relu"
    return found
