"""Which profiles fit this machine, and for those that do not, why not."""

import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from typing import Self

import archspec.cpu
from archspec.cpu import detect as archspec_detect
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict

from profiles import registry
from profiles.errors import ProfileError
from profiles.schema import Match, Profile

logger = logging.getLogger(__name__)

# Packages that bring a runtime, and what the user installs to get it. The order breaks ties between equal fits.
_PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "pytorch": ("torch",),
}
_INSTALL = {"onnxruntime": "'espalier[onnxruntime]'", "openvino": "'espalier[openvino]'", "pytorch": "torch"}


class CudaDevice(BaseModel):
    """One GPU as nvidia-smi prints it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    compute_capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} ({'.'.join(map(str, self.compute_capability))})"


class Machine(BaseModel):
    """What matters of a machine; recorded ones stand in for real ones in tests and reports."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str  # the microarchitecture, or the nearest generic one that archspec knows
    cpu_ancestors: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()
    cuda: tuple[CudaDevice, ...] = ()
    runtimes: dict[str, str] = {}  # backend -> installed version
    os: str
    cores: int

    @classmethod
    def here(cls) -> Self:
        """Describe the machine that runs this."""
        host = archspec.cpu.host()
        return cls(
            cpu=str(host.name),
            cpu_ancestors=tuple(str(ancestor.name) for ancestor in host.ancestors),
            # A CPU newer than archspec shows as a generic one, whose features are only those that all such CPUs share.
            features=frozenset(host.features) | frozenset(archspec_detect.detected_info().features),
            cuda=_cuda_devices(),
            runtimes={name: version for name in _PACKAGES if (version := _installed(name)) is not None},
            os=platform.system(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        )

    def descends_from(self, microarchitecture: str) -> bool:
        """Say whether the CPU runs what was compiled for this microarchitecture of archspec."""
        if microarchitecture in (self.cpu, *self.cpu_ancestors):
            return True
        target = archspec.cpu.TARGETS.get(microarchitecture)
        # Generic x86 levels are defined by their features, so a CPU that archspec files elsewhere is known by them.
        return (
            target is not None
            and target.vendor == "generic"
            and 0 < len(target.features & self.features) == len(target.features)
        )


@dataclass(frozen=True)
class Fit:
    """How a profile relates to a machine: the requirements that are met, and those that are not."""

    met: tuple[str, ...]
    unmet: tuple[str, ...]
    score: tuple[int, ...]  # higher is better: GPU match, depth of the ISA, features named, preferred runtime

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
    checks = [*_check_cpu(match, machine), *_check_cuda(match, machine), _check_runtime(profile, machine)]
    if match == Match():
        checks.insert(0, (False, f"{profile.device.arch} cannot be seen from a host; choose the profile by its id"))
    return Fit(
        met=tuple(reason for met, reason in checks if met),
        unmet=tuple(reason for met, reason in checks if not met),
        score=(int(match.wants_cuda), _depth(match), len(match.features), _preference(profile.runtime.name)),
    )


def detect(machine: Machine | None = None) -> list[Profile]:
    """Return the profiles that fit, best first: the most specific device, then the preferred runtime."""
    machine = machine or Machine.here()
    fitting = []
    for profile_id in registry.names():
        try:
            profile = registry.load(profile_id)
        except ProfileError as error:
            logger.warning("skipped a profile that cannot be read: %s", error)
            continue
        found = fit(profile, machine)
        if found.ok:
            fitting.append((found.score, profile))
    fitting.sort(key=lambda pair: (tuple(-part for part in pair[0]), pair[1].id))
    return [profile for _, profile in fitting]


def why(profile: Profile, machine: Machine | None = None) -> str:
    """Say in a sentence why a profile fits a machine, or what it lacks."""
    found = fit(profile, machine or Machine.here())
    if found.ok:
        return f"{profile.id} fits this machine: {'; '.join(found.met)}."
    return f"{profile.id} does not fit this machine: {'; '.join(found.unmet)}."


def why_not(profile_id: str, machine: Machine | None = None) -> str:
    """Say in a sentence why `detect` does not offer a profile, or at which place it does."""
    machine = machine or Machine.here()
    profile = registry.load(profile_id)
    if not fit(profile, machine).ok:
        return why(profile, machine)
    ranked = [other.id for other in detect(machine)]
    place = ranked.index(profile_id) + 1
    ahead = f", after {', '.join(ranked[: place - 1])}" if place > 1 else ""
    return f"{profile_id} does fit this machine, at place {place} of {len(ranked)}{ahead}."


def _check_cpu(match: Match, machine: Machine) -> list[tuple[bool, str]]:
    checks = []
    if match.archspec is not None:
        wanted, met = match.archspec, machine.descends_from(match.archspec)
        relation = "is" if met else "is not"
        checks.append((met, f"wants a CPU that is {wanted} or descends from it, and {machine.cpu} {relation}"))
    missing = sorted(set(match.features) - machine.features)
    if match.features:
        found = f"lacks {', '.join(missing)}" if missing else "has them"
        checks.append((not missing, f"wants the CPU features {', '.join(match.features)}, and {machine.cpu} {found}"))
    return checks


def _check_cuda(match: Match, machine: Machine) -> list[tuple[bool, str]]:
    if not match.wants_cuda:
        return []
    named = "" if match.cuda_name is None else f" named {match.cuda_name}"
    capability = "" if match.cuda_cc is None else f" of compute capability {'.'.join(map(str, match.cuda_cc))}"
    met = any(
        (match.cuda_cc is None or device.compute_capability == match.cuda_cc)
        and (match.cuda_name is None or match.cuda_name.lower() in device.name.lower())
        for device in machine.cuda
    )
    found = ", ".join(map(str, machine.cuda)) or "none: nvidia-smi is missing or lists no GPU"
    return [(met, f"wants a CUDA device{named}{capability}, found {found}")]


def _check_runtime(profile: Profile, machine: Machine) -> tuple[bool, str]:
    runtime = profile.runtime
    wanted = f"wants {runtime.name}{f' {runtime.versions}' if runtime.versions else ''}"
    package = _INSTALL.get(runtime.name, runtime.name)
    version = machine.runtimes.get(runtime.name)
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


def _depth(match: Match) -> int:
    target = archspec.cpu.TARGETS.get(match.archspec)
    return 0 if target is None else len(target.ancestors)


def _preference(runtime: str) -> int:
    known = list(_PACKAGES)
    return -known.index(runtime) if runtime in known else -len(known)


def _installed(runtime: str) -> str | None:
    for package in _PACKAGES[runtime]:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _cuda_devices() -> tuple[CudaDevice, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = [command, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("nvidia-smi did not answer, so no CUDA device is assumed: %s", error)
        return ()
    return _read_cuda(output)


def _read_cuda(output: str) -> tuple[CudaDevice, ...]:
    """Read the lines "name, major.minor" of nvidia-smi; others (errors, N/A) are named in the log."""
    devices = []
    for line in filter(None, map(str.strip, output.splitlines())):
        name, _, capability = line.rpartition(", ")
        major, _, minor = capability.partition(".")
        if name and major.isdigit() and minor.isdigit():
            devices.append(CudaDevice(name=name, compute_capability=(int(major), int(minor))))
        else:
            logger.warning("not understood from nvidia-smi: %s", line)
    return tuple(devices)
