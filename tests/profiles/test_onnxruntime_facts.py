"""The widths at which ONNX Runtime leaves the blocked layout are asked of the installed ONNX Runtime."""

from pathlib import Path

import numpy as np
import pytest

import profiles

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def profile() -> profiles.Profile:
    fitting = [found for found in profiles.detect() if found.runtime.name == "onnxruntime"]
    if not fitting:
        pytest.skip("no profile of ONNX Runtime fits this CPU")
    return fitting[0]


def is_blocked(inputs: int, outputs: int, groups: int, folder: Path) -> bool:
    """Say whether ONNX Runtime runs a 3x3 convolution in its blocked layout, by reading the optimised model."""
    weights = np.ones((outputs, inputs // groups, 3, 3), dtype=np.float32)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], group=groups, pads=[1] * 4)
    graph = onnx.helper.make_graph(
        [node],
        "convolution",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, inputs, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, outputs, 8, 8])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4  # it warns that a blocked model is for this machine only, which is the point
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return any("nchwc" in node.domain for node in onnx.load(folder / "optimised.onnx").graph.node)


def beside_a_cliff(profile: profiles.Profile, op: str, **widths: int) -> bool:
    rules = [rule for axis in widths for rule in profile.rules(op, axis) if rule.mode == "cliff"]
    assert rules, f"{profile.id} states no cliff of {op}"
    return any(widths[rule.axis] >= rule.at_least and widths[rule.axis] % rule.quantum for rule in rules)


@pytest.mark.parametrize("inputs", [3, 6, 16, 17, 18, 20, 28, 30, 32])
def test_input_channels_beside_the_cliff_leave_the_blocked_layout(
    profile: profiles.Profile, inputs: int, tmp_path: Path
) -> None:
    assert is_blocked(inputs, 32, 1, tmp_path) is not beside_a_cliff(profile, "conv2d", in_channels=inputs)


@pytest.mark.parametrize("channels", [16, 18, 20, 32, 33, 36])
def test_depthwise_channels_beside_the_cliff_leave_the_blocked_layout(
    profile: profiles.Profile, channels: int, tmp_path: Path
) -> None:
    blocked = is_blocked(channels, channels, channels, tmp_path)
    assert blocked is not beside_a_cliff(profile, "depthwise_conv2d", out_channels=channels)


@pytest.mark.parametrize("per_group", [16, 20, 32])
def test_channels_per_group_beside_the_cliff_leave_the_blocked_layout(
    profile: profiles.Profile, per_group: int, tmp_path: Path
) -> None:
    blocked = is_blocked(2 * per_group, 2 * per_group, 2, tmp_path)
    assert blocked is not beside_a_cliff(profile, "grouped_conv2d", in_channels=per_group, out_channels=per_group)


@pytest.mark.parametrize("outputs", [1, 5, 33])
def test_output_channels_have_no_cliff(profile: profiles.Profile, outputs: int, tmp_path: Path) -> None:
    assert not [rule for rule in profile.rules("conv2d", "out_channels") if rule.mode == "cliff"]
    assert is_blocked(16, outputs, 1, tmp_path)
