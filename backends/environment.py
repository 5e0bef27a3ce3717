"""Where a measurement was made: what must be known to believe it or to repeat it."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

import archspec.cpu
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt

from backends.heap import kept

__all__ = ["Environment"]

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


class Environment(BaseModel):
    """The machine and its state when a comparison began; `cores_used` are those it was pinned to."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    platform: str
    cpu: str
    microarchitecture: str
    cores: PositiveInt
    cores_used: tuple[int, ...]
    governor: str | None
    load_average: tuple[float, float, float] | None
    python: str
    torch: str
    date: datetime
    freed_memory: Literal["kept", "unmanaged"] = "unmanaged"  # while it was timed: backends/heap.py

    @classmethod
    def read(cls, cores_used: frozenset[int] = frozenset()) -> Self:
        """Read the environment now."""
        host = archspec.cpu.host()
        return cls(
            platform=platform.platform(),
            cpu=archspec.cpu.brand_string() or platform.processor() or platform.machine(),
            microarchitecture=host.name,
            cores=os.cpu_count() or 1,
            cores_used=tuple(sorted(cores_used)),
            governor=_governor(),
            load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
            python=platform.python_version(),
            torch=torch.__version__,
            date=datetime.now(UTC),
            freed_memory="kept" if kept() else "unmanaged",
        )


def _governor() -> str | None:
    try:
        return _GOVERNOR.read_text().strip()
    except OSError:  # virtual machines and systems other than Linux do not say
        return None
