"""What is wrong with a profile file: one line each, with the file, the field, what is wrong, and the remedy."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from profiles.schema import Profile


@dataclass(frozen=True)
class Finding:
    """One thing to mend in a profile file."""

    file: str
    field: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.field}: {self.what}; {self.remedy}"


def of_validation(file: str, error: ValidationError, *, at: str = "") -> list[Finding]:
    """Return one finding for each problem that pydantic names; `at` is where in the file the validated part stands."""
    return [_of_problem(file, dict(problem), at) for problem in error.errors(include_url=False, include_context=False)]


def _of_problem(file: str, problem: Mapping[str, Any], at: str) -> Finding:
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem["loc"])
    field = (at + "".join(steps)).lstrip(".") or "profile"
    match problem["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _keys(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it; profiles/schema.json lists the keys"
            return Finding(file, field, "is not a key of a profile", hint)
        case "missing":
            return Finding(file, field, "is missing", "add it; profiles/schema.json says what it may be")
        case "value_error":
            what, _, remedy = problem["msg"].removeprefix("Value error, ").partition("; ")
            return Finding(file, field, what, remedy or "correct it")
        case _:
            message = problem["msg"][:1].lower() + problem["msg"][1:]
            what = f"{message}, not {problem['input']!r}"
            return Finding(file, field, what, "correct it; profiles/schema.json says what it may be")


def _keys() -> list[str]:
    schema = Profile.model_json_schema()
    return sorted({name for table in (schema, *schema["$defs"].values()) for name in table.get("properties", {})})
