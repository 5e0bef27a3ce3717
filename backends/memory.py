"""Peak memory of a compiled model: what opening it and running it adds to a process of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt

from backends.artifact import Artifact
from backends.registry import load
from profiles.errors import BackendUnavailable, BuildError

__all__ = ["Memory", "peak_memory"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RUNS = 3
_TIMEOUT_S = 600


class Memory(BaseModel):
    """Bytes of resident memory: of the process with its runtime loaded, and at the peak with the model open and run."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    label: str
    base_bytes: PositiveInt
    peak_bytes: PositiveInt

    @property
    def added_bytes(self) -> int:
        """What the model adds: weights, activations, what the compiler keeps, and its peak while it compiles."""
        return max(0, self.peak_bytes - self.base_bytes)


def peak_memory(record: Path | str) -> Memory:
    """Open the artifact of this record in a new process, run it on random inputs, and return the peak.

    Raises BackendUnavailable where the system does not tell (it is read from Linux's /proc), and BuildError for eager
    PyTorch, whose file holds no model.
    """
    artifact = Artifact.load(record)
    if not _RESET.exists():
        raise BackendUnavailable("peak memory is read from Linux's /proc, which this system does not have")
    load(artifact.runtime)
    if artifact.runtime == "pytorch" and artifact.settings.get("mode") != "exported":
        raise BuildError(f"{record}: eager PyTorch has no file that runs by itself; build it with mode = 'exported'")
    command = [sys.executable, "-m", "backends.memory", str(Path(record).resolve())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise BuildError(f"{record} does not run in a process of its own: {last}")
    return Memory(label=str(record), **json.loads(done.stdout.splitlines()[-1]))


def _resident(what: str) -> int:
    found = re.search(rf"^{what}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _main(record: str) -> None:
    """Print the bytes as JSON; what the runtime itself takes is there before the model is opened."""
    artifact = Artifact.load(record)
    runtime = load(artifact.runtime)
    inputs = [np.zeros(spec.shape, spec.dtype) for spec in artifact.inputs]
    _RESET.write_text("5")  # the peak is now what is resident
    base = _resident("VmRSS")
    bound = runtime.session(artifact).bind(inputs)
    for _ in range(_RUNS):
        bound.run()
    sys.stdout.write(json.dumps({"base_bytes": base, "peak_bytes": _resident("VmHWM")}) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1])
