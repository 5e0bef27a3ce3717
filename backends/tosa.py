"""TOSA programs, the form that Arm's compilers read, made narrower without lowering the model anew.

Lowering a network to TOSA takes a minute, compiling the result a fraction of a second. What a network becomes with
fewer channels or blocks has the same operations with smaller shapes, so its program is made from the dense one's:
weights keep their first channels, constants of one value per channel follow, all shapes are inferred again, and what
nothing reads is left out. Constants are those of the dense network, so this is for estimates of time; what is deployed
is lowered.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from backends.quiet import quietly
from profiles.errors import BuildError

__all__ = ["Layer", "TosaProgram"]

Shape = tuple[int, ...]
_STORED = {"INT8": np.int8, "INT16": np.int16, "INT32": np.int32}
_LAYERS = ("CONV2D", "DEPTHWISE_CONV2D")
# What computes each channel by itself: an axis that keeps its length keeps it when there are fewer channels too.
_ALONG = frozenset(
    "RESCALE CLAMP ADD SUB MUL MAXIMUM MINIMUM TABLE CAST IDENTITY NEGATE ABS SIGMOID TANH REDUCE_SUM REDUCE_MAX "
    "REDUCE_MIN AVG_POOL2D MAX_POOL2D PAD SLICE".split()
)
_CONSTANT = ("CONST", "CONST_SHAPE")


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a program, by its channels; both are one number where it is depthwise."""

    inputs: int
    outputs: int
    kernel: Shape
    depthwise: bool
    made: str  # the tensor that it writes


@dataclass(frozen=True)
class _Operator:
    """An operation with the names of the tensors that it reads and writes; `attribute` is the serializer's own."""

    name: str
    op: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attribute: Any


@dataclass(frozen=True)
class TosaProgram:
    """A program of one block, with its operations in the order in which they run."""

    version: tuple[int, ...]  # major and minor
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: tuple[_Operator, ...]
    shapes: Mapping[str, Shape]  # of every tensor
    dtypes: Mapping[str, Any]
    constants: Mapping[str, NDArray[Any]]
    lists: Mapping[str, Shape]  # constant operands that are shapes themselves

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a program; raises BuildError if it has branches or constants that cannot be made narrower."""
        import tosa_serializer as serializer

        file = serializer.TosaSerializer()
        with quietly():  # it tells of every file that it reads an older version of TOSA
            known = file.loadTosaFlatbuffer(str(path))
        if not known:
            raise BuildError(f"{path} is no TOSA program; lower the model again")
        blocks = [block for region in file.regions for block in region.basicBlocks]
        if len(blocks) != 1:
            raise BuildError("the model branches on its values, so no estimate of what it can become is made from it")
        (block,) = blocks
        tensors = {name: block.tensors[name] for name in block.tensors.keys()}  # noqa: SIM118  # no Mapping
        return cls(
            version=tuple(map(int, file.getGraphTosaVersion().to_string().split(".")[:2])),
            inputs=tuple(block.inputs),
            outputs=tuple(block.outputs),
            operators=tuple(map(_operator, block.operators)),
            shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            dtypes={name: tensor.dtype for name, tensor in tensors.items()},
            constants={name: _values(tensor) for name, tensor in tensors.items() if len(tensor.data)},
            lists={name: tuple(block.shapes[name].dims) for name in block.shapes.keys()},  # noqa: SIM118
        )

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that multiply by weights, in order."""
        return tuple(map(self._layer, (o for o in self.operators if o.name in _LAYERS)))

    def _layer(self, operator: _Operator) -> Layer:
        shape = self.shapes[operator.inputs[1]]
        if operator.name == "CONV2D":
            return Layer(shape[3], shape[0], shape[1:3], False, operator.outputs[0])
        return Layer(shape[2], shape[2] * shape[3], shape[:2], True, operator.outputs[0])

    @cached_property
    def makers(self) -> dict[str, _Operator]:
        """The operation that writes each tensor."""
        return {name: operator for operator in self.operators for name in operator.outputs}

    def layer_behind(self, tensor: str) -> int | None:
        """Return the index of the layer whose output `tensor` is, rescaled and clamped at most; None otherwise."""
        index = {layer.made: number for number, layer in enumerate(self.layers)}
        while tensor not in index:
            maker = self.makers.get(tensor)
            if maker is None or maker.name not in ("RESCALE", "CLAMP", "RESHAPE"):
                return None
            tensor = maker.inputs[0]
        return index[tensor]

    def narrowed(self, channels: Sequence[tuple[int, int] | None]) -> "TosaProgram":
        """Return the program with these input and output channels of its layers; None: the layer has left.

        With a layer goes what only reads it, up to the addition that it ends in, of which the other side remains.
        Raises BuildError if an operation is met that this does not know.
        """
        return _Narrowing(self, dict(zip((layer.made for layer in self.layers), channels, strict=True))).program()

    def save(self, path: Path | str) -> None:
        """Write the program as a flatbuffer."""
        import tosa_serializer as serializer

        file = serializer.TosaSerializer("", serializer.ConstMode.EMBED, *self.version, 0, False)
        block = file.currRegion.basicBlocks[0]
        for name, shape in self.shapes.items():
            values = self.constants.get(name)
            block.addTensor(name, list(shape), self.dtypes[name], None if values is None else values.ravel())
        for name, dims in self.lists.items():
            block.addShape(name, len(dims), list(dims))
        for name in self.inputs:
            block.addInput(name)
        for name in self.outputs:
            block.addOutput(name)
        for operator in self.operators:
            attribute = _copied(operator.attribute)
            block.addOperator(operator.op, list(operator.inputs), list(operator.outputs), attribute)
        Path(path).write_bytes(file.serialize())


def _operator(own: Any) -> _Operator:
    name = str(own.op).rpartition(".")[2]
    return _Operator(name, own.op, tuple(own.inputs), tuple(own.outputs), own.attributes)


def _values(tensor: Any) -> NDArray[Any]:
    kind = str(tensor.dtype).rpartition(".")[2]
    if kind not in _STORED:
        raise BuildError(f"the program holds constants of type {kind}, which are not read here; plan from the rules")
    found = np.array(tensor.data, np.uint8).view(_STORED[kind])
    return found.reshape(tuple(tensor.shape)) if found.size == prod(tensor.shape) else found


def _copied(attribute: Any) -> Any:
    import tosa_serializer as serializer

    made = serializer.TosaSerializerAttribute()
    fields = {name: getattr(attribute, name) for name in dir(attribute) if not name.startswith("_")}
    getattr(made, type(attribute).__name__.removeprefix("Tosa"))(**fields)
    return made


class _Narrowing:
    """One pass over a program in order, that writes the smaller one."""

    def __init__(self, dense: TosaProgram, channels: Mapping[str, tuple[int, int] | None]) -> None:
        self.dense, self.channels = dense, channels
        self.alias: dict[str, str] = {}  # what is read in place of a tensor that has left
        self.gone: set[str] = set()
        self.sums: set[str] = set()  # of what has left and what stays
        self.shapes: dict[str, Shape] = {name: dense.shapes[name] for name in dense.inputs}
        self.constants: dict[str, NDArray[Any]] = {}
        self.lists: dict[str, Shape] = {}
        self.operators: list[_Operator] = []
        self.const = {o.outputs[0]: o for o in dense.operators if o.name in _CONSTANT}

    def program(self) -> TosaProgram:
        for operator in self.dense.operators:
            if operator.name not in _CONSTANT and not self._left(operator):
                self._keep(operator)
        return TosaProgram(
            version=self.dense.version,
            inputs=self.dense.inputs,
            outputs=tuple(self._read(name) for name in self.dense.outputs),
            operators=tuple(self._live()),
            shapes=self.shapes,
            dtypes={name: self.dense.dtypes[name.partition("|")[0]] for name in self.shapes},
            constants=self.constants,
            lists=self.lists,
        )

    def _live(self) -> Iterator[_Operator]:
        """Yield the operations that an output depends on, with the constants before their readers."""
        wanted, kept = {self._read(name) for name in self.dense.outputs}, []
        for operator in reversed(self.operators):
            if wanted.intersection(operator.outputs):
                wanted |= set(operator.inputs)
                kept.append(operator)
        self.shapes = {name: shape for name, shape in self.shapes.items() if name in wanted}
        self.constants = {name: values for name, values in self.constants.items() if name in wanted}
        self.lists = {name: dims for name, dims in self.lists.items() if name in wanted}
        return reversed(kept)

    def _read(self, name: str) -> str:
        while name in self.alias:
            name = self.alias[name]
        return name

    def _left(self, operator: _Operator) -> bool:
        """Whether an operation leaves: with its layer, or as the addition of what has left to what stays."""
        made = operator.outputs[0]
        read = [self._read(name) for name in operator.inputs if name not in self.const]
        missing = [name for name in read if name in self.gone]
        if self.channels.get(made, ()) is None or (missing and len(read) == len(missing)):
            self.gone.add(made)
            return True
        if missing:
            if operator.name != "ADD":
                raise BuildError(f"{operator.name} {made} reads a block that is to leave; plan from the rules")
            (self.alias[made],) = (name for name in read if name not in self.gone)
            self.sums.add(made)
            return True
        if operator.name == "RESCALE" and operator.inputs[0] in self.sums:
            self.alias[made] = self._eight_bits(read[0])
            return True
        if operator.name == "CLAMP" and operator.inputs[0] in self.alias:  # lowered anew, it is in the layer before it
            self.alias[made] = read[0]
            return True
        return False

    def _eight_bits(self, wide: str) -> str:
        """Return the 8-bit tensor that a 32-bit operand of an addition stands for."""
        maker = self.dense.makers.get(wide)
        if maker is not None and maker.name == "RESCALE":
            return self._read(maker.inputs[0])
        for operator in self.dense.operators:  # an addition may take the sum of the one before as it is
            if operator.name == "RESCALE" and operator.inputs[0] == wide:
                return self._read(operator.outputs[0])
        raise BuildError(f"{wide} is not added as quantised networks do it; plan from the documented rules")

    def _keep(self, operator: _Operator) -> None:
        name, made = operator.name, operator.outputs[0]
        read = [self._read(each) for each in operator.inputs]
        if name in _LAYERS:
            read, shape = self._layer(operator, read)
        elif name == "TRANSPOSE":
            shape = tuple(self.shapes[read[0]][axis] for axis in operator.attribute.perms)
        elif name == "RESHAPE":
            shape = _reshaped(self.dense.shapes[operator.inputs[0]], self.shapes[read[0]], self.dense.shapes[made])
        elif name in _ALONG:
            shape = self._along(operator, read)
        else:
            raise BuildError(f"{name} is not made narrower here; plan from the documented rules")
        cut = self.const.keys() - (read[1:2] if name in _LAYERS else [])  # weights are cut already
        read = [self._constant(each, shape, made) if each in cut else each for each in read]
        self.shapes[made] = shape
        self.operators.append(replace(operator, inputs=tuple(read)))

    def _layer(self, operator: _Operator, read: list[str]) -> tuple[list[str], Shape]:
        channels, made = self.channels[operator.outputs[0]], operator.outputs[0]
        assert channels is not None
        inputs, outputs = channels
        if self.shapes[read[0]][3] != inputs:
            raise BuildError(f"{made} reads {self.shapes[read[0]][3]} channels, not {inputs}; report the model")
        weight = self.dense.constants[read[1]]
        each = self.dense.shapes[read[1]][3]
        cut = weight[:outputs, :, :, :inputs] if operator.name == "CONV2D" else weight[:, :, :inputs, :]
        assert operator.name == "CONV2D" or outputs == inputs * each
        return [read[0], self._stored(read[1], cut), *read[2:]], (*self.dense.shapes[made][:3], outputs)

    def _along(self, operator: _Operator, read: list[str]) -> Shape:
        made = self.dense.shapes[operator.outputs[0]]
        shape = list(made)
        for before, now in zip(operator.inputs, read, strict=True):
            old, new = self.dense.shapes.get(before, ()), self.shapes.get(now, ())
            if before not in self.const and len(old) == len(made):
                shape = [n if o == m else s for s, o, n, m in zip(shape, old, new, made, strict=True)]
        return tuple(shape)

    def _constant(self, name: str, shape: Shape, made: str) -> str:
        """Return a constant operand cut to what the operation that makes `made` has become."""
        dense = self.dense.shapes[made]
        if name in self.dense.lists:
            dims = self.dense.lists[name]
            return self._listed(name, shape if dims == dense else dims)
        values = self.dense.constants[name]
        tail = tuple(zip(dense, shape, strict=True))[len(dense) - values.ndim :]
        if values.shape != self.dense.shapes[name] or len(tail) != values.ndim:
            return self._stored(name, values)
        cut = tuple(slice(n if m == o else m) for m, (o, n) in zip(values.shape, tail, strict=True))
        return self._stored(name, values[cut])

    def _stored(self, name: str, values: NDArray[Any]) -> str:
        whole = values.shape == self.dense.constants[name].shape
        shape = self.dense.shapes[name] if whole else values.shape
        own = name if whole else f"{name}|{'x'.join(map(str, shape))}"
        if own not in self.constants:
            self.constants[own], self.shapes[own] = values, shape
            self._emit(name, own)
        return own

    def _listed(self, name: str, dims: Shape) -> str:
        own = name if dims == self.dense.lists[name] else f"{name}|{'x'.join(map(str, dims))}"
        if own not in self.lists:
            self.lists[own] = dims
            self._emit(name, own)
        return own

    def _emit(self, name: str, own: str) -> None:
        self.operators.append(replace(self.const[name], outputs=(own,)))


def _reshaped(old: Shape, new: Shape, made: Shape) -> Shape:
    """Return what `made` becomes when the input shrinks from `old` to `new` along axes that it keeps or unites."""
    shape, source = [], 0
    for size in made:
        run, kept = 1, 1
        while source < len(old) and (run < size or (size == 1 and old[source] == 1 and run == 1 and kept == 1)):
            run, kept, source = run * old[source], kept * new[source], source + 1
            if size == 1:
                break
        if run != size:
            raise BuildError(f"a reshape from {old} to {made} is not made narrower here; plan from the rules")
        shape.append(kept)
    if prod(shape) != prod(new):
        raise BuildError(f"a reshape from {old} to {made} is not made narrower here; plan from the rules")
    return tuple(shape)
