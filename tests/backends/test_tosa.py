"""Programs are made narrower as lowering the smaller network would, and refused where that is not known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.tosa import TosaProgram
from profiles.errors import BuildError

serializer = pytest.importorskip("tosa_serializer", reason="pip install 'espalier[ethos-u]'")
IMAGE = (1, 8, 8)


class Writer:
    """Writes a program operation by operation, as ExecuTorch does."""

    def __init__(self) -> None:
        self.file = serializer.TosaSerializer("", serializer.ConstMode.EMBED, 1, 0, 0, False)
        self.block = self.file.currRegion.basicBlocks[0]
        self.count = 0

    def constant(self, values: Any, kind: str) -> str:
        array = np.array(values)
        return self._added("CONST", (), array.shape, kind, data=array.ravel(), fields={}, attribute="Const")

    def op(self, op: str, inputs: Sequence[str], shape: Sequence[int], kind: str, **fields: Any) -> str:
        attribute = "".join(part.capitalize() for part in op.split("_")).replace("2d", "2d")
        return self._added(op, inputs, shape, kind, data=None, fields=fields, attribute=attribute)

    def _added(
        self, op: str, inputs: Sequence[str], shape: Sequence[int], kind: str, *, data: Any, fields: Any, attribute: str
    ) -> str:
        name, self.count = f"t{self.count}", self.count + 1
        self.block.addTensor(name, list(shape), getattr(serializer.DType, kind), data)
        made = serializer.TosaSerializerAttribute()
        getattr(made, f"{attribute}Attribute")(**fields)
        self.block.addOperator(getattr(serializer.Op, op), list(inputs), [name], made)
        return name

    def layer(self, source: str, inputs: int, outputs: int) -> str:
        """Add a 3x3 convolution whose weights count up, and the rescaling to 8 bits behind it."""
        weight = self.constant(np.arange(outputs * 9 * inputs).reshape(outputs, 3, 3, inputs) % 100, "INT8")
        bias, zero = self.constant(np.arange(outputs), "INT32"), self.constant([0], "INT8")
        fields = {"pad": [1, 1, 1, 1], "stride": [1, 1], "dilation": [1, 1], "local_bound": False}
        wide = self.op(
            "CONV2D",
            [source, weight, bias, zero, zero],
            (*IMAGE, outputs),
            "INT32",
            acc_type=serializer.DType.INT32,
            **fields,
        )
        return self.rescale(wide, outputs, "INT8", per_channel=True)

    def rescale(self, source: str, channels: int, kind: str, *, per_channel: bool = False) -> str:
        length = channels if per_channel else 1
        factors, shifts = self.constant(range(1, length + 1), "INT32"), self.constant([30] * length, "INT8")
        zeros = [self.constant([0], "INT32"), self.constant([0], "INT8")]
        return self.op(
            "RESCALE",
            [source, factors, shifts, *zeros],
            (*IMAGE, channels),
            kind,
            scale32=True,
            rounding_mode=serializer.RoundingMode.SINGLE_ROUND,
            per_channel=per_channel,
            input_unsigned=False,
            output_unsigned=False,
        )

    def save(self, path: Path, *, given: str, made: str) -> TosaProgram:
        self.block.addInput(given)
        self.block.addOutput(made)
        path.write_bytes(self.file.serialize())
        return TosaProgram.load(path)


def residual(path: Path) -> TosaProgram:
    """Return a stem and a residual block of two convolutions: 3 -> 16, 16 -> 32 -> 16, added and clamped."""
    writer = Writer()
    writer.block.addTensor("x", [*IMAGE, 3], serializer.DType.INT8, None)
    stem = writer.layer("x", 3, 16)
    body = writer.layer(writer.layer(stem, 16, 32), 32, 16)
    sides = [writer.rescale(body, 16, "INT32"), writer.rescale(stem, 16, "INT32")]
    total = writer.rescale(writer.op("ADD", sides, (*IMAGE, 16), "INT32"), 16, "INT8")
    clamped = writer.op(
        "CLAMP",
        [total],
        (*IMAGE, 16),
        "INT8",
        min_val=[0],
        max_val=[127],
        nan_mode=serializer.NanPropagationMode.PROPAGATE,
    )
    return writer.save(path, given="x", made=clamped)


@pytest.fixture
def program(tmp_path: Path) -> TosaProgram:
    return residual(tmp_path / "dense.tosa")


def kinds(program: TosaProgram) -> list[str]:
    return [operator.name for operator in program.operators if operator.name != "CONST"]


def test_a_program_says_the_channels_of_its_layers(program: TosaProgram) -> None:
    assert [(layer.inputs, layer.outputs) for layer in program.layers] == [(3, 16), (16, 32), (32, 16)]


def test_a_program_with_all_its_channels_is_the_same(program: TosaProgram, tmp_path: Path) -> None:
    same = program.narrowed([(3, 16), (16, 32), (32, 16)])
    same.save(tmp_path / "same.tosa")
    read = TosaProgram.load(tmp_path / "same.tosa")
    assert kinds(read) == kinds(program)
    assert read.shapes == program.shapes
    assert all(np.array_equal(read.constants[name], values) for name, values in program.constants.items())


def test_weights_and_constants_keep_the_first_channels(program: TosaProgram, tmp_path: Path) -> None:
    small = program.narrowed([(3, 16), (16, 20), (20, 16)])
    small.save(tmp_path / "small.tosa")
    read = TosaProgram.load(tmp_path / "small.tosa")
    assert [(layer.inputs, layer.outputs) for layer in read.layers] == [(3, 16), (16, 20), (20, 16)]
    dense, cut = ([o for o in each.operators if o.name == "CONV2D"] for each in (program, read))
    for at, part in ((1, np.s_[:20]), (2, np.s_[:, :, :, :20])):
        whole, left = program.constants[dense[at].inputs[1]], read.constants[cut[at].inputs[1]]
        assert np.array_equal(left, whole[part])
    assert np.array_equal(read.constants[cut[1].inputs[2]], np.arange(20))
    (rescale,) = (o for o in read.operators if o.name == "RESCALE" and o.inputs[0] == cut[1].outputs[0])
    assert np.array_equal(read.constants[rescale.inputs[1]], np.arange(1, 21))
    assert read.shapes[rescale.outputs[0]] == (*IMAGE, 20)


def test_a_block_leaves_with_its_addition(program: TosaProgram) -> None:
    small = program.narrowed([(3, 16), None, None])
    assert kinds(small) == ["CONV2D", "RESCALE"]
    assert small.shapes[small.outputs[0]] == (*IMAGE, 16)


def test_a_layer_that_reads_other_channels_than_were_made_is_refused(program: TosaProgram) -> None:
    with pytest.raises(BuildError, match=r"reads 20 channels, not 24"):
        program.narrowed([(3, 16), (16, 20), (24, 16)])


def test_a_layer_is_found_behind_what_only_rescales_it(program: TosaProgram) -> None:
    first = program.operators[next(i for i, o in enumerate(program.operators) if o.name == "RESCALE")]
    assert program.layer_behind(first.outputs[0]) == 0
    assert program.layer_behind(program.outputs[0]) is None
