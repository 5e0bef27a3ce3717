"""What devices are: profiles, their schema, and which of them fit this machine."""

from profiles.detect import Fit, detect, fit, why, why_not
from profiles.errors import BackendUnavailable, BuildError, EspalierError, PlanError, ProfileError
from profiles.machine import Machine
from profiles.registry import load, names
from profiles.schema import Profile

__all__ = [
    "BackendUnavailable",
    "BuildError",
    "EspalierError",
    "Fit",
    "Machine",
    "PlanError",
    "Profile",
    "ProfileError",
    "detect",
    "fit",
    "load",
    "names",
    "why",
    "why_not",
]
