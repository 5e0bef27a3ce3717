"""What devices are: profiles, their schema, and which of them fit this machine."""

from profiles.detect import Fit, Machine, detect, fit, why, why_not
from profiles.errors import BackendUnavailable, BuildError, EspalierError, PlanError, ProfileError
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
