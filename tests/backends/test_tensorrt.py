"""TensorRT without a GPU: what each version is told, against a module that notes what it was told."""

import struct
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import backends
from backends import tensorrt
from backends.tensorrt import Half, Options, build_for, engine_of, options_for
from profiles.errors import BackendUnavailable, BuildError

from .nets import IMAGE, profile_of, samples, trained

ORIN = {"kind": "npu", "arch": "dla-2"}


@pytest.mark.parametrize(
    ("installed", "number", "network", "flags", "onnx"),
    [
        ("8.6.1", "fp32", ("EXPLICIT_BATCH",), (), "fp32"),
        ("8.6.1", "fp16", ("EXPLICIT_BATCH",), ("FP16",), "fp32"),
        ("8.6.1", "int8", ("EXPLICIT_BATCH",), ("INT8",), "int8"),
        ("9.3.0", "fp16", ("EXPLICIT_BATCH",), ("FP16",), "fp32"),
        ("10.7.0", "fp16", (), ("FP16",), "fp32"),
        ("10.16.1", "int8", (), ("INT8",), "int8"),
        ("11.0.0", "fp32", (), (), "fp32"),
        ("11.4.1", "fp16", (), (), "fp16"),
        ("11.4.1", "int8", (), (), "int8"),
        ("10.0.0b6", "fp16", (), ("FP16",), "fp32"),
    ],
)
def test_each_version_is_told_what_it_understands(
    installed: str, number: str, network: tuple[str, ...], flags: tuple[str, ...], onnx: str
) -> None:
    told = build_for(options_for(profile_of("tensorrt", number, kind="gpu"), number), installed)
    assert (told.network_flags, told.set_flags, told.onnx) == (network, flags, onnx)
    assert told.clear_flags == (("TF32",) if number == "fp32" else ())
    assert (told.dla_core, told.calibrator) == (None, False)


@pytest.mark.parametrize(
    ("installed", "number", "flags", "calibrator", "onnx"),
    [
        ("8.6.1", "int8", ("INT8", "FP16", "GPU_FALLBACK"), True, "fp32"),
        ("10.7.0", "fp16", ("FP16", "GPU_FALLBACK"), False, "fp32"),
        ("11.4.1", "int8", ("GPU_FALLBACK",), False, "int8"),
        ("11.5.0", "fp16", ("GPU_FALLBACK",), False, "fp16"),
    ],
)
def test_the_profile_of_a_dla_runs_there(
    installed: str, number: str, flags: tuple[str, ...], calibrator: bool, onnx: str
) -> None:
    options = options_for(profile_of("tensorrt", number, **ORIN), number)
    assert (options.dla_core, options.graphs) == (0, False)
    told = build_for(options, installed)
    assert (told.set_flags, told.calibrator, told.onnx, told.dla_core) == (flags, calibrator, onnx, 0)
    alone = build_for(options.model_copy(update={"gpu_fallback": False}), installed)
    assert "GPU_FALLBACK" not in alone.set_flags


def test_options_of_the_profile_reach_the_builder() -> None:
    profile = profile_of("tensorrt", "fp16", kind="gpu", sparse_weights=True, workspace_bytes=123, timing_cache="x")
    options = options_for(profile, "fp16")
    assert build_for(options, "10.7").set_flags == ("FP16", "SPARSE_WEIGHTS")
    assert build_for(options, "11.1").set_flags == ("SPARSE_WEIGHTS",)
    assert build_for(options, "11.1").workspace_bytes == 123
    assert options.timing_cache == "x"


@pytest.mark.parametrize(
    ("options", "installed", "pattern"),
    [
        ({}, "8.5.3", "older than 8.6"),
        ({"sparse_weights": True}, "10.7", "2:4 weights in fp16 and int8, not in fp32"),
        ({"dla_core": 0}, "10.7", "a DLA computes in fp16 and int8"),
        ({"dla_core": 0, "number": "int8"}, "10.8", "10.7 was the last to have it before 11.4.1"),
        ({"dla_core": 1, "number": "fp16"}, "11.4.0", "10.7 was the last to have it before 11.4.1"),
    ],
)
def test_what_a_version_cannot_do_is_refused(options: dict[str, Any], installed: str, pattern: str) -> None:
    with pytest.raises(BuildError, match=pattern):
        build_for(Options.of(options), installed)


class Names:
    """An enumeration whose members are their own names, or numbers where they are shifted."""

    def __init__(self, **values: int) -> None:
        self.values = values

    def __getattr__(self, name: str) -> Any:
        return self.values.get(name, name)


class Fake:
    """A TensorRT that notes what its configuration is told, and makes engines of eight bytes."""

    def __init__(self, *, parses: bool = True, builds: bool = True) -> None:
        self.__version__ = "10.7.0"
        self.told: list[tuple[str, object]] = []
        self.config = SimpleNamespace(
            set_memory_pool_limit=lambda pool, size: self.note("limit", (pool, size)),
            set_flag=lambda flag: self.note("set", flag),
            clear_flag=lambda flag: self.note("clear", flag),
            create_timing_cache=lambda content: ("cache", content),
            set_timing_cache=lambda cache, ignore: self.note("cache", (cache, ignore)) or True,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: memoryview(b"timings")),
        )
        self.network = SimpleNamespace()
        self.parses, self.builds = parses, builds
        self.Logger = type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None})
        self.NetworkDefinitionCreationFlag = Names(EXPLICIT_BATCH=0)
        self.BuilderFlag = self.MemoryPoolType = self.DeviceType = Names()

    def note(self, what: str, value: object) -> None:
        self.told.append((what, value))

    def Builder(self, logger: object) -> Any:
        return SimpleNamespace(
            create_network=lambda bits: self.note("network", bits) or self.network,
            create_builder_config=lambda: self.config,
            build_serialized_network=lambda network, config: memoryview(b"an engine") if self.builds else None,
        )

    def OnnxParser(self, network: object, logger: object) -> Any:
        errors = [] if self.parses else ["no such operation: Foo"]
        return SimpleNamespace(
            parse=lambda content: self.note("parse", content) or self.parses,
            num_errors=len(errors),
            get_error=errors.__getitem__,
        )


def test_the_builder_is_told_everything(tmp_path: Path) -> None:
    fake, cache = Fake(), tmp_path / "timings"
    cache.write_bytes(b"older")
    options = Options.of({"number": "int8", "dla_core": 1, "sparse_weights": True, "workspace_bytes": 99})
    engine = engine_of(fake, b"onnx", build_for(options, "8.6"), calibrator="calibrator", cache_file=cache)
    assert engine == b"an engine"
    assert fake.told == [
        ("network", 1),
        ("parse", b"onnx"),
        ("limit", ("WORKSPACE", 99)),
        *(("set", name) for name in ("INT8", "FP16", "SPARSE_WEIGHTS", "GPU_FALLBACK")),
        ("cache", (("cache", b"older"), False)),
    ]
    assert (fake.config.default_device_type, fake.config.DLA_core) == ("DLA", 1)
    assert fake.config.int8_calibrator == "calibrator"
    assert cache.read_bytes() == b"timings"


def test_strongly_typed_networks_get_no_flag_of_precision() -> None:
    fake = Fake()
    engine_of(fake, b"onnx", build_for(Options(number="fp16"), "11.0"), calibrator=None, cache_file=None)
    assert [what for what, _ in fake.told] == ["network", "parse", "limit", "cache"]
    assert ("network", 0) in fake.told
    assert not hasattr(fake.config, "int8_calibrator")
    assert not hasattr(fake.config, "DLA_core")


def test_what_the_parser_or_builder_refuses_is_told() -> None:
    told = build_for(Options(), "10.7")
    with pytest.raises(BuildError, match=r"tensorrt 10\.7\.0 refuses the model: no such operation: Foo"):
        engine_of(Fake(parses=False), b"", told, calibrator=None, cache_file=None)
    with pytest.raises(BuildError, match="makes no engine of the model"):
        engine_of(Fake(builds=False), b"", told, calibrator=None, cache_file=None)


def test_without_a_gpu_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    # PyTorch looks the module up too, and wants a specification.
    fake = SimpleNamespace(__version__="10.7.0", __spec__=ModuleSpec("tensorrt", None))
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    runtime = backends.load("tensorrt")
    assert runtime.version() == "10.7.0"
    with pytest.raises(BackendUnavailable, match="tensorrt needs a CUDA device"):
        runtime.build(trained(), (torch.zeros(IMAGE),), None, tmp_path / "model.engine")
    with pytest.raises(BuildError, match="a DLA computes in fp16 and int8"):  # refused before a GPU is looked for
        runtime.build(
            trained(), (torch.zeros(IMAGE),), profile_of("tensorrt", "fp32", **ORIN), tmp_path / "model.engine"
        )
    assert list(tmp_path.iterdir()) == []


def test_the_onnx_file_has_the_number_format_that_is_asked_for(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    job = SimpleNamespace(model=trained(), inputs=(torch.zeros(IMAGE),), samples=samples())
    found = {}
    for number in ("fp32", "fp16", "int8"):
        tensorrt._onnx(job, tmp_path / number, build_for(Options(number=number), "11.1"))
        graph = onnx.load(tmp_path / number).graph
        found[number] = {tensor.data_type for tensor in graph.initializer}, {node.op_type for node in graph.node}
        assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    assert onnx.TensorProto.FLOAT16 not in found["fp32"][0]
    assert onnx.TensorProto.FLOAT16 in found["fp16"][0]
    assert onnx.TensorProto.FLOAT not in found["fp16"][0]
    assert {"QuantizeLinear", "DequantizeLinear"} <= found["int8"][1]


def test_gpus_get_symmetric_activations(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    job = SimpleNamespace(model=trained(), inputs=(torch.zeros(IMAGE),), samples=samples())
    tensorrt._onnx(job, tmp_path / "x", build_for(Options(number="int8"), "10.7"))
    graph = onnx.load(tmp_path / "x").graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    points = [values[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert points
    assert all(point.dtype == np.int8 and not point.any() for point in points)


def test_half_keeps_the_model_and_its_inputs_and_outputs() -> None:
    class Pair(torch.nn.Module):
        def forward(self, x: torch.Tensor, index: torch.Tensor) -> dict[str, Any]:
            assert x.dtype == torch.float16
            return {"a": x, "b": (index,)}

    found = Half(Pair())(torch.ones(2), torch.tensor([1]))
    assert (found["a"].dtype, found["b"][0].dtype) == (torch.float32, torch.int64)
    model = trained()
    half = Half(model)
    assert next(model.parameters()).dtype == torch.float32
    assert torch.allclose(half(torch.ones(IMAGE)), model(torch.ones(IMAGE)), atol=0.05)


def test_the_calibrator_hands_over_each_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self.clone())
    base: Callable[..., Any] = type("IInt8EntropyCalibrator2", (), {})
    calibrator = tensorrt._calibrator(SimpleNamespace(IInt8EntropyCalibrator2=base), samples())
    assert isinstance(calibrator, base)
    assert calibrator.get_batch_size() == 1
    pointers = [calibrator.get_batch(["input_0"]) for _ in samples().calibration]
    assert all(isinstance(pointer, int) and struct.pack("P", pointer) for (pointer,) in pointers)
    assert calibrator.get_batch(["input_0"]) is None
    assert calibrator.read_calibration_cache() is None
