"""The CUDA devices of this machine, as nvidia-smi or, where it is missing or mute (Jetson), the driver names them."""

import ctypes
import ctypes.util
import logging
import shutil
import subprocess

from pydantic import BaseModel, ConfigDict

logger = logging.getLogger(__name__)

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h


class CudaDevice(BaseModel):
    """One GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.name} ({'.'.join(map(str, self.compute_capability))})"


def devices() -> tuple[CudaDevice, ...]:
    """Return the GPUs of this machine; none if neither nvidia-smi nor the driver names any."""
    return _of_nvidia_smi() or _of_driver()


def _of_nvidia_smi() -> tuple[CudaDevice, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = [command, "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("nvidia-smi did not answer, so its GPUs are not seen: %s", error)
        return ()
    return read(output)


def read(output: str) -> tuple[CudaDevice, ...]:
    """Read the lines "name, major.minor, MiB" of nvidia-smi; others (errors, N/A) are named in the log."""
    found = []
    for line in filter(None, map(str.strip, output.splitlines())):
        name, capability, memory = (*(field.strip() for field in line.split(",")), "", "")[:3]
        major, _, minor = capability.partition(".")
        if name and major.isdigit() and minor.isdigit():
            mib = int(memory) if memory.isdigit() else None
            found.append(
                CudaDevice(
                    name=name,
                    compute_capability=(int(major), int(minor)),
                    memory_bytes=None if mib is None else mib * 2**20,
                )
            )
        else:
            logger.warning("not understood from nvidia-smi: %s", line)
    return tuple(found)


def _of_driver() -> tuple[CudaDevice, ...]:
    library = ctypes.util.find_library("cuda")
    try:
        driver = None if library is None else ctypes.CDLL(library)
    except OSError as error:
        logger.warning("the CUDA driver cannot be loaded, so no GPU is assumed: %s", error)
        return ()
    count = ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_device(driver, index) for index in range(count.value))


def _device(driver: ctypes.CDLL, index: int) -> CudaDevice:
    handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(handle), index)
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, handle)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, handle)
    known = driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle) == 0
    return CudaDevice(
        name=name.value.decode(errors="replace"),
        compute_capability=(major.value, minor.value),
        memory_bytes=memory.value if known else None,
    )
