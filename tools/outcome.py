"""What a pruning run came to: the plain data that `measurements.json` holds and the report is made of."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from profiles.atomic import write_text
from profiles.errors import EspalierError

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


class Plain(BaseModel):
    """Frozen data that refuses unknown keys, conversions, and numbers that JSON cannot hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Interval(Plain):
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.value} lies outside its interval [{self.low}, {self.high}]")
        return self


class Accuracy(Plain):
    """Test accuracy of the dense model, of the masked one with exact zeros, and of the smaller one cut from it."""

    dense: Fraction | None
    sparse: Fraction | None
    rebuilt: Fraction | None


class Row(Plain):
    """One model that was measured.

    Keys of the dictionaries are runtimes. `measured` is in seconds, `speedup` is against the row labelled "dense",
    `efficiency` is that speed-up / MAC speed-up, and `predicted_s` is for the runtime of the profile.
    """

    label: str
    params: Count
    macs: Count
    accuracy: Fraction | None
    predicted_s: Interval | None
    measured: dict[str, Interval]
    speedup: dict[str, Interval]
    efficiency: dict[str, float]


class WidthRow(Plain):
    """One width that the plan chose: channels before, channels kept, and the widths it chose from."""

    name: str
    dense: Count
    kept: Count
    removed: bool
    considered: list[Count]


class Step(Plain):
    """One point of the training curve; in training without a plan there are no groups, and both counts are 0."""

    epoch: Annotated[float, Field(ge=0)]
    loss: float
    accuracy: Fraction | None
    nonzero_groups: Count
    budget_groups: Count
    phase: Literal["dense", "sparse", "finetune"]


class Try(Plain):
    """One planned network that was built and measured before training, in fractions of the dense latency.

    Where `predicted` was too far off, the table was `corrected` by it; `changes` is what that plan keeps differently
    from the one before.
    """

    budget: float
    predicted: float
    measured: float
    corrected: bool
    changes: list[str]

    @property
    def told(self) -> str:
        """It in one line."""
        then = "; table corrected, planned again" if self.corrected else ""
        shares = f"budget {self.budget:.3f}, predicted {self.predicted:.3f}, measured {self.measured:.3f} of dense"
        return f"{shares} ({self.measured / self.predicted - 1:+.1%}){then}"


class Verdict(Plain):
    """One claim that was checked."""

    what: str
    ok: bool
    detail: str


class Outcome(Plain):
    """Everything that a report says.

    `trust` says what the predictions rest on, and their expected error; `tries` are the planned networks that were
    measured on the way to the plan, `notes` what the plan notes. `equivalence` is the largest relative error
    between the masked and the rebuilt model, `parity` that between the rebuilt model in PyTorch and in each runtime.
    """

    schema_version: Literal[1] = 1
    model: str
    profile: str
    profile_why: str
    created: str
    budget: str
    budget_s: Seconds
    trust: str = ""
    accuracy: Accuracy
    rows: list[Row]
    widths: list[WidthRow]
    tries: list[Try] = []
    notes: list[str] = []
    history: list[Step]
    equivalence: float
    parity: dict[str, float]
    verdicts: list[Verdict]
    environment: dict[str, str]
    phases_s: dict[str, Seconds]

    @model_validator(mode="after")
    def _rows_are_told_apart(self) -> Self:
        labels = [row.label for row in self.rows]
        if labels.count("dense") != 1 or len(set(labels)) != len(labels):
            raise ValueError(f"rows need distinct labels, one of them 'dense'; these are {labels}")
        return self

    @property
    def runtimes(self) -> list[str]:
        """Every runtime that measured a row, the profile's own first."""
        found = dict.fromkeys(runtime for row in self.rows for runtime in row.measured)
        return sorted(found, key=lambda runtime: runtime != self.profile_runtime)

    @property
    def profile_runtime(self) -> str | None:
        """The measured runtime that the profile is about, if any."""
        measured = {runtime for row in self.rows for runtime in row.measured}
        return next((part for part in self.profile.split(".") if part in measured), None)

    def row(self, label: str) -> Row | None:
        """The row with this label."""
        return next((row for row in self.rows if row.label == label), None)

    def save(self, path: Path | str) -> None:
        """Write the outcome as JSON, atomically."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read an outcome; EspalierError if the file is absent or is none."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except (OSError, ValidationError) as error:
            raise EspalierError(f"{path} is no outcome: {error}; give the measurements.json of a run") from error
