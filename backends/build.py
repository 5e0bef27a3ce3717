"""Building: write a model file, prove its parity, and only then let it exist."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from backends.artifact import Artifact, TensorSpec, sha256_of, specs_of
from backends.contract import NO_SAMPLES, Session
from backends.estimate import Estimate
from backends.granularity import beside_the_grid
from backends.parity import accuracy_of, check_parity
from backends.record import made_by
from backends.samples import Samples
from backends.settings import Recorded, number
from profiles.atomic import replacing
from profiles.errors import BuildError

if TYPE_CHECKING:
    from profiles.schema import Profile

__all__ = ["Job", "Made", "digest_of"]

_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Made:
    """What writing a file brought to light: subnormal constants set to 0, and what the compiler said."""

    subnormals_flushed: int = 0
    remarks: tuple[str, ...] = ()
    estimate: Estimate | None = None


@dataclass(frozen=True)
class Job:
    """What one build is about: the same for every runtime; `can` are the number formats that the runtime makes."""

    runtime: str
    version: str
    model: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    profile: "Profile | None"
    threads: int
    samples: Samples = NO_SAMPLES
    can: tuple[str, ...] = ("fp32",)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return specs_of(self.inputs)

    @property
    def laid_out(self) -> tuple[torch.Tensor, ...]:
        """The inputs in the layout that compilers for devices expect: a file is made for it, whatever theirs is."""
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in self.inputs)

    @cached_property
    def number(self) -> str:
        """The number format to build; raises BuildError if the profile is not for this runtime, or data is missing."""
        if self.profile is not None and self.profile.runtime.name != self.runtime:
            raise BuildError(
                f"profile {self.profile.id} describes {self.profile.runtime.name}, not {self.runtime}; "
                f"build with backends.load('{self.profile.runtime.name}') or choose another profile"
            )
        wanted = number(self.profile, runtime=self.runtime, can=self.can)
        if wanted == "int8" and not self.samples.calibration:
            raise BuildError(
                "int8 is calibrated with real inputs, and there are none; pass "
                "samples=Samples.of(train_batches, test_batches, like=inputs)"
            )
        return wanted

    def make(
        self,
        path: Path | str,
        *,
        write: Callable[[Path], Made],
        opened: Callable[[bytes], Session],
        settings: Recorded | None = None,
    ) -> Artifact:
        """Write the file with `write`, open it, and check its parity.

        The file is written beside `path` and moved there when it has passed: after an error, `path` is as it was.
        """
        wanted = self.number
        remarks = self._warned()
        with replacing(path) as temporary:
            made = write(temporary)
            content = temporary.read_bytes()
            session = opened(content)
            random, real = check_parity(
                self.runtime, session, model=self.model, inputs=self.inputs, samples=self.samples, number=wanted
            )
            accuracy = accuracy_of(session, model=self.model, samples=self.samples)
        return Artifact(
            runtime=self.runtime,
            runtime_version=self.version,
            profile=None if self.profile is None else self.profile.id,
            plan_sha256=made_by(self.model),
            built_from=digest_of(self.model, self.profile),
            path=str(Path(path).resolve()),
            sha256=sha256_of(content),
            size_bytes=len(content),
            dtype=_TORCH_NAMES.get(wanted) or self._own_dtype(),
            threads=self.threads,
            inputs=self.specs,
            subnormals_flushed=made.subnormals_flushed,
            settings=settings or {},
            remarks=(*remarks, *made.remarks),
            parity=random,
            parity_real=real,
            accuracy=accuracy,
            estimate=made.estimate,
        )

    def _warned(self) -> tuple[str, ...]:
        """Log what the profile does not promise here, and return what it says against layers."""
        if self.profile is None:
            return ()
        if not self.profile.runtime.accepts(self.version):
            promise = f"{self.runtime} {self.profile.runtime.versions}"
            log.warning("profile %s was made for %s, this is %s: measure", self.profile.id, promise, self.version)
        remarks = beside_the_grid(self.model, self.profile)
        if remarks:
            log.warning("%s dislikes %d shapes: %s", self.profile.id, len(remarks), "; ".join(remarks))
        return remarks

    def _own_dtype(self) -> str:
        floats = (tensor.dtype for tensor in (*self.model.parameters(), *self.inputs) if tensor.is_floating_point())
        return str(next(floats, torch.float32)).removeprefix("torch.")


def digest_of(model: torch.nn.Module, profile: "Profile | None") -> str:
    """Return a digest of what a file is built from: the modules of `model`, its weights, and the profile."""
    digest = hashlib.sha256(str(model).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update(b"" if profile is None else profile.model_dump_json().encode())
    return digest.hexdigest()
