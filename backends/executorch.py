"""ExecuTorch: XNNPACK on x86 and Arm CPUs, fp32 and int8, and Arm's Ethos-U NPUs through Vela, int8."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from backends.artifact import Artifact, TensorSpec
from backends.build import Job, Made
from backends.contract import NO_SAMPLES, Array, Bound, Session, content_for, flattened
from backends.folding import exported
from backends.quantisation import contiguous, quantised_pt2e
from backends.quiet import quietly
from backends.rebuild import masks_of
from backends.samples import Inputs, Samples
from backends.settings import Settings, asked
from backends.xnnpack import XnnpackProgram
from planner.graph import Graph
from planner.operations import Operation
from profiles.errors import BackendUnavailable, BuildError

if TYPE_CHECKING:
    from profiles.schema import Profile

__all__ = ["EXTRA", "INSTANCES", "NAME", "SUFFIX", "Options", "build", "family", "options_for", "session", "version"]

NAME = "executorch"
EXTRA = "pip install 'espalier[executorch]'"
SUFFIX = ".pte"
INSTANCES = 5
log = logging.getLogger(__name__)


class Options(Settings):
    """The processor that the file is lowered to; the others are for Ethos-U and named as Vela names them."""

    delegate: Literal["xnnpack", "ethos-u"] = "xnnpack"
    accelerator: str | None = None
    system_config: str | None = None
    memory_mode: str | None = None


def version() -> str:
    """Return the installed version; raises BackendUnavailable with the pip line."""
    try:
        from executorch.version import __version__
    except ImportError as error:
        raise BackendUnavailable(f"{NAME} is not installed ({error}): {EXTRA}") from error
    return str(__version__).partition("+")[0]


def build(
    model: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    profile: "Profile | None",
    path: Path | str,
    *,
    threads: int = 1,
    samples: Samples = NO_SAMPLES,
) -> Artifact:
    """Write `model` as a .pte file that was shown to compute what PyTorch does; BuildError otherwise.

    A file for an Ethos-U is shown to by Arm's reference model of the operations that Vela compiles; it carries Vela's
    estimate of its latency.
    """
    options = options_for(profile)
    job = Job(
        runtime=NAME,
        version=version(),
        model=model,
        inputs=inputs,
        profile=profile,
        threads=threads,
        samples=samples,
        can=("fp32", "int8") if options.delegate == "xnnpack" else ("int8",),
    )
    if options.delegate == "ethos-u":
        from backends.ethos_u import Compiled  # needs Vela, which XNNPACK does not

        compiled = cache(  # when `make` asks for it, which first says what the device dislikes
            partial(Compiled.of, job, options.accelerator or "", options.system_config, options.memory_mode)
        )
        return job.make(
            path,
            write=lambda file: compiled().write(file),
            opened=lambda content: compiled().session(content),
            settings=options.recorded(),
        )
    return job.make(
        path,
        write=partial(_write, job),
        opened=partial(_opened, specs=job.specs, threads=threads),
        settings=options.recorded(),
    )


def family(
    model: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    profile: "Profile | None",
    graph: Graph,
    *,
    threads: int = 1,
    samples: Samples = NO_SAMPLES,
) -> "Family":
    """Lower `model` once; BuildError if it is for an Ethos-U, in int8, or lowered to what is not known here."""
    if options_for(profile).delegate != "xnnpack":
        raise BuildError("files for an Ethos-U are not narrowed; tools.estimates narrows the programs within them")
    job = Job(NAME, version(), model, inputs, profile, threads, samples)
    _ = job.number  # BuildError for anything but fp32: nothing else is said that it can
    with TemporaryDirectory(prefix="espalier-") as folder:
        path = Path(folder) / f"dense{SUFFIX}"
        made = _write(job, path)
        program = XnnpackProgram.load(path.read_bytes())
    layers = tuple(operation for operation in graph.operations if operation.weight)
    if [tuple(model.get_parameter(each.weight).shape) for each in layers] != [each.shape for each in program.layers]:
        raise BuildError("the model's layers are not lowered one to one, so its file is not narrowed")
    return Family(job, graph, layers, program, made)


@dataclass(frozen=True)
class Family:
    """What one model can become, made from its own file: its layers are those of the graph, in the same order."""

    job: Job
    graph: Graph
    layers: tuple[Operation, ...]
    program: XnnpackProgram
    made: Made

    def build(
        self, model: torch.nn.Module, path: Path | str, *, kept: Mapping[str, torch.Tensor], removed: frozenset[str]
    ) -> Artifact:
        """Write `model`, which was cut so; BuildError unless it matches PyTorch."""
        content = self.program.narrowed(self._channels(kept, removed))
        job = replace(self.job, model=model)
        opened = partial(_opened, specs=job.specs, threads=job.threads)
        return job.make(path, write=partial(self._write, content), opened=opened, settings=Options().recorded())

    def _write(self, content: bytes, path: Path) -> Made:
        path.write_bytes(content)
        return self.made

    def _channels(self, kept: Mapping[str, torch.Tensor], removed: frozenset[str]) -> list[Any]:
        """Return which outputs and inputs each layer keeps, None if it has left."""
        masks, channels = masks_of(self.graph, kept), list[Any]()
        for layer, program in zip(self.layers, self.program.layers, strict=True):
            whole = (torch.ones(size, dtype=torch.bool) for size in program.shape[:2])
            sides = [masks.get((layer.weight, axis), all_) for axis, all_ in enumerate(whole)]
            present = layer.blocks.isdisjoint(removed)
            channels.append(tuple(np.flatnonzero(side.numpy()) for side in sides) if present else None)
        return channels


def session(artifact: Artifact, *, threads: int | None = None, model: torch.nn.Module | None = None) -> Session:
    """Open an artifact; the file carries its graph, so `model` is not needed."""
    content = content_for(NAME, artifact, version=version())
    options = Options.of(artifact.settings)
    if options.delegate != "xnnpack":
        raise BackendUnavailable(
            f"{artifact.path} runs on an {options.accelerator} only, and there is none here; copy it to the device. "
            "artifact.estimate holds the compiler's estimate"
        )
    return _opened(content, specs=artifact.inputs, threads=threads or artifact.threads)


def options_for(profile: "Profile | None") -> Options:
    """Return the options that the profile asks for: an NPU whose architecture is an Ethos-U is compiled for as such."""
    if profile is None or profile.device.kind != "npu":
        return Options.of(asked(profile))
    arch = profile.device.arch
    if not arch.startswith("ethos-u"):
        raise BuildError(f"profile {profile.id} describes {arch}; of NPUs, {NAME} is compiled here for ethos-u only")
    return Options.of({"delegate": "ethos-u", "accelerator": arch, **asked(profile)})


def _write(job: Job, path: Path) -> Made:
    with quietly():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )

        graph, count = exported(contiguous(job.model), job.laid_out)
        if job.number == "int8":
            quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
            graph = quantised_pt2e(graph, quantizer, job.samples)
        lowered = lower(graph, job.laid_out, XnnpackPartitioner())
        remarks = left_behind(lowered, "XNNPACK", "ExecuTorch's portable kernels, which are slow")
        path.write_bytes(lowered.to_executorch().buffer)
    return Made(count, remarks)


def lower(graph: Any, inputs: Inputs, partitioner: Any) -> Any:
    """Return `graph` with what `partitioner` takes handed over to its delegate; raises BuildError if that fails."""
    from executorch.exir import to_edge_transform_and_lower

    try:
        with torch.no_grad():
            return to_edge_transform_and_lower(torch.export.export(graph, inputs), partitioner=[partitioner])
    except Exception as error:  # a foreign compiler: whatever it raises, it refused the model
        raise BuildError(f"{NAME} {version()} refuses the model: {error}") from error


def left_behind(lowered: Any, delegate: str, instead: str) -> tuple[str, ...]:
    """Return one sentence for each operation that the delegate did not take, with the layer that it belongs to."""
    told: dict[str, None] = {}
    for node in lowered.exported_program().graph_module.graph.nodes:
        name = str(getattr(node.target, "_name", None) or getattr(node.target, "__name__", node.target))
        if node.op != "call_function" or name in _PLUMBING:
            continue
        layers = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
        told[f"{layers[-1] if layers else node.name}: {name.removesuffix('.default')} runs on {instead}"] = None
    if told:
        log.info("%d operations are not taken by %s: %s", len(told), delegate, "; ".join(told))
    return tuple(told)


# Handing over, and the conversion of inputs and outputs that every quantised network begins and ends with.
_PLUMBING = frozenset(
    {
        "executorch_call_delegate",
        "getitem",
        "quantized_decomposed::quantize_per_tensor",
        "quantized_decomposed::dequantize_per_tensor",
    }
)


class _Program:
    """One program in memory, opened again whenever the threads of the process changed.

    ExecuTorch has one thread pool, and resizing it leaves every open program with a pointer to the old one.
    """

    resized = 0  # how often the pool was resized: a fact about the process, like the pool itself

    def __init__(self, content: bytes, threads: int) -> None:
        self.content, self.threads = content, threads
        self.opened_at = -1
        self.forward: Any = None
        self.open()

    def open(self) -> None:
        """Make the pool as large as this program wants it, and load the program."""
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        if portable_lib._threadpool_get_thread_count() != self.threads:
            portable_lib._unsafe_reset_threadpool(self.threads)
            _Program.resized += 1
        self.program = Runtime.get().load_program(self.content)
        self.forward = self.program.load_method("forward")
        self.opened_at = _Program.resized

    def run(self, inputs: Inputs) -> list[Any]:
        """Run once."""
        if self.opened_at != _Program.resized:
            self.open()
        return list(self.forward.execute(inputs))


def _opened(content: bytes, *, specs: tuple[TensorSpec, ...], threads: int) -> Session:
    with quietly(errors_too=True):  # it reports the processor on standard error
        try:
            program = _Program(content, threads)
        except RuntimeError as error:
            raise BuildError(f"{NAME} {version()} refuses the file: {error}; build it again") from error
    return Session(specs, threads, partial(_bound, program))


def _bound(program: _Program, arrays: tuple[Array, ...]) -> Bound:
    # Copies: a program takes one layout, and says nothing of strides of other ones.
    tensors = tuple(torch.from_numpy(np.array(array, order="C")) for array in arrays)
    latest: list[list[Any]] = [[]]

    def run() -> None:
        latest[0] = program.run(tensors)

    return Bound(run, lambda: flattened(latest[0]))
