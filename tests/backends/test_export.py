"""ONNX files are static, repeatable, and free of subnormal constants."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import backends
from backends.export import _constants, _flush
from backends.subnormals import flush_, flushed
from profiles.errors import BuildError

onnx = pytest.importorskip("onnx")


def folding_net(scale: float) -> nn.Module:
    """Return a convolution and a normalisation, each of normal numbers, whose folded product is `scale` * 1e-30."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        model[0].weight[:2] = 1e-30
        model[1].weight[:2] = scale
        model[4].weight[0, :3] = 1e-41  # subnormal before any folding
    return model


def subnormal(bits: np.ndarray) -> np.ndarray:
    return ((bits & 0x7F800000) == 0) & ((bits & 0x007FFFFF) != 0)


def constant_bits(path: Path) -> np.ndarray:
    values = [onnx.numpy_helper.to_array(tensor) for tensor in _constants(onnx.load(path).graph)]
    return np.concatenate([value.ravel().view(np.uint32) for value in values if value.dtype == np.float32])


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 2**23) | st.integers(2**31, 2**31 + 2**23)))
def test_flushing_zeroes_the_subnormal_bit_patterns_and_no_other(patterns: list[int]) -> None:
    bits = np.array(patterns, dtype=np.uint32)
    found, count = flushed(bits.view(np.float32))
    np.testing.assert_array_equal(found.view(np.uint32), np.where(subnormal(bits), 0, bits))
    assert count == subnormal(bits).sum()


@given(st.integers(0, 2**64 - 1) | st.integers(0, 2**52))
def test_flushing_reads_double_precision_too(pattern: int) -> None:
    found, count = flushed(np.array(pattern, dtype=np.uint64).view(np.float64))
    is_subnormal = (pattern >> 52) & 0x7FF == 0 and pattern & (2**52 - 1) != 0
    assert found.view(np.uint64) == (0 if is_subnormal else pattern)
    assert count == is_subnormal


@pytest.mark.parametrize("dtype", [np.float16, np.int64, np.bool_])
def test_flushing_leaves_other_types_alone(dtype: type) -> None:
    values = np.array([0, 1, 1], dtype=np.uint8).astype(dtype) if dtype != np.float16 else np.float16([6e-8, 1])
    found, count = flushed(values)
    np.testing.assert_array_equal(found, values)
    assert count == 0


@pytest.mark.parametrize(("dtype", "small"), [(torch.float32, 1e-40), (torch.float64, 1e-310), (torch.bfloat16, 1e-40)])
def test_tensors_are_flushed_in_place(dtype: torch.dtype, small: float) -> None:
    normal = torch.finfo(dtype).smallest_normal
    tensor = torch.nn.Parameter(torch.tensor([[small, -small], [normal, -1.0]], dtype=dtype).t())  # strided
    assert int(tensor.count_nonzero()) == 4
    assert flush_(tensor) == 2
    assert tensor.tolist() == [[0.0, normal], [0.0, -1.0]]
    assert flush_(tensor) == 0


def test_subnormals_of_half_precision_are_numbers() -> None:
    tensor = torch.tensor([6e-8], dtype=torch.float16)
    assert (flush_(tensor), float(tensor) > 0) == (0, True)


def test_an_export_has_no_subnormal_constant_even_where_folding_makes_one(tmp_path: Path) -> None:
    inputs = (torch.zeros(1, 1, 4, 4),)
    plain = backends.export_onnx(folding_net(1.0), inputs, tmp_path / "plain.onnx")
    folded = backends.export_onnx(folding_net(1e-10), inputs, tmp_path / "folded.onnx")
    for export in (plain, folded):
        assert not subnormal(constant_bits(export.path)).any()
    assert plain.subnormals_flushed == 3
    assert folded.subnormals_flushed == 3 + 2 * 9  # the two filters too, once folded


def test_constants_are_found_in_attributes_and_in_branches() -> None:
    tensor = onnx.numpy_helper.from_array(np.float32([1e-40, 1.0, -1e-40]), "c")
    constant = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3])
    branch = onnx.helper.make_graph([constant], "branch", [], [out])
    choose = onnx.helper.make_node("If", ["b"], ["y"], then_branch=branch, else_branch=branch)
    graph = onnx.helper.make_graph([choose, constant], "main", [], [out], initializer=[tensor])
    assert [_flush(found) for found in _constants(graph)] == [2, 2, 2, 2]
    assert [_flush(found) for found in _constants(graph)] == [0, 0, 0, 0]


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model, inputs = folding_net(1.0), (torch.zeros(1, 1, 4, 4),)
    files = [backends.export_onnx(model, inputs, tmp_path / name).path for name in ("a.onnx", "b.onnx")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_shapes_are_static_and_inputs_are_numbered(tmp_path: Path) -> None:
    file = backends.export_onnx(folding_net(1.0), (torch.zeros(3, 1, 4, 4),), tmp_path / "m.onnx").path
    (value,) = onnx.load(file).graph.input
    assert value.name == "input_0"
    assert [axis.dim_value for axis in value.type.tensor_type.shape.dim] == [3, 1, 4, 4]


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x)


class Talking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("this layer is old", DeprecationWarning, stacklevel=2)
        return x if x.sum() > 0 else -x


def test_an_operation_without_onnx_is_a_build_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be exported to ONNX"):
        backends.export_onnx(Unsupported(), (torch.eye(3),), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_only_the_notices_of_the_exporter_itself_are_silenced(tmp_path: Path) -> None:
    with (
        pytest.warns(torch.jit.TracerWarning, match="Python boolean"),
        pytest.warns(DeprecationWarning, match="this layer is old") as caught,
    ):
        backends.export_onnx(Talking(), (torch.ones(3),), tmp_path / "m.onnx")
    assert not [warning for warning in caught if "legacy" in str(warning.message)]
