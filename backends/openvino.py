"""OpenVINO on Intel and other x86 and Arm CPUs, and on Intel GPUs and NPUs."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from backends.artifact import Artifact, TensorSpec
from backends.build import Job, Made
from backends.contract import NO_SAMPLES, Array, Bound, Session, content_for
from backends.export import export_onnx
from backends.quantisation import for_openvino
from backends.samples import Samples
from backends.settings import Settings, asked
from profiles.errors import BackendUnavailable, BuildError

if TYPE_CHECKING:
    from profiles.schema import Profile

__all__ = [
    "EXTRA",
    "INSTANCES",
    "NAME",
    "SUFFIX",
    "Options",
    "build",
    "options_for",
    "properties_for",
    "session",
    "version",
]

NAME = "openvino"
EXTRA = "pip install 'espalier[openvino]'"
SUFFIX = ".onnx"
INSTANCES = 5
_CAPABILITY = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16", "int8": "INT8"}


class Options(Settings):
    """Where it runs and in what number format; the file itself is fp32 or int8.

    `sparse_weights` packs the weights of matrix products that are zero to at least this share, and unpacks them as they
    run (int8 on CPUs with AMX): it saves bandwidth, not work.
    """

    device: Literal["cpu", "gpu", "npu"] = "cpu"
    number: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    sparse_weights: Annotated[float, Field(gt=0, le=1)] | None = None


def version() -> str:
    """Return the installed version; raises BackendUnavailable with the pip line."""
    return str(_imported().__version__).partition("-")[0]


def build(
    model: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    profile: "Profile | None",
    path: Path | str,
    *,
    threads: int = 1,
    samples: Samples = NO_SAMPLES,
) -> Artifact:
    """Write `model` as an ONNX file that OpenVINO was shown to run as PyTorch does; BuildError otherwise.

    The bytes of an fp32 file are those that ONNX Runtime's build writes, so both may share one path. A file that is
    already there is never taken on trust: parity cannot tell a dense model from the masked one that it was cut from.
    """
    job = Job(
        runtime=NAME,
        version=version(),
        model=model,
        inputs=inputs,
        profile=profile,
        threads=threads,
        samples=samples,
        can=tuple(_CAPABILITY),
    )
    options = options_for(profile, job.number)

    def write(file: Path) -> Made:
        if job.number == "int8":
            return Made(for_openvino(model, inputs, file, samples=samples))
        return Made(export_onnx(model, inputs, file).subnormals_flushed)

    return job.make(
        path,
        write=write,
        opened=partial(_opened, specs=job.specs, threads=threads, options=options),
        settings=options.recorded(),
    )


def session(artifact: Artifact, *, threads: int | None = None, model: torch.nn.Module | None = None) -> Session:
    """Open an artifact; the file carries its graph, so `model` is not needed."""
    content = content_for(NAME, artifact, version=version())
    options = Options.of(artifact.settings)
    return _opened(content, specs=artifact.inputs, threads=threads or artifact.threads, options=options)


def _imported() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise BackendUnavailable(f"{NAME} is not installed ({error}): {EXTRA}") from error
    return openvino


def _opened(content: bytes, *, specs: tuple[TensorSpec, ...], threads: int, options: Options) -> Session:
    core = _imported().Core()
    _check(core, options)
    try:
        opened = core.compile_model(core.read_model(content), options.device.upper(), properties_for(options, threads))
    except Exception as error:  # a foreign library: whatever it raises, it refused the model
        raise BuildError(f"{NAME} {version()} refuses the model: {error}") from error
    return Session(specs, threads, partial(_bound, opened, specs=specs))


def options_for(profile: "Profile | None", number: str) -> Options:
    """Return the options that the profile asks for: the GPU or the NPU if its device is one."""
    on = profile.device.kind if profile is not None and profile.device.kind in ("gpu", "npu") else "cpu"
    return Options.of({"device": on, **asked(profile), "number": number})


def properties_for(options: Options, threads: int) -> dict[str, Any]:
    """Return the properties that a model is compiled with."""
    from openvino import Type, properties
    from openvino.properties import hint, intel_cpu

    settings: dict[str, Any] = {
        # The default precision is bf16 on processors with AMX; what int8 leaves runs in fp32.
        hint.inference_precision: {"bf16": Type.bf16, "fp16": Type.f16}.get(options.number, Type.f32),
        hint.performance_mode: hint.PerformanceMode.LATENCY,
    }
    if options.device == "cpu":
        settings[properties.inference_num_threads] = threads
        # One thread runs in the caller, whose cores `pinned` chooses; OpenVINO's own pinning would overrule it.
        settings[hint.enable_cpu_pinning] = False
        if options.sparse_weights is not None:
            settings[intel_cpu.sparse_weights_decompression_rate] = options.sparse_weights
    return settings


def _check(core: Any, options: Options) -> None:
    device = options.device.upper()
    present = core.available_devices
    if not any(name.partition(".")[0] == device for name in present):
        raise BackendUnavailable(f"{NAME} sees no {device} here, only {', '.join(present)}; install its driver")
    capabilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    if _CAPABILITY[options.number] not in capabilities:
        raise BuildError(
            f"the {device} of this machine does not compute in {options.number}, only in "
            f"{', '.join(sorted(name for name, flag in _CAPABILITY.items() if flag in capabilities))}; "
            "choose a profile of these"
        )
    if options.sparse_weights is not None and device != "CPU":
        raise BuildError(f"sparse_weights is an option of the CPU, not of the {device}; remove it")


def _bound(opened: Any, arrays: tuple[Array, ...], *, specs: tuple[TensorSpec, ...]) -> Bound:
    tensor = _imported().Tensor
    request = opened.create_infer_request()
    read = {name for port in opened.inputs for name in port.names}
    for spec, array in zip(specs, arrays, strict=True):
        if spec.name in read:
            request.set_tensor(spec.name, tensor(array, shared_memory=True))

    def outputs() -> list[Array]:
        return [request.get_tensor(port).data.copy() for port in opened.outputs]

    def run(_kept: tuple[Array, ...] = arrays) -> None:  # the tensors point into these arrays
        request.infer(share_outputs=True, decode_strings=False)

    return Bound(run, outputs)
