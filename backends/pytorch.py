"""PyTorch itself, on the CPU or a CUDA device: eager, through torch.compile, or as an exported program.

The file of eager and compiled models is a safetensors file of weights, and a session needs the module they belong to:
weights are data, and eager latency is that of the module as its user runs it, BatchNorm and all. An exported program
carries its graph, in which BatchNorm is folded; see `backends.program` for why it is opened with care.
"""

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors
import safetensors.torch
import torch

from backends.artifact import Artifact, TensorSpec
from backends.build import Job, Made
from backends.contract import NO_SAMPLES, Array, Bound, Session, content_for, flattened
from backends.cuda import finished, required
from backends.folding import exported
from backends.program import opened_program, saved_program
from backends.quiet import quietly
from backends.samples import Samples
from backends.semi_structured import qualifies, sparsified_
from backends.settings import Recorded, Settings, asked
from backends.subnormals import flush_
from profiles.atomic import write_bytes
from profiles.errors import BuildError

if TYPE_CHECKING:
    from profiles.schema import Profile

__all__ = ["EXTRA", "INSTANCES", "NAME", "SUFFIX", "Options", "build", "options_for", "session", "version"]

NAME = "pytorch"
EXTRA = "pip install espalier"
SUFFIX = ".safetensors"
INSTANCES = 5
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Options(Settings):
    """How the module runs: `graphs` replays a CUDA graph, `sparse` computes 2:4 weights of linear layers as such."""

    mode: Literal["eager", "compile", "exported"] = "eager"
    number: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    layout: Literal["contiguous", "channels_last"] = "contiguous"
    graphs: bool = False
    sparse: bool = False


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
    samples: Samples = NO_SAMPLES,
) -> Artifact:
    """Write the weights of `model`, or its program, without subnormals; BuildError if parity fails."""
    job = Job(
        runtime=NAME,
        version=version(),
        model=model,
        inputs=inputs,
        profile=profile,
        threads=threads,
        samples=samples,
        can=tuple(_DTYPES),
    )
    options = _sparse_where_planned(options_for(profile, job.number), profile, model)

    def write(file: Path) -> Made:
        if options.mode == "exported":
            placed = tuple(_placed(tensor, options) for tensor in inputs)
            graph, count = exported(_module(model, options), placed)
            write_bytes(file, saved_program(graph, placed))
            return Made(count)
        return Made(_write(model, file))

    return job.make(
        path,
        write=write,
        opened=partial(_opened, model=model, specs=job.specs, threads=threads, options=options),
        settings=options.recorded(),
    )


def session(artifact: Artifact, *, threads: int | None = None, model: torch.nn.Module | None = None) -> Session:
    """Open an artifact in a copy of `model`, the module that `build` was given or another of the same structure.

    An exported program needs no `model`.
    """
    options = Options.of(artifact.settings)
    if model is None and options.mode != "exported":
        raise BuildError(
            f"{artifact.path} holds weights only; give session() or measure() the module: model=the rebuilt model"
        )
    content = content_for(NAME, artifact, version=version())
    return _opened(content, model=model, specs=artifact.inputs, threads=threads or artifact.threads, options=options)


def options_for(profile: "Profile | None", number: str) -> Options:
    """Return the options that the profile asks for; raises BuildError if they exclude each other."""
    on_gpu = profile is not None and profile.device.kind == "gpu"
    usual: Recorded = {"device": "cuda", "layout": "channels_last", "graphs": True} if on_gpu else {}
    options = Options.of({**usual, **asked(profile), "number": number})
    for name in ("graphs", "sparse"):
        if getattr(options, name) and options.device != "cuda":
            raise BuildError(f"the option {name} is for CUDA devices, not for {options.device}; remove it")
    if options.sparse and options.number == "fp32":
        raise BuildError("2:4 weights are computed in fp16 or bf16, not in fp32; choose a profile of these")
    return options


def _sparse_where_planned(options: Options, profile: "Profile | None", model: torch.nn.Module) -> Options:
    """Return the options with `sparse` if there are linear layers that qualify, and the profile does not say."""
    silent = options.device == "cuda" and options.number != "fp32" and "sparse" not in asked(profile)
    sparse = silent and qualifies(model, _DTYPES[options.number])
    return options.model_copy(update={"sparse": sparse or options.sparse})


def _write(model: torch.nn.Module, path: Path) -> int:
    weights: dict[str, torch.Tensor] = {}
    total = 0
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise BuildError(f"the state {name} is a {type(value).__name__}, not a tensor; keep it out of state_dict()")
        # A copy each: safetensors refuses tensors that share memory, which tied weights do.
        tensor = value.detach().cpu().contiguous().clone()
        total += flush_(tensor)
        weights[name] = tensor
    write_bytes(path, safetensors.torch.save(weights))
    return total


def _opened(
    content: bytes, *, model: torch.nn.Module | None, specs: tuple[TensorSpec, ...], threads: int, options: Options
) -> Session:
    if options.device == "cuda":
        required(f"{NAME} on a GPU")
    if options.mode == "exported":
        module = opened_program(content)
    else:
        assert model is not None
        module = _loaded(model, content, options)
    if options.sparse:
        sparsified_(module)
    if options.mode == "compile":
        with quietly():
            module = torch.compile(module, dynamic=False)
    bound = _bound_on_cuda if options.device == "cuda" else _bound
    return Session(specs, threads, partial(bound, module, threads=threads, options=options))


def _module(model: torch.nn.Module, options: Options) -> Any:
    """Return a copy in the layout, type and place that are measured, whatever it was trained in."""
    module: Any = copy.deepcopy(model).cpu().eval()  # Any: the annotations of Module.to leave memory_format out
    return module.to(device=options.device, dtype=_DTYPES[options.number], memory_format=_LAYOUTS[options.layout])


def _loaded(model: torch.nn.Module, content: bytes, options: Options) -> Any:
    module = copy.deepcopy(model).cpu()
    try:
        module.load_state_dict(safetensors.torch.load(content), strict=True)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise BuildError(f"the weights do not fit the module: {error}; pass the module that was built") from error
    return _module(module, options)


def _placed(tensor: torch.Tensor, options: Options) -> torch.Tensor:
    """Return an input on the device, in the number format of the weights and the layout."""
    if not tensor.is_floating_point():
        return tensor.to(options.device)
    placed = tensor.to(device=options.device, dtype=_DTYPES[options.number])
    return placed.contiguous(memory_format=_LAYOUTS[options.layout]) if placed.dim() == 4 else placed


def _bound(module: Any, arrays: tuple[Array, ...], *, threads: int, options: Options) -> Bound:
    tensors = tuple(_placed(torch.from_numpy(array), options) for array in arrays)
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

    if options.mode == "compile":
        with quietly():  # the first run compiles
            run()
    return Bound(run, lambda: flattened(latest[0]))


def _bound_on_cuda(module: Any, arrays: tuple[Array, ...], *, threads: int, options: Options) -> Bound:
    tensors = tuple(_placed(torch.from_numpy(array), options) for array in arrays)
    latest: list[object] = [()]

    def launch() -> None:
        with torch.inference_mode():
            latest[0] = module(*tensors)

    return Bound(finished(launch, graph=options.graphs), lambda: flattened(latest[0]))
