"""ONNX Runtime: fp32 and int8 on the CPU, on CUDA, or through its TensorRT provider."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from backends.artifact import Artifact, TensorSpec
from backends.build import Job, Made
from backends.contract import NO_SAMPLES, Array, Bound, Session, content_for
from backends.export import export_onnx
from backends.quantisation import for_onnxruntime, multiplies_without_overflow
from backends.samples import Samples
from backends.settings import Settings, asked
from profiles.errors import BackendUnavailable, BuildError

if TYPE_CHECKING:
    from profiles.schema import Profile

__all__ = ["EXTRA", "INSTANCES", "NAME", "SUFFIX", "Options", "build", "options_for", "session", "version"]

NAME = "onnxruntime"
EXTRA = "pip install 'espalier[onnxruntime]'"
SUFFIX = ".onnx"
INSTANCES = 5
_PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    # What TensorRT does not take runs on CUDA, as ONNX Runtime's manual has it.
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
}


class Options(Settings):
    """`reduce_range` keeps int8 weights at 7 bits; it is chosen for the CPU that builds unless given."""

    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    reduce_range: bool | None = None


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
    """Write `model` as an ONNX file that ONNX Runtime was shown to run as PyTorch does; BuildError otherwise."""
    job = Job(
        runtime=NAME,
        version=version(),
        model=model,
        inputs=inputs,
        profile=profile,
        threads=threads,
        samples=samples,
        can=("fp32", "int8"),
    )
    options = options_for(profile, job.number)

    def write(file: Path) -> Made:
        if job.number == "fp32":
            return Made(export_onnx(model, inputs, file).subnormals_flushed)
        signed, reduce_range = options.provider != "cpu", bool(options.reduce_range)
        return Made(for_onnxruntime(model, inputs, file, samples=samples, signed=signed, reduce_range=reduce_range))

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


def options_for(profile: "Profile | None", number: str) -> Options:
    """Return the options that the profile asks for: CUDA if its device is a GPU."""
    on_gpu = profile is not None and profile.device.kind == "gpu"
    options = Options.of({"provider": "cuda" if on_gpu else "cpu", **asked(profile)})
    if number == "int8" and options.reduce_range is None:
        saturates = options.provider == "cpu" and not multiplies_without_overflow()
        return options.model_copy(update={"reduce_range": saturates})
    return options


def _imported() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(f"{NAME} is not installed ({error}): {EXTRA}") from error
    return onnxruntime


def _opened(content: bytes, *, specs: tuple[TensorSpec, ...], threads: int, options: Options) -> Session:
    runtime = _imported()
    providers = _PROVIDERS[options.provider]
    if missing := set(providers) - set(runtime.get_available_providers()):
        raise BackendUnavailable(
            f"{NAME} {version()} has no {', '.join(sorted(missing))}, only "
            f"{', '.join(runtime.get_available_providers())}; pip install onnxruntime-gpu in place of onnxruntime"
        )
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3  # errors: they are also raised, and its warnings on stderr are not for users
    if options.provider != "cpu":  # what a GPU cannot run, and a driver that does not load, are errors, never the CPU
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        opened = runtime.InferenceSession(content, settings, providers=list(providers))
    except Exception as error:  # its exceptions share no base class but this one
        raise BuildError(f"{NAME} {version()} refuses the model: {error}") from error
    if (first := opened.get_providers()[0]) != providers[0]:
        raise BackendUnavailable(f"{providers[0]} does not load, {NAME} would run on {first}; mend the driver")
    return Session(specs, threads, partial(_bound, opened, specs=specs, options=options))


def _bound(opened: Any, arrays: tuple[Array, ...], *, specs: tuple[TensorSpec, ...], options: Options) -> Bound:
    device = "cpu" if options.provider == "cpu" else "cuda"
    binding = opened.io_binding()
    read = {value.name for value in opened.get_inputs()}  # an export drops inputs that the model ignores
    kept: list[object] = [arrays]  # the binding points into these
    for spec, array in zip(specs, arrays, strict=True):
        if spec.name not in read:
            continue
        if device == "cpu":
            binding.bind_cpu_input(spec.name, array)
        else:  # copied once, so that a run is timed and not a transfer
            kept.append(value := _imported().OrtValue.ortvalue_from_numpy(array, device, 0))
            binding.bind_ortvalue_input(spec.name, value)
    for value in opened.get_outputs():
        binding.bind_output(value.name, device)

    def outputs() -> list[Array]:
        return [array.copy() for array in binding.copy_outputs_to_cpu()]

    def run(_kept: object = kept) -> None:
        opened.run_with_iobinding(binding)
        if device != "cpu":
            binding.synchronize_outputs()

    return Bound(run, outputs)
