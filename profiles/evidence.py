"""What a number in a profile rests on: its confidence, and the page, file or measurement where it was read."""

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Confidence = Literal["documented", "source", "published", "computed", "measured-here", "inferred", "folklore"]

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Count = Annotated[int, Field(ge=1, strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
SourceIds = Annotated[tuple[Name, ...], Field(min_length=1)]

UNPROVEN: frozenset[str] = frozenset({"inferred", "folklore"})  # good for breaking ties, never for forbidding a width
QUOTED: frozenset[str] = frozenset({"documented", "source", "published"})  # somebody else wrote the number down


class Part(BaseModel):
    """A table of a profile file: unknown keys are refused and nothing changes after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Cited(Part):
    """A statement with its evidence."""

    confidence: Confidence
    """Where the number comes from; `inferred` and `folklore` may only break ties."""
    sources: SourceIds
    """Ids of the [[source]] entries that state it."""
    note: Text | None = None
    """What a reader must know before trusting the number."""


class Measurement(Part):
    """Under which conditions a number was measured here, and how well it repeats."""

    machine: Text
    """Fingerprint of the machine: CPU or GPU, board, memory."""
    runtime_version: Text
    driver_version: Text
    """Driver or firmware of the device; the kernel's version where there is none."""
    power_mode: Text
    """Clock or power mode, such as MAXN, performance governor, boost off."""
    threads: Count
    batch: Count
    runs: Count
    median_s: Positive
    spread_s: Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
    """Half of the distance between the 5th and the 95th percentile."""


class Source(Part):
    """Where a number was read: a page, a file of a repository at a commit, or a measurement made here."""

    id: Name
    url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    repo: Annotated[str, Field(pattern=r"^[^/\s]+(/[^/\s]+)+$")] | None = None
    path: Text | None = None
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")] | None = None
    lines: Text | None = None
    measurement: Measurement | None = None
    quote: Text
    """The words that state the number, short and verbatim where the source has words."""
    retrieved: date
    """The day on which it was read or measured."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        file = (self.repo, self.path, self.commit)
        ways = (self.url is not None, all(file), self.measurement is not None)
        if sum(ways) != 1 or (not ways[1] and (any(file) or self.lines)):
            raise ValueError(
                "is in no place or in several; give either `url`, or `repo`, `path` and `commit` (and `lines`), or "
                "`measurement`"
            )
        return self

    @property
    def place(self) -> str:
        """The address: the page, the file at its commit, or the machine that was measured."""
        if self.url is not None:
            return self.url
        if self.measurement is not None:
            return f"measured on {self.measurement.machine}"
        lines = f" lines {self.lines}" if self.lines else ""
        return f"{self.repo}@{str(self.commit)[:12]} {self.path}{lines}"
