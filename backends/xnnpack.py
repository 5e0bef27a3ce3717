"""XNNPACK's programs made narrower without lowering the model anew, for measuring many networks that it can become.

ExecuTorch takes seconds to lower a network, most of them in passes over its graph; to narrow the dense network's file
takes a fraction of one. What a network becomes with fewer channels or blocks has the same operations with smaller
shapes, so it is followed through them which elements of each axis stay. What is not known here is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from backends.kept import Kept, Shape, along, cut_to, joined, lengths, reshaped, whole
from backends.pte import Key, Pte, Step
from backends.remainder import Remainder
from profiles.errors import BuildError

__all__ = ["Layer", "XnnpackProgram"]

Ids = NDArray[np.int64]
Literals = dict[Any, Any]
_LAYERS = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNFullyConnected")
_FUSED = (*_LAYERS, "XNNAdd", "XNNSubtract", "XNNMultiply")  # with an activation behind them
_SUMS = ("XNNAdd", "aten::add.out")
# What computes each element, or each channel, by itself, or reduces an axis to one.
_NODES_ALONG = (
    "Abs Add AvgPooling2d Ceiling Clamp Copy Cos Div ELU Exp Floor Gelu GlobalAvgPooling2d Hardswish LeakyReLU Log "
    "MaxPooling2d Maximum Minimum Multiply Negate PReLU ReciprocalSquareRoot Sigmoid Sin Softmax Square SquareRoot "
    "StaticConstantPad Subtract Tanh"
)
_KERNELS_ALONG = (
    "_softmax.out add.out div.out eq.Scalar_out full_like.out gelu.out logical_not.out mul.Scalar_out mul.out sub.out "
    "where.self_out"
)
_ALONG = {f"XNN{name}" for name in _NODES_ALONG.split()} | {f"aten::{name}" for name in _KERNELS_ALONG.split()}


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a program: the shape of its weight, as PyTorch would have it."""

    shape: Shape
    made: Key


@dataclass(frozen=True)
class XnnpackProgram:
    """The file of a network, ready to be narrowed."""

    pte: Pte

    @classmethod
    def load(cls, content: bytes) -> Self:
        """Read a file; raises BuildError if it holds more than this knows."""
        return cls(Pte.load(content))

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers that multiply by weights, in the order in which the network computes them."""
        found = [step for step in self.pte.steps if step.kind in _LAYERS and self.pte.constant(step.reads[1])]
        return [Layer(self._shape(step), step.makes[0]) for step in sorted(found, key=lambda step: step.handle)]

    def _shape(self, step: Step) -> Shape:
        rows, *kernel, columns = self.pte.values[step.reads[1]].shape
        return (columns, rows, *kernel) if step.kind == "XNNDepthwiseConv2d" else (rows, columns, *kernel)

    def narrowed(self, channels: Sequence[tuple[Ids, Ids] | None]) -> bytes:
        """Return the file with these outputs and inputs of the weights of its layers; None: the layer has left.

        With a layer goes what only reads it, up to the addition that it ends in, of which the other side remains.
        Raises BuildError if an operation is met that this does not know.
        """
        kept = {layer.made: own for layer, own in zip(self.layers, channels, strict=True)}
        return _Narrowing(self.pte, kept).remainder().content()


class _Narrowing:
    """One pass over a program in order, that follows what stays."""

    def __init__(self, dense: Pte, channels: Mapping[Key, tuple[Ids, Ids] | None]) -> None:
        self.dense, self.channels = dense, channels
        self.kept: dict[Key, Kept] = {key: whole(dense.values[key].shape) for key in dense.inputs}
        self.gone: set[Key] = set()
        self.alias: dict[Key, Key] = {}  # what is read in place of a sum with what has left
        self.bounds: dict[Key, Any] = {}  # of what is read so

    def remainder(self) -> Remainder:
        steps = [step for step in self.dense.steps if not self._leaves(step)]
        makers = {step.makes[0]: step for step in steps}
        for made, stays in self.alias.items():
            self._bound(made, makers.get(stays))
        return Remainder(self.dense, list(map(self._narrowed, steps)), self.alias, self.kept)

    def _leaves(self, step: Step) -> bool:
        """Whether a step leaves: with its layer, or as the sum of what has left and what stays."""
        made, read = step.makes[0], [self._read(key) for key in step.reads if not self.dense.constant(key)]
        missing, stay = self.gone.intersection(read), [key for key in read if key not in self.gone]
        if self.channels.get(made, ()) is None or (missing and not stay):
            self.gone.update(step.makes)
            return True
        if missing and (step.kind not in _SUMS or len(stay) != 1):
            raise BuildError(f"{step.kind} reads a block that is to leave")
        if missing:
            self.alias[made] = stay[0]
        return bool(missing)

    def _bound(self, made: Key, maker: Step | None) -> None:
        """Fuse the activation behind a sum that has left with what makes the other side, as lowering it would."""
        (step,) = (step for step in self.dense.steps if step.makes[0] == made)
        if step.bounds is None:
            return
        (side,) = (key for key in step.reads if key not in self.gone)
        others = [each for each in self.dense.readers[side] if each is not step and each.makes[0] not in self.gone]
        refused = BuildError("an activation behind a block that is to leave cannot be fused with what is before it")
        if others or maker is None or maker.kind not in _FUSED or maker.scope != step.scope:
            raise refused
        if self.bounds.get(maker.makes[0], maker.bounds) not in (None, step.bounds):
            raise refused
        self.bounds[maker.makes[0]] = step.bounds

    def _read(self, key: Key) -> Key:
        return self.alias.get(key, key)

    def _narrowed(self, step: Step) -> Step:
        rule = _RULES.get(step.kind, _Narrowing._along if step.kind in _ALONG else None)
        if rule is None:
            raise BuildError(f"{step.kind} is not made narrower here")
        bounds = self.bounds.get(step.makes[0], step.bounds)
        return replace(step, literals={**step.literals, **rule(self, step)}, bounds=bounds)

    def _shape(self, key: Key) -> Shape:
        return self.dense.values[key].shape

    def _operands(self, step: Step) -> list[tuple[Shape, Kept]]:
        """Return shape and what is kept of what a step reads, constants as they are kept by now."""
        operands = [(self._shape(key), self._read(key)) for key in step.reads]
        return [(shape, self.kept.setdefault(key, whole(shape))) for shape, key in operands]

    def _keep(self, key: Key, kept: Kept) -> None:
        """Take note of what is kept of a constant; one that two steps want cut in two ways is refused."""
        if not all(map(np.array_equal, self.kept.setdefault(key, kept), kept)):
            raise BuildError("a constant is read by two operations, which would cut it in two ways")

    def _along(self, step: Step) -> Literals:
        constants = [key for key in step.reads if self.dense.constant(key)]
        operands = [(self._shape(key), self.kept[self._read(key)]) for key in step.reads if key not in constants]
        for made in step.makes:
            self.kept[made] = along(self._shape(made), operands)
        for key in constants:
            self._keep(key, cut_to(self._shape(step.makes[0]), self.kept[step.makes[0]], self._shape(key)))
        return {}

    def _linear(self, step: Step) -> Literals:
        (rows, columns), source = self._chosen(step), self.kept[self._read(step.reads[0])]
        self._cut(step, rows, columns, source[-1])
        self.kept[step.makes[0]] = (*source[:-1], rows)
        return {}

    def _convolution(self, step: Step) -> Literals:
        (rows, columns), source = self._chosen(step), self._image(step)
        if step.literals["groups"] == 1:
            self._cut(step, rows, columns, source[-1])
            self.kept[step.makes[0]] = (source[0], *whole(self._shape(step.makes[0])[1:-1]), rows)
            return {"group_input_channels": len(columns), "group_output_channels": len(rows)}
        if (len(rows), len(source[-1])) != (self._shape(step.reads[1])[0], self._shape(step.reads[0])[-1]):
            raise BuildError("a convolution in groups is not made narrower here unless each channel is one")
        self._cut(step, rows, columns, columns)
        self.kept[step.makes[0]] = (source[0], *whole(self._shape(step.makes[0])[1:]))
        return {}

    def _depthwise(self, step: Step) -> Literals:
        (rows, _), source = self._chosen(step), self._image(step)
        if self._shape(step.reads[1])[0] != 1 or step.literals["group_output_channels"] != 1:
            raise BuildError("a depthwise convolution that makes several channels of each is not made narrower here")
        self._cut(step, rows, rows, source[-1])
        self.kept[step.makes[0]] = (source[0], *whole(self._shape(step.makes[0])[1:-1]), rows)
        return {"groups": len(rows)}

    def _chosen(self, step: Step) -> tuple[Ids, Ids]:
        channels = self.channels.get(step.makes[0])
        if channels is None or step.literals["flags"]:
            raise BuildError(f"a {step.kind} multiplies by what is no plain weight, and is not made narrower here")
        return channels

    def _image(self, step: Step) -> Kept:
        """Return what is kept of what a convolution reads."""
        ((shape, source), *_) = self._operands(replace(step, reads=step.reads[:1]))
        if lengths(source[1:-1]) != list(shape[1:-1]):
            raise BuildError("a convolution runs along an axis that is to be cut, which is not made narrower here")
        return source

    def _cut(self, step: Step, rows: Ids, columns: Ids, read: Ids) -> None:
        """Cut the weight and the bias of a layer that reads the channels `read`."""
        if not np.array_equal(read, columns):
            raise BuildError(f"a layer reads {len(read)} channels, not those {len(columns)}; report the model")
        _, *kernel, _ = self._shape(step.reads[1])
        outer = np.arange(1) if step.kind == "XNNDepthwiseConv2d" else rows
        self._keep(step.reads[1], (outer, *whole(tuple(kernel)), columns))
        for bias in step.reads[2:]:
            self._keep(bias, (rows,))

    def _reshape(self, step: Step) -> Literals:
        ((shape, kept),) = self._operands(step)
        self.kept[step.makes[0]] = reshaped(shape, kept, self._shape(step.makes[0]))
        return self._sized(step)

    def _sized(self, step: Step) -> Literals:
        """Return the literal that says which shape a step makes."""
        place = "new_shape" if "new_shape" in step.literals else 1
        sizes = zip(step.literals[place], lengths(self.kept[step.makes[0]]), strict=True)
        return {place: [size if size < 0 else own for size, own in sizes]}

    def _expand(self, step: Step) -> Literals:
        return self._along(step) | self._sized(step)

    def _transpose(self, step: Step) -> Literals:
        ((_, kept),) = self._operands(step)
        self.kept[step.makes[0]] = tuple(kept[axis] for axis in step.literals["perm"])
        return {}

    def _join(self, step: Step) -> Literals:
        self.kept[step.makes[0]] = joined(step.literals["axis"], self._operands(step))
        return {}

    def _product(self, step: Step) -> Literals:
        """Follow a product of matrices, rows by columns."""
        (_, left), (_, right) = self._operands(step)
        if not all(map(np.array_equal, (*left[:-2], left[-1]), (*right[:-2], right[-2]))):
            raise BuildError("the sides of a matrix product have lost different channels")
        self.kept[step.makes[0]] = (*left[:-1], right[-1])
        return {}

    def _dropped(self, step: Step) -> Literals:
        """Follow what reduces axes, or selects one element of one."""
        shape, kept = self._operands(step)[0]
        if len(self._shape(step.makes[0])) == len(shape):
            return self._along(step)
        axes = step.literals[1] if isinstance(step.literals[1], list) else [step.literals[1]]
        gone = {axis % len(shape) for axis in axes}
        if step.kind.startswith("aten::select") and any(len(kept[axis]) != shape[axis] for axis in gone):
            raise BuildError("an element is selected from an axis that is to be cut, which is not made narrower here")
        self.kept[step.makes[0]] = tuple(own for axis, own in enumerate(kept) if axis not in gone)
        return {}

    def _normalise(self, step: Step) -> Literals:
        return self._along(step) | {1: lengths(self.kept[step.makes[0]])[-len(step.literals[1]) :]}


_RULES: dict[str, Callable[[_Narrowing, Step], Literals]] = {
    "XNNConv2d": _Narrowing._convolution,
    "XNNDepthwiseConv2d": _Narrowing._depthwise,
    "XNNFullyConnected": _Narrowing._linear,
    **dict.fromkeys(("XNNConcatenate2", "XNNConcatenate3", "XNNConcatenate4", "XNNConcatenate5"), _Narrowing._join),
    **dict.fromkeys(("XNNStaticReshape", "aten::view_copy.out"), _Narrowing._reshape),
    **dict.fromkeys(("aten::mean.out", "aten::any.out", "aten::select_copy.int_out"), _Narrowing._dropped),
    "XNNStaticTranspose": _Narrowing._transpose,
    "XNNBatchMatrixMultiply": _Narrowing._product,
    "aten::expand_copy.out": _Narrowing._expand,
    "aten::native_layer_norm.out": _Narrowing._normalise,
}
