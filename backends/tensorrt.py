"""TensorRT 8.6 to 11 on NVIDIA GPUs and on the DLA of Jetson Orin, from ONNX.

What changed between the versions (NVIDIA's migration guides 8.x to 10.x and 10.x to 11.x, and the release notes):

* 10.0: networks always have an explicit batch; the flag EXPLICIT_BATCH is ignored, and 8.x wants it.
* 10.0: engines are run by tensor name alone; the calls used here (`set_tensor_address`, `execute_async_v3`) are in 8.6.
* 11.0: networks are strongly typed. BuilderFlag.FP16 and INT8 and the int8 calibrators are gone: the number format is
  that of the ONNX file, fp16 tensors or quantise-dequantise pairs.
* DLA: in no release from 10.8 to 11.4.0. The weakly typed releases want int8 for it from a calibrator.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from packaging.version import Version
from pydantic import Field

from backends.artifact import Artifact, TensorSpec
from backends.build import Job, Made
from backends.contract import NO_SAMPLES, Array, Bound, Session, content_for
from backends.cuda import finished, required
from backends.export import export_onnx
from backends.quantisation import for_onnxruntime
from backends.samples import Inputs, Samples
from backends.semi_structured import has_two_of_four
from backends.settings import Settings, asked
from profiles.atomic import write_bytes
from profiles.errors import BackendUnavailable, BuildError

if TYPE_CHECKING:
    from profiles.schema import Profile

__all__ = [
    "EXTRA",
    "INSTANCES",
    "NAME",
    "SUFFIX",
    "Build",
    "Options",
    "build",
    "build_for",
    "options_for",
    "session",
    "version",
]

NAME = "tensorrt"
EXTRA = "pip install 'espalier[tensorrt]'"
SUFFIX = ".engine"
INSTANCES = 1
_CAN = ("fp32", "fp16", "int8")


class Options(Settings):
    """The builder's options: `timing_cache` is a file that is read and added to, `dla_core` a DLA in place of the GPU.

    `gpu_fallback` lets the GPU run what the DLA cannot; without it that is an error. `graphs` replays a CUDA graph.
    """

    number: Literal["fp32", "fp16", "int8"] = "fp32"
    sparse_weights: bool = False
    dla_core: Annotated[int, Field(ge=0)] | None = None
    gpu_fallback: bool = True
    timing_cache: str | None = None
    workspace_bytes: Annotated[int, Field(gt=0)] = 1 << 30
    graphs: bool = True


@dataclass(frozen=True)
class Build:
    """What one version of TensorRT is told, by the names of its flags."""

    network_flags: tuple[str, ...]
    set_flags: tuple[str, ...]
    clear_flags: tuple[str, ...]
    onnx: Literal["fp32", "fp16", "int8"]  # the number format that the ONNX file itself has
    calibrator: bool
    dla_core: int | None
    workspace_bytes: int


def version() -> str:
    """Return the installed version; raises BackendUnavailable with the pip line."""
    return str(_imported().__version__)


def build(
    model: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    profile: "Profile | None",
    path: Path | str,
    *,
    threads: int = 1,
    samples: Samples = NO_SAMPLES,
) -> Artifact:
    """Write `model` as an engine for the GPU of this machine that was shown to compute what PyTorch does."""
    job = Job(
        runtime=NAME,
        version=version(),
        model=model,
        inputs=inputs,
        profile=profile,
        threads=threads,
        samples=samples,
        can=_CAN,
    )
    options = options_for(profile, job.number)
    if options.number != "fp32" and "sparse_weights" not in asked(profile):
        layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
        options = options.model_copy(update={"sparse_weights": has_two_of_four(model, layers)})
    told = build_for(options, job.version)
    required(NAME)
    return job.make(
        path,
        write=partial(_write, job, options=options, told=told),
        opened=partial(_opened, specs=job.specs, threads=threads, options=options),
        settings=options.recorded(),
    )


def session(artifact: Artifact, *, threads: int | None = None, model: torch.nn.Module | None = None) -> Session:
    """Open an artifact; the file carries its graph, so `model` is not needed."""
    content = content_for(NAME, artifact, version=version())
    options = Options.of(artifact.settings)
    return _opened(content, specs=artifact.inputs, threads=threads or artifact.threads, options=options)


def options_for(profile: "Profile | None", number: str) -> Options:
    """Return the options that the profile asks for: a DLA if its architecture is one, 2:4 weights if asked."""
    on_dla = profile is not None and profile.device.arch.startswith("dla")
    return Options.of({**({"dla_core": 0, "graphs": False} if on_dla else {}), **asked(profile), "number": number})


def build_for(options: Options, installed: str) -> Build:
    """Return what to tell TensorRT `installed`; raises BuildError for what it cannot do."""
    release = Version(installed)
    _check(options, release)
    typed = release.major >= 11
    on_dla = options.dla_core is not None
    flags = {"fp16": ("FP16",), "int8": ("INT8", "FP16") if on_dla else ("INT8",)}.get(options.number, ())
    calibrator = options.number == "int8" and on_dla and not typed
    return Build(
        network_flags=("EXPLICIT_BATCH",) if release.major < 10 else (),
        set_flags=(
            *(() if typed else flags),
            *(("SPARSE_WEIGHTS",) if options.sparse_weights else ()),
            *(("GPU_FALLBACK",) if on_dla and options.gpu_fallback else ()),
        ),
        clear_flags=("TF32",) if options.number == "fp32" else (),  # on by default, with a mantissa of 10 bits
        onnx="fp32" if calibrator or (options.number == "fp16" and not typed) else options.number,
        calibrator=calibrator,
        dla_core=options.dla_core,
        workspace_bytes=options.workspace_bytes,
    )


def _check(options: Options, release: Version) -> None:
    if release < Version("8.6"):
        raise BuildError(f"{NAME} {release} is older than 8.6, the first that is built for here; install a newer one")
    if options.sparse_weights and options.number == "fp32":
        raise BuildError(f"{NAME} computes 2:4 weights in fp16 and int8, not in fp32; choose a profile of these")
    if options.dla_core is None:
        return
    if options.number == "fp32":
        raise BuildError("a DLA computes in fp16 and int8, not in fp32; choose a profile of these")
    if Version("10.8") <= release < Version("11.4.1"):
        raise BuildError(f"{NAME} {release} has no DLA: 10.7 was the last to have it before 11.4.1; install either")


def configured(trt: Any, builder: Any, told: Build, *, calibrator: Any, cache: bytes) -> Any:
    """Return the builder's configuration for `told`; `trt` is the module."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, told.workspace_bytes)
    for name in told.set_flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in told.clear_flags:
        config.clear_flag(getattr(trt.BuilderFlag, name))
    config.set_timing_cache(config.create_timing_cache(cache), False)
    if told.dla_core is not None:
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = told.dla_core
    if told.calibrator:
        config.int8_calibrator = calibrator
    return config


def engine_of(trt: Any, onnx: bytes, told: Build, *, calibrator: Any, cache_file: Path | None) -> bytes:
    """Return the engine that TensorRT makes of an ONNX file; raises BuildError with what the parser or builder said."""
    builder = trt.Builder(_logger(trt))
    bits = sum(1 << int(getattr(trt.NetworkDefinitionCreationFlag, name)) for name in told.network_flags)
    network = builder.create_network(bits)
    parser = trt.OnnxParser(network, _logger(trt))
    if not parser.parse(onnx):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise BuildError(f"{NAME} {trt.__version__} refuses the model: {errors}")
    cache = cache_file.read_bytes() if cache_file is not None and cache_file.exists() else b""
    config = configured(trt, builder, told, calibrator=calibrator, cache=cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(f"{NAME} {trt.__version__} makes no engine of the model; its log on standard error says why")
    if cache_file is not None:
        write_bytes(cache_file, bytes(config.get_timing_cache().serialize()))
    return bytes(engine)


def _write(job: Job, path: Path, *, options: Options, told: Build) -> Made:
    trt = _imported()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        count = _onnx(job, file, told)
        cache_file = None if options.timing_cache is None else Path(options.timing_cache)
        calibrator = _calibrator(trt, job.samples) if told.calibrator else None
        path.write_bytes(engine_of(trt, file.read_bytes(), told, calibrator=calibrator, cache_file=cache_file))
    return Made(count)


def _onnx(job: Job, path: Path, told: Build) -> int:
    if told.onnx == "int8":
        return for_onnxruntime(job.model, job.inputs, path, samples=job.samples, signed=True, reduce_range=False)
    model = Half(job.model) if told.onnx == "fp16" else job.model
    return export_onnx(model, job.inputs, path).subnormals_flushed


class Half(torch.nn.Module):
    """A copy of a model in fp16 between inputs and outputs of fp32, for networks whose types are those of the file."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().half()

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Compute in fp16."""
        return _mapped(self.model(*(each.half() if each.is_floating_point() else each for each in inputs)))


def _mapped(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.float() if output.dtype == torch.float16 else output
    if isinstance(output, dict):
        return {name: _mapped(value) for name, value in output.items()}
    return tuple(_mapped(value) for value in output)


def _calibrator(trt: Any, samples: Samples) -> Any:
    """Return a calibrator of the kind that DLA requires, over the calibration data; nothing is cached on disk."""

    class Calibrator(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]  # the module is not there when this is checked
        def __init__(self) -> None:
            super().__init__()
            self.batches: Iterator[Inputs] = iter(samples.calibration)
            self.held: Inputs = ()

        def get_batch_size(self) -> int:
            return int(samples.calibration[0][0].shape[0])

        def get_batch(self, names: list[str]) -> list[int] | None:
            batch = next(self.batches, None)
            if batch is None:
                return None
            self.held = tuple(each.cuda().contiguous() for each in batch)  # TensorRT reads them after this returns
            return [self.held[int(name.removeprefix("input_"))].data_ptr() for name in names]

        def read_calibration_cache(self) -> None:
            return None

        def write_calibration_cache(self, cache: object) -> None:
            return None

    return Calibrator()


def _opened(content: bytes, *, specs: tuple[TensorSpec, ...], threads: int, options: Options) -> Session:
    trt = _imported()
    required(NAME)
    runtime = trt.Runtime(_logger(trt))
    if options.dla_core is not None:
        runtime.DLA_core = options.dla_core
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise BuildError(f"{NAME} {version()} refuses the engine: it is for another GPU or version; build it again")
    return Session(specs, threads, partial(_bound, trt, engine, specs=specs, options=options))


def _bound(
    trt: Any, engine: Any, arrays: tuple[Array, ...], *, specs: tuple[TensorSpec, ...], options: Options
) -> Bound:
    context = engine.create_execution_context()
    given = {spec.name: torch.from_numpy(array).cuda() for spec, array in zip(specs, arrays, strict=True)}
    tensors: dict[str, torch.Tensor] = {}
    results: list[str] = []
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            tensors[name] = given[name]
        else:
            results.append(name)
            dtype = torch.from_numpy(np.empty(0, trt.nptype(engine.get_tensor_dtype(name)))).dtype
            tensors[name] = torch.empty(tuple(engine.get_tensor_shape(name)), dtype=dtype, device="cuda")
        context.set_tensor_address(name, tensors[name].data_ptr())

    def launch() -> None:
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise BuildError(f"{NAME} does not run the engine; its log on standard error says why")

    return Bound(finished(launch, graph=options.graphs), lambda: [tensors[name].cpu().numpy() for name in results])


def _logger(trt: Any) -> Any:
    return trt.Logger(trt.Logger.WARNING)


def _imported() -> Any:
    try:
        import tensorrt
    except ImportError as error:
        raise BackendUnavailable(f"{NAME} is not installed ({error}): {EXTRA}") from error
    return tensorrt
