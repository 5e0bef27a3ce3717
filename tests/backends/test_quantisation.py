"""int8 and half precision: small, as accurate as PyTorch on the user's data, and refused where they cannot be made."""

import copy
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from archspec.cpu import detect as archspec_detect
from torch import Tensor, nn

import backends
import profiles
from backends import quantisation
from backends.artifact import Artifact
from backends.export import _constants
from backends.granularity import beside_the_grid
from backends.parity import TOLERANCES, random_cases
from backends.registry import known
from backends.samples import Samples
from profiles.errors import BackendUnavailable, BuildError
from profiles.schema import Profile

from .nets import IMAGE, profile_of, rule, samples, stripes, trained

INPUTS = (torch.zeros(IMAGE),)
NEEDS = {"onnxruntime": "onnxruntime", "openvino": "nncf", "executorch": "executorch"}


def build(name: str, number: str, folder: Path, **options: object) -> Artifact:
    file = folder / f"{number}.{'pte' if name == 'executorch' else 'onnx'}"
    return backends.load(name).build(trained(), INPUTS, profile_of(name, number, **options), file, samples=samples())


@pytest.fixture(params=NEEDS)
def name(request: pytest.FixtureRequest) -> str:
    for package in (request.param, NEEDS[request.param]):
        pytest.importorskip(package, reason=f"{package} is not installed")
    return str(request.param)


def test_int8_is_smaller_and_as_accurate_on_real_data(name: str, tmp_path: Path) -> None:
    dense, small = build(name, "fp32", tmp_path), build(name, "int8", tmp_path)
    assert (dense.dtype, small.dtype) == ("float32", "int8")
    assert small.parity_real is not None
    assert small.parity_real.cases == 32
    assert 0 < small.parity_real.max_rel < 0.25  # NNCF cuts outliers off: 0.19
    assert dense.parity_real is not None
    assert dense.parity_real.max_rel < TOLERANCES["fp32"]
    assert small.accuracy is not None
    assert small.accuracy.examples == 60
    assert small.accuracy.pytorch > 0.9
    assert abs(small.accuracy.compiled - small.accuracy.pytorch) <= 2 / 60

    small.save(tmp_path / "record.json")
    assert Artifact.load(tmp_path / "record.json") == small
    image, _ = stripes(1, 7)
    found = backends.load(name).session(small)((image,))[0]
    expected = trained()(image).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=0.25 * np.abs(expected).max())


def test_int8_without_calibration_data_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"int8 is calibrated with real inputs, and there are none; pass\s+samples="):
        backends.load(name).build(trained(), INPUTS, profile_of(name, "int8"), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_int8_of_another_function_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, onnx = torch.export.export, torch.onnx.export

    def wrong(model: nn.Module) -> nn.Module:
        other = copy.deepcopy(model)
        if hasattr(other, "head") and isinstance(other.head, nn.Linear):
            other.head.weight.data = other.head.weight.data.flip(0)
        return other

    monkeypatch.setattr(torch.export, "export", lambda model, *a, **k: program(wrong(model), *a, **k))
    monkeypatch.setattr(torch.onnx, "export", lambda model, *a, **k: onnx(wrong(model), *a, **k))
    with pytest.raises(BuildError, match=r"does not compute .* 32 calibration inputs, tolerance 0.5"):
        build(name, "int8", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ["fp8", "int4", "tf32"])
def test_a_number_format_that_cannot_be_made_is_refused(number: str, tmp_path: Path) -> None:
    for name in backends.installed():
        with pytest.raises(BuildError, match=rf"wants {number}, but {name} makes .*fp32.*; choose a profile of these"):
            backends.load(name).build(trained(), INPUTS, profile_of(name, number), tmp_path / "x", samples=samples())


def test_weights_and_activations_of_two_formats_are_refused(tmp_path: Path) -> None:
    profile = profile_of("pytorch", "fp32")
    mixed = profile.model_copy(update={"dtype": profile.dtype.model_copy(update={"weights": "int8"})})
    with pytest.raises(BuildError, match="wants int8 weights with fp32 activations"):
        backends.load("pytorch").build(trained(), INPUTS, mixed, tmp_path / "x", samples=samples())


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_onnx_constants_are_folded_per_channel_and_without_subnormals(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    for package in (name, NEEDS[name]):
        pytest.importorskip(package, reason=f"{package} is not installed")
    model = copy.deepcopy(trained())
    with torch.no_grad():
        model.stem[0].weight[:4] = 1e-30
        model.stem[1].weight[:4] = 1e-10  # folded: 1e-40, a subnormal
    artifact = backends.load(name).build(
        model, INPUTS, profile_of(name, "int8"), tmp_path / "model.onnx", samples=samples()
    )
    assert artifact.subnormals_flushed >= 4 * 9
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    scales = {node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in _constants(graph)}
    assert max(values[scale].size for scale in scales if scale in values) == 16
    bits = np.concatenate([value.ravel().view(np.uint32) for value in values.values() if value.dtype == np.float32])
    assert not (((bits & 0x7F800000) == 0) & ((bits & 0x007FFFFF) != 0)).any()


def test_every_layer_of_an_int8_model_runs_in_int8_on_onnxruntime(tmp_path: Path) -> None:
    runtime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    artifact = build("onnxruntime", "int8", tmp_path)
    settings = runtime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "fused.onnx")
    settings.log_severity_level = 3
    runtime.InferenceSession(artifact.path, settings, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert fused.count("QLinearConv") == 3
    assert "Conv" not in fused


@pytest.mark.parametrize(
    ("machine", "flags", "free"),
    [
        ("x86_64", {"avx512_vnni"}, True),
        ("AMD64", {"avx_vnni", "avx2"}, True),
        ("x86_64", {"avx2"}, False),
        ("aarch64", set(), True),
    ],
)
def test_seven_bits_are_for_processors_that_saturate(
    machine: str, flags: set[str], free: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    features = type("Info", (), {"features": flags})()
    monkeypatch.setattr(quantisation.platform, "machine", lambda: machine)
    monkeypatch.setattr(archspec_detect, "detected_info", lambda: features)
    assert quantisation.multiplies_without_overflow() == free
    assert build("onnxruntime", "int8", tmp_path).settings["reduce_range"] == (not free)


def test_a_provider_or_device_that_is_absent_is_named(tmp_path: Path) -> None:
    for name, option, pattern in [
        ("onnxruntime", {"provider": "cuda"}, "has no CUDAExecutionProvider"),
        ("openvino", {"device": "npu"}, "sees no NPU here"),
    ]:
        runtime = pytest.importorskip(name)
        if name == "onnxruntime" and "CUDAExecutionProvider" in runtime.get_available_providers():
            continue
        with pytest.raises(BackendUnavailable, match=pattern):
            build(name, "fp32", tmp_path, **option)
        assert list(tmp_path.iterdir()) == []


def test_the_profile_of_a_gpu_asks_for_it(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in runtime.get_available_providers():
        pytest.skip("this machine has a GPU")
    profile = profile_of("onnxruntime", "fp32", kind="gpu", arch="sm_90")
    with pytest.raises(BackendUnavailable, match="CUDAExecutionProvider"):
        backends.load("onnxruntime").build(trained(), INPUTS, profile, tmp_path / "x.onnx")


def test_unknown_options_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"option trheads = 4 cannot be used .*known are device, graphs, layout, mode"):
        backends.load("pytorch").build(trained(), INPUTS, profile_of("pytorch", "fp32", trheads=4), tmp_path / "x")
    with pytest.raises(BuildError, match=r"option mode = 'fast' cannot be used"):
        backends.load("pytorch").build(trained(), INPUTS, profile_of("pytorch", "fp32", mode="fast"), tmp_path / "x")


def test_every_profile_that_ships_is_understood_or_refused_with_a_remedy() -> None:
    found, refused = {}, []
    for profile in map(profiles.load, profiles.names()):
        if profile.runtime.name not in known():
            continue
        module = import_module(f"backends.{profile.runtime.name}")
        arguments = () if profile.runtime.name == "executorch" else (profile.dtype.weights,)
        try:
            found[profile.id] = module.options_for(profile, *arguments)
        except BuildError as error:
            refused.append(str(error))
    assert all(re.search("; |only", told) for told in refused), refused
    assert found["x86_64_v4.onnxruntime.fp32"].provider == "cpu"
    assert found["ethos-u55-128.vela.int8"].accelerator == "ethos-u55-128"
    assert found["jetson-agx-orin-64gb.tensorrt-dla.int8"].dla_core == 0
    assert (found["nvidia-h200.cublas.fp16"].device, found["nvidia-h200.cublas.fp16"].graphs) == ("cuda", True)


def test_openvino_computes_in_bf16_where_the_processor_can(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(BuildError, match="does not compute in bf16"):
            build("openvino", "bf16", tmp_path)
        pytest.skip("this processor has no bf16")
    artifact = build("openvino", "bf16", tmp_path)
    assert artifact.dtype == "bfloat16"
    assert 1e-4 < artifact.parity.max_rel < TOLERANCES["bf16"]  # above fp32's: it really rounds
    session = backends.load("openvino").session(artifact)
    image, _ = stripes(1, 7)
    assert 1e-5 < float(np.abs(session((image,))[0] - trained()(image).detach().numpy()).max()) < 0.1


def test_openvino_takes_sparse_weights_on_the_cpu_only(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from openvino.properties import intel_cpu

    from backends.openvino import Options, properties_for

    rate = intel_cpu.sparse_weights_decompression_rate
    assert properties_for(Options(sparse_weights=0.8), 1)[rate] == 0.8
    assert rate not in properties_for(Options(), 1)
    assert build("openvino", "fp32", tmp_path, sparse_weights=0.8).settings["sparse_weights"] == 0.8


def test_a_disliked_shape_is_told_by_layer_before_compiling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profile = profile_of("pytorch", "fp32")
    (reject, source), (cliff, _), (pad, _) = (
        rule("out_channels", "reject", 32),
        rule("in_channels", "cliff", 16),
        rule("in_channels", "pad", 64),
    )
    strict = profile.model_copy(update={"granularity": (reject, cliff, pad), "source": (source,)})
    artifact = backends.load("pytorch").build(trained(), INPUTS, strict, tmp_path / "x.safetensors")
    assert [remark.split(" of ")[0] for remark in artifact.remarks] == [
        "stem.0: in_channels 1",
        "stem.0: out_channels 16",
        "body.0: out_channels 16",
        "body.3: out_channels 16",
    ]
    assert all(remark in caplog.text for remark in artifact.remarks)
    assert "reject, the convolution runs elsewhere" in caplog.text


def on_grid(profile: Profile) -> Profile:
    reject, source = rule("out_channels", "reject", 32)
    return profile.model_copy(update={"granularity": (reject,), "source": (source,)})


@pytest.mark.parametrize("name", ["ethos-u", "executorch", "onnxruntime", "openvino", "pytorch"])
def test_every_runtime_tells_disliked_shapes_before_it_compiles(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if name == "ethos-u":
        pytest.importorskip("ethosu.vela", reason="Vela is not installed: pip install 'espalier[ethos-u]'")
        profile = profile_of("executorch", "int8", kind="npu", arch="ethos-u55-128")
    else:
        profile = profile_of(name, "fp32")
    pytest.importorskip(profile.runtime.name if name != "pytorch" else "torch", reason=f"{name} is not installed")

    def compiling(*_: object, **__: object) -> None:
        raise RuntimeError("compiling")

    for module in (torch.onnx, torch.export):
        monkeypatch.setattr(module, "export", compiling)
    monkeypatch.setattr(safetensors.torch, "save", compiling)
    with pytest.raises((BuildError, RuntimeError), match="compiling"):
        backends.load(profile.runtime.name).build(
            trained(), INPUTS, on_grid(profile), tmp_path / "x", samples=samples()
        )
    assert "stem.0: out_channels 16 of a conv2d is no multiple of 32: reject" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_disliked_shapes_are_told_of_a_model_that_is_a_graph() -> None:
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding="same"), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 64, 1))
    graph = torch.export.export(net, INPUTS).module(check_guards=False)
    strict = on_grid(profile_of("pytorch", "fp32"))
    (remark,) = beside_the_grid(graph, strict)
    assert remark == beside_the_grid(net, strict)[0]
    assert remark.startswith("0: out_channels 16 of a conv2d")


def test_channels_of_a_grouped_convolution_are_counted_per_group() -> None:
    profile = profile_of("pytorch", "fp32")
    told, source = rule("in_channels", "cliff", 16)
    grouped, depthwise = (told.model_copy(update={"op": op}) for op in ("grouped_conv2d", "depthwise_conv2d"))
    strict = profile.model_copy(update={"granularity": (told, grouped, depthwise), "source": (source,)})
    net = nn.Sequential(nn.Conv2d(32, 32, 1, groups=4), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 8, 1))
    (remark,) = beside_the_grid(net, strict)
    assert remark.startswith("0: in_channels 8 of a grouped_conv2d is no multiple of 16: cliff")
    assert "(source)" in remark


def test_samples_are_cut_to_the_shape_of_the_model() -> None:
    batches = [(torch.arange(3.0)[:, None], torch.arange(3)), (torch.arange(3.0, 8)[:, None], torch.arange(5))]
    cut = Samples.of(batches, batches, like=(torch.zeros(2, 1),), calibrated=6, tested=100)
    assert [batch[0].flatten().tolist() for batch in cut.calibration] == [[0, 1], [2, 3], [4, 5]]
    assert [targets.tolist() for _, targets in cut.test] == [[0, 1], [2, 0], [1, 2], [3, 4]]
    with pytest.raises(BuildError, match=r"examples of shapes \[\(1,\)\], but the model is built for \[\(2,\)\]"):
        Samples.of(batches, like=(torch.zeros(1, 2),))


def test_random_cases_look_like_the_calibration_data() -> None:
    def drawn(given: Samples) -> Tensor:
        return torch.stack([case[0] for case in random_cases((torch.zeros(100, 10),), given)])

    shifted = drawn(Samples(calibration=((5 + 3 * torch.randn(100, 10),),)))
    assert abs(float(shifted.mean()) - 5) < 0.5
    assert abs(float(shifted.std()) - 3) < 0.5
    assert abs(float(drawn(Samples()).mean())) < 0.1
