"""What every runtime module offers: the `Runtime` protocol, and the `Session` that it opens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from backends.artifact import Artifact, TensorSpec
from backends.samples import Samples
from planner.graph import Graph
from profiles.errors import BuildError

if TYPE_CHECKING:
    from profiles.schema import Profile

__all__ = ["NO_SAMPLES", "Array", "Bound", "Family", "Narrows", "Runtime", "Session", "content_for", "flattened"]

Array = NDArray[Any]
NO_SAMPLES = Samples()


@dataclass(frozen=True)
class Bound:
    """A model with its inputs in place: `run` only runs, `outputs` copies the results of the last run."""

    run: Callable[[], object]
    outputs: Callable[[], list[Array]]


@dataclass(frozen=True)
class Session:
    """An open model: called with inputs it returns outputs; `bind` checks and copies the inputs once, for timing."""

    inputs: tuple[TensorSpec, ...]
    threads: int
    binder: Callable[[tuple[Array, ...]], Bound]

    def bind(self, inputs: Sequence[torch.Tensor | Array]) -> Bound:
        """Put `inputs` in place; a wrong count, shape or data type raises BuildError."""
        # A copy, so that neither a read-only nor a strided array, nor a later write by the caller, reaches a runtime.
        arrays = tuple(np.array(_array(value), order="C", copy=True) for value in inputs)
        found = tuple(
            TensorSpec(name=f"input_{index}", shape=array.shape, dtype=array.dtype.name)
            for index, array in enumerate(arrays)
        )
        if found != self.inputs:
            raise BuildError(
                f"the inputs are ({_listed(found)}) but the model was built for ({_listed(self.inputs)}); "
                "pass these, or build the model again with inputs of the new shape"
            )
        return self.binder(arrays)

    def __call__(self, inputs: Sequence[torch.Tensor | Array]) -> list[Array]:
        bound = self.bind(inputs)
        bound.run()
        return bound.outputs()


class Runtime(Protocol):
    """One inference runtime: a module of `backends`, found by its name; its files end in `SUFFIX`.

    Where two openings of one file differ in speed, `INSTANCES` are opened and timed: five, as the interval of two would
    be seven times as wide (`backends.latency.centre`).
    """

    NAME: str
    EXTRA: str
    SUFFIX: str
    INSTANCES: int

    def version(self) -> str:
        """Return the installed version; raises BackendUnavailable with the pip line."""

    def build(
        self,
        model: torch.nn.Module,
        inputs: tuple[torch.Tensor, ...],
        profile: "Profile | None",
        path: Path | str,
        *,
        threads: int = 1,
        samples: Samples = NO_SAMPLES,
    ) -> Artifact:
        """Write `model` as a file that this runtime reads; BuildError, and no file, unless it matches PyTorch.

        The number format and the options are the profile's; fp32 and the defaults without one. int8 is calibrated
        with `samples`, and needs them.
        """

    def session(
        self, artifact: Artifact, *, threads: int | None = None, model: torch.nn.Module | None = None
    ) -> Session:
        """Open an artifact, with its own number of threads unless told otherwise.

        Only `pytorch` needs `model`, the module whose weights its file holds; other files carry their graph.
        """


class Family(Protocol):
    """The networks that one model can become, whose files are made from its own."""

    def build(
        self, model: torch.nn.Module, path: Path | str, *, kept: Mapping[str, torch.Tensor], removed: frozenset[str]
    ) -> Artifact:
        """Write `model`, which `backends.rebuild.cut` made with this `kept` and `removed`, as `Runtime.build` would.

        BuildError, and no file, unless it matches PyTorch, or if this model cannot be made so.
        """


@runtime_checkable
class Narrows(Protocol):
    """A runtime for which a file is much sooner narrowed than built, so that many networks can be measured."""

    def family(
        self,
        model: torch.nn.Module,
        inputs: tuple[torch.Tensor, ...],
        profile: "Profile | None",
        graph: Graph,
        *,
        threads: int = 1,
        samples: Samples = NO_SAMPLES,
    ) -> Family:
        """Build `model`, of which `graph` is the trace; BuildError if its file is of a kind that is not narrowed."""


def content_for(runtime: str, artifact: Artifact, *, version: str) -> bytes:
    """Return the verified bytes of an artifact that `runtime` built; parity was shown there and nowhere else."""
    if artifact.runtime != runtime:
        raise BuildError(
            f"{artifact.path} was built and checked with {artifact.runtime}, not {runtime}; "
            f"open it with backends.load('{artifact.runtime}') or build it with {runtime}"
        )
    if artifact.runtime_version != version:
        raise BuildError(
            f"{artifact.path} was built and checked with {runtime} {artifact.runtime_version}, but {version} is "
            "installed; build it again"
        )
    return artifact.content()


def flattened(output: object) -> list[Array]:
    """Return the tensors in the output of a module as NumPy copies, in the order in which an export lists them."""
    if isinstance(output, torch.Tensor):
        values = output.detach().cpu()
        return [(values.float() if values.dtype == torch.bfloat16 else values).numpy().copy()]
    if isinstance(output, Mapping):
        return [array for value in output.values() for array in flattened(value)]
    if isinstance(output, list | tuple):
        return [array for value in output for array in flattened(value)]
    raise BuildError(f"the model returns a {type(output).__name__}; return a tensor, or a tuple, list or dict of them")


def _array(value: torch.Tensor | Array) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _listed(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(map(str, specs))
