"""What a plan may cost: latency on one or several devices, parameters, bytes, operations; and widths tied together."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from profiles.errors import PlanError

Amount = float | str  # 0.5 and "50 %" are of the dense model; "3 ms", "2 MB", "1.5 M" and numbers above 1 are absolute
_UNITS = {
    "s": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6},
    "B": {
        **{"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9},
        **{"kib": 1024.0, "mib": 1024.0**2, "gib": 1024.0**3},
    },
    "": {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9},
}
_WANTED = {
    "s": "a time ('3 ms')",
    "B": "an amount of bytes ('2 MB', '256 KiB')",
    "": "a number ('1.5 M')",
}
ON_CHIP = "on-chip"


@dataclass(frozen=True)
class Limits:
    """What a plan may need beside time: an amount, or a fraction of what the dense model needs.

    `activation_bytes` is the peak over a run; "on-chip" takes the capacity that the profile states. Widths in `tied`
    keep the same share of their channels. The solver stops at a relative `gap` of the loss to its bound.
    """

    parameters: Amount | None = None
    model_bytes: Amount | None = None
    activation_bytes: Amount | None = None
    macs: Amount | None = None
    tied: tuple[tuple[str, str], ...] = ()
    gap: float = 0.0

    def amounts(self) -> dict[str, Amount]:
        """Return what is limited, by name."""
        names = ("parameters", "model_bytes", "activation_bytes", "macs")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


Latency = Amount | Mapping[str, Amount]  # for several devices by the ids of their profiles


def amount(given: Amount, dense: float, unit: str, *, name: str = "latency") -> tuple[float, bool]:
    """Return an amount in the unit of `dense`, and whether it was given as a fraction of it.

    Raises PlanError if it cannot be read.
    """
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([a-zµ]*|%)\s*", str(given), re.IGNORECASE)
    try:
        value, word = (float(match[1]), match[2].lower()) if match else (math.nan, "")
    except ValueError:
        value, word = math.nan, ""
    factor = _UNITS[unit].get(word)
    relative = word == "%" or (not word and (unit == "s" or value <= 1))
    if relative:
        factor = 1e-2 if word == "%" else 1.0
    elif not word:
        factor = 1.0
    if not 0 < value < math.inf or factor is None or (relative and value * factor > 1):
        raise PlanError(f"{name} {given!r} is not a fraction of the dense {name} (0.5, '50 %') or {_WANTED[unit]}")
    return (value * factor * dense if relative else value * factor), relative
