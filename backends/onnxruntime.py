"""ONNX Runtime on the CPU."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backends.artifact import Artifact, TensorSpec
from backends.build import Job
from backends.contract import Array, Bound, Session, content_for
from backends.export import export_onnx
from profiles.errors import BackendUnavailable, BuildError

if TYPE_CHECKING:
    from profiles.schema import Profile

__all__ = ["EXTRA", "NAME", "build", "session", "version"]

NAME = "onnxruntime"
EXTRA = "pip install 'espalier[onnxruntime]'"
_PROVIDERS = ["CPUExecutionProvider"]


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
) -> Artifact:
    """Write `model` as an ONNX file that ONNX Runtime was shown to run as PyTorch does; BuildError otherwise."""
    job = Job(NAME, version(), model=model, inputs=inputs, profile=profile, threads=threads)
    return job.make(
        path,
        write=lambda file: export_onnx(model, inputs, file).subnormals_flushed,
        opened=partial(_opened, specs=job.specs, threads=threads),
    )


def session(artifact: Artifact, *, threads: int | None = None, model: torch.nn.Module | None = None) -> Session:
    """Open an artifact; the file carries its graph, so `model` is not needed."""
    return _opened(content_for(NAME, artifact), specs=artifact.inputs, threads=threads or artifact.threads)


def _imported() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(f"{NAME} is not installed ({error}): {EXTRA}") from error
    return onnxruntime


def _opened(content: bytes, *, specs: tuple[TensorSpec, ...], threads: int) -> Session:
    runtime = _imported()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors: they are also raised, and its warnings on stderr are not for users
    try:
        # The providers are named, so that a missing one is an error and never another device.
        opened = runtime.InferenceSession(content, options, providers=_PROVIDERS)
    except Exception as error:  # its exceptions share no base class but this one
        raise BuildError(f"{NAME} {version()} refuses the model: {error}") from error
    return Session(specs, threads, partial(_bound, opened, specs=specs))


def _bound(opened: Any, arrays: tuple[Array, ...], *, specs: tuple[TensorSpec, ...]) -> Bound:
    binding = opened.io_binding()
    read = {value.name for value in opened.get_inputs()}  # an export drops inputs that the model ignores
    for spec, array in zip(specs, arrays, strict=True):
        if spec.name in read:
            binding.bind_cpu_input(spec.name, array)
    for value in opened.get_outputs():
        binding.bind_output(value.name)

    def outputs() -> list[Array]:
        return [array.copy() for array in binding.copy_outputs_to_cpu()]

    def run(_kept: tuple[Array, ...] = arrays) -> None:  # the binding points into these arrays
        opened.run_with_iobinding(binding)

    return Bound(run, outputs)
