"""What a benchmark found: one file for each table, in `evidence/`, with the machine that it was found on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from backends.environment import Environment
from profiles import atomic
from profiles.errors import EspalierError
from tools.outcome import Plain

FOLDER = Path(__file__).parent.parent.parent / "evidence"
Row = dict[str, Any]


class Machine(Plain):
    """What rows of one file have in common."""

    cpu: str
    microarchitecture: str
    cores: int
    platform: str
    python: str
    torch: str

    def like(self, other: "Machine") -> bool:
        """Whether two are of one kind: all is the same but perhaps the build of the system."""
        return self.model_copy(update={"platform": other.platform}) == other

    @classmethod
    def here(cls) -> "Machine":
        """Return this machine."""
        found = Environment.read()
        return cls(**{name: getattr(found, name) for name in cls.model_fields})


class Evidence(Plain):
    """A table as it was found."""

    schema_version: Literal[1] = 1
    command: str  # that makes it
    machine: Machine
    rows: list[Row]  # each with the date when it was found


def read(name: str, folder: Path = FOLDER) -> Evidence:
    """Return the table called `name`; raises EspalierError if the file is missing or no such table."""
    path = folder / f"{name}.json"
    try:
        return Evidence.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EspalierError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise EspalierError(f"{path} is no table of this version ({error.error_count()} errors): {error}") from error


def add(
    name: str, rows: Sequence[Mapping[str, Any]], *, command: str, key: Sequence[str], folder: Path = FOLDER
) -> None:
    """Add rows to the table called `name`, in place of those that agree in `key`.

    One table is of one kind of machine; rows that were found under another system than the table's first say so.
    Raises EspalierError if the rows there were found on another machine.
    """
    here, path = Machine.here(), folder / f"{name}.json"
    known = read(name, folder) if path.exists() else Evidence(command=command, machine=here, rows=[])
    if not known.machine.like(here):
        raise EspalierError(
            f"{path} was found on another machine ({known.machine.cpu}); move it away to begin a new one"
        )
    found = {tuple(row[part] for part in key): row for row in known.rows}
    about = {"date": datetime.now(UTC).date().isoformat()}
    if here != known.machine:
        about["platform"] = here.platform
    found |= {tuple(row[part] for part in key): {**row, **about} for row in rows}
    table = Evidence(command=command, machine=known.machine, rows=list(found.values()))
    atomic.write_text(path, json.dumps(table.model_dump(mode="json"), indent=1) + "\n")


@dataclass(frozen=True)
class Log:
    """Rows by what they are about, in a file as soon as they exist: a later call goes on with what is missing."""

    path: Path

    def rows(self) -> dict[str, Row]:
        """Return what is in the file, which need not exist; raises EspalierError if it is no such log."""
        try:
            found = json.loads(self.path.read_text()) if self.path.exists() else {}
        except ValueError as error:
            raise EspalierError(f"{self.path} is not JSON ({error}); give another --log FILE") from error
        if not isinstance(found, dict) or not all(isinstance(row, dict) for row in found.values()):
            raise EspalierError(f"{self.path} holds no rows of a benchmark; give another --log FILE")
        return found

    def keep(self, key: str, row: Mapping[str, Any]) -> None:
        """Add a row."""
        atomic.write_text(self.path, json.dumps({**self.rows(), key: row}, indent=1) + "\n")
