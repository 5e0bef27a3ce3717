"""Which profiles fit this machine, and for those that do not, why not."""

from collections.abc import Iterator
from dataclasses import dataclass

import archspec.cpu
from packaging.version import InvalidVersion, Version

from profiles.machine import INSTALL, PACKAGES, Machine
from profiles.registry import Library
from profiles.schema import Match, Profile

_KINDS = {"gpu": 2, "npu": 1, "dsp": 1, "cpu": 0}
_KEEPS = {"fp32": 2, "tf32": 2, "bf16": 1, "fp16": 1}  # how much of a trained fp32 model a format keeps; integers: 0
_Check = tuple[bool, str]


@dataclass(frozen=True)
class Fit:
    """How a profile relates to a machine: the requirements that are met, and those that are not."""

    met: tuple[str, ...]
    unmet: tuple[str, ...]
    score: tuple[int, ...]  # higher is better: see `_score`

    @property
    def ok(self) -> bool:
        """Whether the profile can be used here."""
        return not self.unmet

    @property
    def reasons(self) -> list[str]:
        """For each requirement what was wanted and what was found, the unmet first."""
        return [*self.unmet, *self.met]


def fit(profile: Profile, machine: Machine) -> Fit:
    """Compare a profile's device and runtime with a machine."""
    match = profile.device.match
    checks = [*_check_cpu(match, machine), *_check_cuda(match, machine), *_check_board(match, machine)]
    if match == Match():
        checks.append((False, f"{profile.device.arch} cannot be seen from a host; choose the profile by its id"))
    checks.append(_check_runtime(profile, machine))
    return Fit(
        met=tuple(reason for met, reason in checks if met),
        unmet=tuple(reason for met, reason in checks if not met),
        score=_score(profile),
    )


def detect(machine: Machine | None = None) -> list[Profile]:
    """Return the profiles that fit, best first.

    A GPU goes before other accelerators and these before the CPU, a profile that knows a width before one that knows
    none, a number format that keeps the model as it is before one that rounds it, the named device before its family,
    the deeper instruction set, evidence before inference, and then the preferred runtime.
    """
    machine = machine or Machine.here()
    fitting = [(found.score, profile) for profile, found in fits(machine) if found.ok]
    fitting.sort(key=lambda pair: (tuple(-part for part in pair[0]), pair[1].id))
    return [profile for _, profile in fitting]


def fits(machine: Machine) -> Iterator[tuple[Profile, Fit]]:
    """Return every profile that can be read with how it relates to the machine, by id."""
    return ((profile, fit(profile, machine)) for profile in Library.here().every())


def why(profile: Profile, machine: Machine | None = None) -> str:
    """Say in a sentence why a profile fits a machine, or what it lacks."""
    found = fit(profile, machine or Machine.here())
    if found.ok:
        return f"{profile.id} fits this machine: {'; '.join(found.met)}."
    return f"{profile.id} does not fit this machine: {'; '.join(found.unmet)}."


def why_not(profile_id: str, machine: Machine | None = None) -> str:
    """Say in a sentence why `detect` does not offer a profile, or at which place it does."""
    machine = machine or Machine.here()
    profile = Library.here().load(profile_id)
    if not fit(profile, machine).ok:
        return why(profile, machine)
    ranked = [other.id for other in detect(machine)]
    place = ranked.index(profile_id) + 1
    ahead = f", after {', '.join(ranked[: place - 1])}" if place > 1 else ""
    return f"{profile_id} does fit this machine, at place {place} of {len(ranked)}{ahead}."


def _check_cpu(match: Match, machine: Machine) -> list[_Check]:
    checks = []
    if match.os is not None:
        checks.append((match.os == machine.os, f"wants {match.os}, found {machine.os}"))
    if match.archspec is not None:
        wanted, met = match.archspec, machine.descends_from(match.archspec)
        relation = "is" if met else "is not"
        checks.append((met, f"wants a CPU that is {wanted} or descends from it, and {machine.cpu} {relation}"))
    missing = sorted(set(match.features) - machine.features)
    if match.features:
        found = f"lacks {', '.join(missing)}" if missing else "has them"
        checks.append((not missing, f"wants the CPU features {', '.join(match.features)}, and {machine.cpu} {found}"))
    return checks


def _check_cuda(match: Match, machine: Machine) -> list[_Check]:
    if not match.wants_cuda:
        return []
    fitting = [
        device
        for device in machine.cuda
        if match.has_capability(device.compute_capability)
        and (match.cuda_name is None or match.cuda_name.lower() in device.name.lower())
    ]
    seen = ", ".join(map(str, fitting or machine.cuda)) or "none: neither nvidia-smi nor the driver lists a GPU"
    return [(bool(fitting), f"wants a CUDA device{_named(match)}, found {seen}")]


def _named(match: Match) -> str:
    named = "" if match.cuda_name is None else f" named {match.cuda_name}"
    if match.cuda_cc is not None:
        return f"{named} of compute capability {_dotted(match.cuda_cc)}"
    low = f" from {_dotted(match.cuda_cc_from)}" if match.cuda_cc_from else ""
    high = f" to {_dotted(match.cuda_cc_to)}" if match.cuda_cc_to else ""
    return f"{named} of compute capability{low}{high}" if low or high else named


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _check_board(match: Match, machine: Machine) -> list[_Check]:
    checks = []
    for wanted, what, found in (
        (match.device_tree, "a board whose device tree names", machine.device_tree),
        (match.accelerator, "an accelerator with the kernel driver", machine.accelerators),
    ):
        if wanted is not None:
            checks.append((wanted in found, f"wants {what} {wanted}, found {', '.join(found) or 'none'}"))
    return checks


def _check_runtime(profile: Profile, machine: Machine) -> _Check:
    runtime = profile.runtime
    wanted = f"wants {runtime.name}{f' {runtime.versions}' if runtime.versions else ''}"
    version = machine.runtimes.get(runtime.name)
    package = INSTALL.get(runtime.name, PACKAGES.get(runtime.name, ("",))[0])
    if version is None and not package:
        return False, f"{wanted}, which is no package that can be looked for; choose the profile by its id"
    if version is None:
        return False, f"{wanted}, found none: pip install {package}"
    if not runtime.accepts(version):
        return False, f"{wanted}, found {version}: pip install --upgrade {package}"
    if profile.device.match.wants_cuda and _built_for_cpu(version):
        return False, f"{wanted} with CUDA, found {version}, which was built without: pip install {package} for CUDA"
    return True, f"{wanted}, found {version}"


def _built_for_cpu(version: str) -> bool:
    try:
        return Version(version).local == "cpu"  # how PyTorch marks such builds: 2.13.0+cpu
    except InvalidVersion:
        return False


def _score(profile: Profile) -> tuple[int, ...]:
    match, known = profile.device.match, list(PACKAGES)
    target = archspec.cpu.TARGETS.get(match.archspec)
    exact = sum(part is not None for part in (match.cuda_name, match.cuda_cc, match.device_tree, match.accelerator))
    name = profile.runtime.name
    return (
        _KINDS[profile.device.kind],
        int(bool(profile.granularity)),
        _KEEPS.get(profile.dtype.weights, 0),
        exact,
        0 if target is None else len(target.ancestors),
        len(match.features),
        int(profile.status == "confirmed"),
        -known.index(name) if name in known else -len(known),
    )
