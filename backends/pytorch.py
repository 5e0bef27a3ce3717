"""Eager PyTorch on the CPU: the runtime that everybody has, and the reference of the others.

Its file is a safetensors file of weights, and a session needs the module they belong to. The obvious format, the
exported program (.pt2), is not used: `torch.export.load` unpickles parts of the archive with `weights_only=False`
(sample inputs, constants, any weight whose entry says so), so a hostile file runs code. TorchScript files are
programs as well. Weights are data, and eager latency is that of the module, not of a replayed graph.
"""

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from backends.artifact import Artifact, TensorSpec
from backends.build import Job
from backends.contract import Array, Bound, Session, content_for, flattened
from backends.subnormals import flushed
from profiles.atomic import write_bytes
from profiles.errors import BuildError

if TYPE_CHECKING:
    from profiles.schema import Profile

__all__ = ["EXTRA", "NAME", "build", "session", "version"]

NAME = "pytorch"
EXTRA = "pip install espalier"


def version() -> str:
    """Return the installed version; PyTorch is always there."""
    return str(torch.__version__)


def build(
    model: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    profile: "Profile | None",
    path: Path | str,
    *,
    threads: int = 1,
) -> Artifact:
    """Write the weights of `model`, without subnormals, as a safetensors file; BuildError if parity fails."""
    job = Job(NAME, version(), model=model, inputs=inputs, profile=profile, threads=threads)
    return job.make(
        path,
        write=partial(_write, model),
        opened=partial(_opened, model=model, specs=job.specs, threads=threads),
    )


def session(artifact: Artifact, *, threads: int | None = None, model: torch.nn.Module | None = None) -> Session:
    """Open an artifact in a copy of `model`, the module that `build` was given or another of the same structure."""
    if model is None:
        raise BuildError(
            f"{artifact.path} holds weights only; give session() or measure() the module: model=the rebuilt model"
        )
    content = content_for(NAME, artifact)
    return _opened(content, model=model, specs=artifact.inputs, threads=threads or artifact.threads)


def _write(model: torch.nn.Module, path: Path) -> int:
    weights: dict[str, torch.Tensor] = {}
    total = 0
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise BuildError(f"the state {name} is a {type(value).__name__}, not a tensor; keep it out of state_dict()")
        # A copy each: safetensors refuses tensors that share memory, which tied weights do.
        tensor = value.detach().cpu().contiguous().clone()
        if tensor.dtype in (torch.float32, torch.float64):
            values, count = flushed(tensor.numpy())
            tensor, total = torch.from_numpy(values), total + count
        weights[name] = tensor
    write_bytes(path, safetensors.torch.save(weights))
    return total


def _opened(content: bytes, *, model: torch.nn.Module, specs: tuple[TensorSpec, ...], threads: int) -> Session:
    # Contiguous, PyTorch's default: training in channels_last must not decide what is measured.
    module: Any = copy.deepcopy(model).cpu().eval()  # Any: the annotations of Module.to leave memory_format out
    module.to(memory_format=torch.contiguous_format)
    try:
        module.load_state_dict(safetensors.torch.load(content), strict=True)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise BuildError(f"the weights do not fit the module: {error}; pass the module that was built") from error
    return Session(specs, threads, partial(_bound, module, threads=threads))


def _bound(module: torch.nn.Module, arrays: tuple[Array, ...], *, threads: int) -> Bound:
    tensors = tuple(map(torch.from_numpy, arrays))
    latest: list[object] = [()]

    def run() -> None:
        # The number of threads belongs to the process, whose training must not inherit ours: set and put back, at
        # a cost of 0.2 us a run.
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                latest[0] = module(*tensors)
        finally:
            torch.set_num_threads(before)

    return Bound(run, lambda: flattened(latest[0]))
