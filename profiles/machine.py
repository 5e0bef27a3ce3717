"""What matters of a machine: its CPU, its accelerators, and the runtimes that are installed."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Self

import archspec.cpu
from archspec.cpu import detect as archspec_detect
from pydantic import BaseModel, ConfigDict

from profiles import cuda
from profiles.cuda import CudaDevice

# Packages that bring a runtime. The order breaks ties between equal fits.
PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "pytorch": ("torch",),
    "coreml": ("coremltools",),
    "tflite": ("ai-edge-litert", "tflite-runtime"),
    "rknn": ("rknn-toolkit-lite2", "rknn-toolkit2"),
    "vela": ("ethos-u-vela",),
}
INSTALL = {  # what the user installs to get it, where it is not the first package
    "onnxruntime": "'espalier[onnxruntime]'",
    "openvino": "'espalier[openvino]'",
}

_DEVICE_TREE = Path("/proc/device-tree/compatible")
_DRIVERS = ("/sys/class/accel/accel*/device/driver", "/sys/class/apex/apex_*/device/driver")


class Machine(BaseModel):
    """A machine; recorded ones stand in for real ones in tests and reports."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str  # the microarchitecture, or the nearest generic one that archspec knows
    cpu_ancestors: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()
    cuda: tuple[CudaDevice, ...] = ()
    device_tree: tuple[str, ...] = ()  # the board's `compatible` strings
    accelerators: tuple[str, ...] = ()  # kernel drivers of accelerators
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
            cuda=cuda.devices(),
            device_tree=_device_tree(_DEVICE_TREE),
            accelerators=_drivers(*_DRIVERS),
            runtimes={name: version for name in PACKAGES if (version := _installed(name)) is not None},
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


def _device_tree(file: Path) -> tuple[str, ...]:
    try:
        return tuple(filter(None, file.read_bytes().decode(errors="replace").split("\0")))
    except OSError:
        return ()  # only boards have one


def _drivers(*patterns: str) -> tuple[str, ...]:
    links = (link for pattern in patterns for link in Path("/").glob(pattern.lstrip("/")))
    return tuple(sorted({link.resolve().name for link in links}))


def _installed(runtime: str) -> str | None:
    for package in PACKAGES[runtime]:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
