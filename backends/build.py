"""Building: write a model file, prove its parity, and only then let it exist."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from backends.artifact import Artifact, TensorSpec, sha256_of, specs_of
from backends.contract import Session
from backends.parity import check_parity
from profiles.atomic import replacing
from profiles.errors import BuildError

if TYPE_CHECKING:
    from profiles.schema import Profile

__all__ = ["Job"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What one build is about: the same for every runtime."""

    runtime: str
    version: str
    model: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    profile: "Profile | None"
    threads: int

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return specs_of(self.inputs)

    def make(self, path: Path | str, *, write: Callable[[Path], int], opened: Callable[[bytes], Session]) -> Artifact:
        """Write the file with `write`, which counts the subnormals it flushed, open it, and check its parity.

        The file is written beside `path` and moved there when it has passed: after an error, `path` is as it was.
        """
        if self.profile is not None:
            self._check(self.profile)
        with replacing(path) as temporary:
            flushed = write(temporary)
            content = temporary.read_bytes()
            parity = check_parity(self.runtime, opened(content), model=self.model, inputs=self.inputs)
        return Artifact(
            runtime=self.runtime,
            runtime_version=self.version,
            profile=None if self.profile is None else self.profile.id,
            path=str(Path(path).resolve()),
            sha256=sha256_of(content),
            size_bytes=len(content),
            dtype=self._dtype(),
            threads=self.threads,
            inputs=self.specs,
            subnormals_flushed=flushed,
            parity=parity,
        )

    def _check(self, profile: "Profile") -> None:
        if profile.runtime.name != self.runtime:
            raise BuildError(
                f"profile {profile.id} describes {profile.runtime.name}, not {self.runtime}; "
                f"build with backends.load('{profile.runtime.name}') or choose another profile"
            )
        if not profile.runtime.accepts(self.version):
            promise = f"{self.runtime} {profile.runtime.versions}"
            log.warning("profile %s was made for %s, this is %s: measure", profile.id, promise, self.version)

    def _dtype(self) -> str:
        floats = (tensor.dtype for tensor in (*self.model.parameters(), *self.inputs) if tensor.is_floating_point())
        return str(next(floats, torch.float32)).removeprefix("torch.")
