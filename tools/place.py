"""Where latencies were measured: the device, the runtime and the conditions that a table belongs to."""

import platform
import shutil
import subprocess
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from planner.latency import LatencyTable
from profiles import Machine, Profile
from tools import kit_runner

Count = Annotated[int, Field(gt=0)]


class Place(BaseModel):
    """A device, the runtime on it, and the conditions; None where the system does not say."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    device: str  # the microarchitecture of a CPU, or the name of an accelerator
    device_model: str | None
    runtime: str
    runtime_version: str
    driver_version: str | None
    threads: Count
    batch: Count
    governor: str | None
    frequency_hz: Annotated[float, Field(gt=0)] | None
    method: str = "calibrate"

    @classmethod
    def here(cls, profile: Profile, runtime_version: str, *, threads: int, batch: int) -> Self:
        """Describe this machine now, as far as the profile's device goes."""
        machine = Machine.here()
        on_gpu = profile.device.kind == "gpu" and bool(machine.cuda)
        return cls(
            device=machine.cuda[0].name if on_gpu else machine.cpu,
            device_model=machine.cuda[0].name if on_gpu else kit_runner.device_model(),
            runtime=profile.runtime.name,
            runtime_version=runtime_version,
            driver_version=(_cuda_driver() if on_gpu else None) or platform.release(),
            threads=threads,
            batch=batch,
            governor=kit_runner.governor(),
            frequency_hz=kit_runner.frequency_hz(),
        )


def belongs(
    table: LatencyTable,
    machine: Machine,
    *,
    runtime_version: str,
    threads: int,
    batch: int,
    device_model: str | None = None,
) -> list[str]:
    """Return why a table was not measured under these conditions, one sentence each; empty if it was.

    What either side does not know is not compared. `device_model` tells apart machines of one microarchitecture.
    """
    reasons = []
    devices = {machine.cpu, *(device.name for device in machine.cuda)}
    named = table.device_model is not None and device_model is not None
    if named and table.device_model != device_model:
        reasons.append(f"it was measured on {table.device_model}, and this is {device_model}")
    elif not named and table.device not in devices:
        reasons.append(f"it was measured on {table.device}, and this is {machine.cpu}")
    if table.runtime_version != runtime_version:
        reasons.append(f"it was measured with {table.runtime} {table.runtime_version}, and {runtime_version} is here")
    if table.threads != threads:
        reasons.append(f"it was measured with {table.threads} threads, and {threads} are wanted")
    if table.batch is not None and table.batch != batch:
        reasons.append(f"it was measured at batch {table.batch}, and the inputs have batch {batch}")
    return reasons


def _cuda_driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None
