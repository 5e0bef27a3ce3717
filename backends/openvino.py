"""OpenVINO on the CPU."""

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

NAME = "openvino"
EXTRA = "pip install 'espalier[openvino]'"


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
) -> Artifact:
    """Write `model` as an ONNX file that OpenVINO was shown to run as PyTorch does; BuildError otherwise.

    The bytes are those that ONNX Runtime's build writes, so both may share one path. A file that is already there is
    never taken on trust: parity cannot tell a dense model from the masked one that it was cut from.
    """
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
        import openvino
    except ImportError as error:
        raise BackendUnavailable(f"{NAME} is not installed ({error}): {EXTRA}") from error
    return openvino


def _opened(content: bytes, *, specs: tuple[TensorSpec, ...], threads: int) -> Session:
    runtime = _imported()
    from openvino import properties
    from openvino.properties import hint

    settings = {
        properties.inference_num_threads: threads,
        hint.inference_precision: runtime.Type.f32,  # its default is bf16 on processors with AMX
        hint.performance_mode: hint.PerformanceMode.LATENCY,
        # One thread runs in the caller, whose cores `pinned` chooses; OpenVINO's own pinning would overrule it.
        hint.enable_cpu_pinning: False,
    }
    try:
        core = runtime.Core()
        opened = core.compile_model(core.read_model(content), "CPU", settings)
    except Exception as error:  # a foreign library: whatever it raises, it refused the model
        raise BuildError(f"{NAME} {version()} refuses the model: {error}") from error
    return Session(specs, threads, partial(_bound, opened, specs=specs))


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
