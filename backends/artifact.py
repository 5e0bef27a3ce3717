"""Artifacts: a built model file, what it was built for, and the proof that it computes what PyTorch computes."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from backends.estimate import Estimate
from backends.settings import Recorded
from profiles.atomic import write_text
from profiles.errors import BuildError

__all__ = ["Accuracy", "Artifact", "Parity", "TensorSpec", "sha256_of", "specs_of"]

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorSpec(BaseModel):
    """Name, static shape and NumPy data type of one input."""

    model_config = _STRICT

    name: str
    shape: tuple[NonNegativeInt, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {list(self.shape)}"


class Parity(BaseModel):
    """The worst disagreement with eager PyTorch over `cases` inputs; max_rel = max|a - b| / max|b|."""

    model_config = _STRICT

    cases: PositiveInt
    max_abs: NonNegativeFloat
    max_rel: NonNegativeFloat


class Accuracy(BaseModel):
    """The share of the user's test examples that the compiled model and eager PyTorch classify as labelled."""

    model_config = _STRICT

    examples: PositiveInt
    compiled: Annotated[float, Field(ge=0, le=1)]
    pytorch: Annotated[float, Field(ge=0, le=1)]


class Artifact(BaseModel):
    """One model file, built by one runtime for static input shapes.

    `path` is absolute in memory; `save` writes it relative to the JSON file where it can, so a folder can be moved.
    `plan_sha256` is that of the plan by which the model was rebuilt. `parity` is over random inputs, `parity_real`
    over the calibration data if there was any. `settings` are the options of the runtime that it was built with and
    is opened with. `built_from` is the digest of the model and the profile: what is built from the same is the
    same. `remarks` name layers that the device dislikes or leaves to another processor. `estimate` is the
    compiler's, for devices that are not here. `seal`, in files only, holds a digest of every other field, so that
    one that was edited is named; whoever makes the digests anew is not found out by it.
    """

    model_config = _STRICT

    schema_version: Literal[1] = 1
    runtime: str
    runtime_version: str
    profile: str | None
    plan_sha256: Sha256 | None = None
    built_from: Sha256 | None = None
    path: str
    sha256: Sha256
    size_bytes: NonNegativeInt
    dtype: str
    threads: PositiveInt
    inputs: tuple[TensorSpec, ...]
    subnormals_flushed: NonNegativeInt = 0
    settings: Recorded = {}
    remarks: tuple[str, ...] = ()
    parity: Parity
    parity_real: Parity | None = None
    accuracy: Accuracy | None = None
    estimate: Estimate | None = None
    seal: dict[str, str] = {}

    def content(self) -> bytes:
        """Return the bytes of the model file; a missing or changed file raises BuildError."""
        try:
            content = Path(self.path).read_bytes()
        except OSError as error:
            raise BuildError(f"cannot read the model file {self.path} ({error.strerror}); build it again") from error
        if sha256_of(content) != self.sha256:
            raise BuildError(
                f"{self.path}: the file changed since it was built (sha256 {sha256_of(content)[:12]}..., "
                f"recorded {self.sha256[:12]}...); build it again"
            )
        return content

    def save(self, path: Path | str) -> None:
        """Write this record as JSON; the model file stays where it is."""
        folder, file = Path(path).resolve().parent, Path(self.path).resolve()
        shown = file.relative_to(folder) if file.is_relative_to(folder) else file
        record = self.model_copy(update={"path": shown.as_posix(), "seal": self._digests()})
        write_text(path, record.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a record written by `save`; BuildError if it was edited, or its model file is not the one built."""
        try:
            record = cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise BuildError(f"cannot read the artifact {path} ({error.strerror}); build it again") from error
        except ValidationError as error:
            raise BuildError(f"{path} is not an artifact of this version of espalier: {error}") from error
        digests = record._digests()
        if edited := sorted(name for name, own in record.seal.items() if digests.get(name) != own):
            raise BuildError(f"{path} was edited since it was written: {', '.join(edited)}; build it again")
        found = {"path": str(Path(path).resolve().parent / record.path), "seal": {}}
        artifact = record.model_copy(update=found)
        artifact.content()
        return artifact

    def _digests(self) -> dict[str, str]:
        """Return a digest of every field but the path, which is another where the folder was moved."""
        content = self.model_dump(mode="json", exclude={"path", "seal"})
        return {name: sha256_of(json.dumps(value, sort_keys=True).encode())[:16] for name, value in content.items()}


def sha256_of(content: bytes) -> str:
    """Return the SHA-256 of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def specs_of(inputs: Sequence[torch.Tensor]) -> tuple[TensorSpec, ...]:
    """Describe example inputs as they are named in every model file: input_0, input_1, ..."""
    return tuple(
        TensorSpec(name=f"input_{index}", shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
        for index, tensor in enumerate(inputs)
    )
