"""What a profile asks of a runtime beside the shapes: number format, device, and the options of its compiler."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from profiles.errors import BuildError

if TYPE_CHECKING:
    from profiles.schema import Profile

__all__ = ["Recorded", "Settings", "asked", "number"]

Value = str | int | float | bool | None
Recorded = dict[str, Value]


class Settings(BaseModel):
    """The options of one runtime, each with its default; unknown ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def of(cls, options: Mapping[str, Value]) -> Self:
        """Check `options`; raises BuildError naming the first that is wrong."""
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            name = ".".join(map(str, problem["loc"])) or "options"
            raise BuildError(
                f"the option {name} = {problem['input']!r} cannot be used ({problem['msg']}); "
                f"known are {', '.join(sorted(cls.model_fields)) or 'none'}"
            ) from error

    def recorded(self) -> Recorded:
        """Return the options as an artifact keeps them."""
        return dict(self.model_dump())


def asked(profile: "Profile | None") -> dict[str, Value]:
    """Return the options in the profile's [runtime] table."""
    return {} if profile is None else dict(getattr(profile.runtime, "options", {}))


def number(profile: "Profile | None", *, runtime: str, can: tuple[str, ...]) -> str:
    """Return the number format that the profile wants, fp32 without one; BuildError if the runtime cannot make it."""
    if profile is None:
        return "fp32"
    weights, activations = profile.dtype.weights, profile.dtype.activations
    if weights != activations or weights not in can:
        wanted = weights if weights == activations else f"{weights} weights with {activations} activations"
        raise BuildError(
            f"profile {profile.id} wants {wanted}, but {runtime} makes {', '.join(can)} here; choose a profile of these"
        )
    return weights
