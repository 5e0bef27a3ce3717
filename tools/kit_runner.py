"""Time the networks of this folder on this device, in turns with the first one, and write results.json beside them.

Needs Python 3.8 and the runtime that the networks are for, nothing else. Killed and started again it goes on.

On a device without Python, or without the runtime's Python package, its benchmark tool (trtexec, benchmark_app or
executor_runner) does the timing: `python3 run.py --commands > run.sh`, on the device `sh run.sh > log.txt 2>&1`, and
`python3 run.py --parse log.txt --runtime-version X.Y`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

HERE = Path(__file__).resolve().parent
BLOCK_S, ROUNDS, RESAMPLES = 0.03, 7, 500
MARK = "== espalier"
CPU = Path("/sys/devices/system/cpu")
DEVICE = {  # how a device without Python says what it is
    "device_model": "tr -d '\\000' < /proc/device-tree/model || "
    "sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1",
    "platform": "uname -srm",
    "driver_version": "uname -r",
    "governor": f"cat {CPU}/cpu0/cpufreq/scaling_governor",
}


class Wrong(Exception):
    """What the user can mend; printed without a traceback."""


class Kit:
    """The folder: its manifest, and the digest that results refer to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = (folder / "manifest.json").read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.manifest = json.loads(content)
        self.runtime = str(self.manifest["runtime"])
        self.threads = int(self.manifest["threads"])
        self.settings: dict[str, Any] = self.manifest["settings"]
        self.models: dict[str, dict[str, Any]] = {each["file"]: each for each in self.manifest["models"]}
        self.dense = str(self.manifest["models"][0]["file"])

    def check(self) -> None:
        """Refuse files that are not those that were written."""
        for file, model in self.models.items():
            path = self.folder / file
            found = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"
            if found != model["sha256"]:
                raise Wrong(f"{file} is {found[:12]}, not what was written; copy the kit again")

    def commands(self, what: str, file: str, tool: str | None) -> list[str]:
        """Return the command of the runtime's tool that prepares or times a network, if there is one."""
        if "tool" not in self.manifest:
            raise Wrong(f"{self.runtime} has no benchmark tool; install its Python package")
        words = [word.format(file=file, **self.models[file]["words"]) for word in self.manifest["tool"][what]]
        return [" ".join(map(shlex.quote, [tool or words[0], *words[1:]]))] if words else []

    def batches(self, done: Sequence[str], together: int) -> Iterator[list[str]]:
        """Yield the networks that are still to be timed, the first one in every batch."""
        left = [file for file in self.models if file != self.dense and file not in done]
        for start in range(0, len(left), together):
            yield [self.dense, *left[start : start + together]]


def device_model() -> str | None:
    """Return the name that the board or the CPU tells."""
    tree = _read(Path("/proc/device-tree/model"))
    if tree:
        return tree.rstrip("\0")
    names = re.findall(r"^(?:model name|Hardware)\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")) or "", re.M)
    return names[0].strip() if names else platform.processor() or None


def governor() -> str | None:
    """Return what governs the clock, or None where the system does not say."""
    return _read(CPU / "cpu0/cpufreq/scaling_governor")


def frequency_hz() -> float | None:
    """Return the clock now, or None where the system does not say."""
    text = _read(CPU / "cpu0/cpufreq/scaling_cur_freq")
    return float(text) * 1e3 if text and text.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None


def say(text: str) -> None:
    """Tell the user something, beside the results."""
    sys.stderr.write(text + "\n")


def onnxruntime_engine(kit: Kit) -> tuple[str, Callable[[Path], Callable[[], object]]]:
    """Open as espalier's own backend does."""
    import onnxruntime

    provider = kit.settings["provider"]

    def opened(path: Path) -> Callable[[], object]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = kit.threads, 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        if session.get_providers()[0] != provider:
            raise Wrong(f"{provider} does not load here; mend its driver")
        arrays, binding = inputs(kit), session.io_binding()
        for value in session.get_inputs():
            binding.bind_cpu_input(value.name, arrays[value.name])
        for value in session.get_outputs():
            binding.bind_output(value.name)

        def run(_kept: object = arrays) -> None:
            session.run_with_iobinding(binding)

        return run

    return str(onnxruntime.__version__), opened


def openvino_engine(kit: Kit) -> tuple[str, Callable[[Path], Callable[[], object]]]:
    """Open as espalier's own backend does."""
    import openvino

    core = openvino.Core()

    def opened(path: Path) -> Callable[[], object]:
        model = core.compile_model(core.read_model(str(path)), kit.settings["device"], kit.settings["properties"])
        arrays, request = inputs(kit), model.create_infer_request()
        for port in model.inputs:
            request.set_tensor(port.any_name, openvino.Tensor(arrays[port.any_name], shared_memory=True))

        def run(_kept: object = arrays) -> None:
            request.infer(share_outputs=True, decode_strings=False)

        return run

    return str(openvino.__version__).partition("-")[0], opened


def executorch_engine(kit: Kit) -> tuple[str, Callable[[Path], Callable[[], object]]]:
    """Open as espalier's own backend does; the package brings PyTorch."""
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime
    from executorch.version import __version__

    if portable_lib._threadpool_get_thread_count() != kit.threads:
        portable_lib._unsafe_reset_threadpool(kit.threads)  # before any network is opened: they point to the pool

    def opened(path: Path) -> Callable[[], object]:
        program = Runtime.get().load_program(content := path.read_bytes())
        method = program.load_method("forward")
        tensors = [torch.from_numpy(array) for array in inputs(kit).values()]

        def run(_kept: object = (content, program)) -> object:  # the method points into both
            return method.execute(tensors)

        return run

    return str(__version__).partition("+")[0], opened


ENGINES = {"onnxruntime": onnxruntime_engine, "openvino": openvino_engine, "executorch": executorch_engine}


def inputs(kit: Kit) -> dict[str, Any]:
    """Return random inputs by name; every runtime's Python package brings NumPy."""
    import numpy

    made, generator = {}, numpy.random.RandomState(0)
    for each in kit.manifest["inputs"]:
        dtype = numpy.dtype(each["dtype"])
        values = generator.standard_normal(each["shape"]) if dtype.kind == "f" else numpy.zeros(each["shape"])
        made[each["name"]] = values.astype(dtype)
    return made


def timed(kit: Kit, opened: Callable[[Path], Callable[[], object]], batch: Sequence[str], seconds: float) -> Any:
    """Return (median seconds of every round, number of runs) of each network, in turns after a warm-up."""
    calls = {file: opened(kit.folder / file) for file in batch}
    rounds = max(ROUNDS, round(seconds / BLOCK_S))
    counts, taken = {}, {file: [] for file in batch}  # type: dict[str, int], dict[str, list[float]]
    for file, call in calls.items():
        call()
        run_s = median(_block(call, 5 if _block(call, 1)[0] < BLOCK_S else 1))
        counts[file] = max(1, round(seconds / rounds / max(run_s, 1e-7)))
        _block(call, counts[file])
    order = random.Random(0)
    for _ in range(rounds):
        for file in order.sample(list(calls), len(calls)):
            if counts[file] > 1:
                calls[file]()  # fills the caches that others used
            taken[file].append(median(_block(calls[file], counts[file])))
    return {file: (taken[file], rounds * counts[file]) for file in batch}


def _block(call: Callable[[], object], count: int) -> list[float]:
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        taken.append(max(time.perf_counter() - start, 1e-9))
    return taken


def turns(batch: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield (round, network) in the order in which the tool is called."""
    order = random.Random(0)
    for turn in range(ROUNDS):
        for file in order.sample(list(batch), len(batch)):
            yield turn, file


def script(kit: Kit, options: argparse.Namespace) -> str:
    """Return the lines of a shell script that times with the runtime's tool what is left."""
    lines = ["#!/bin/sh", 'cd "$(dirname "$0")"']
    lines += [f"echo '{MARK} about {key}' $( {{ {command}; }} 2> /dev/null )" for key, command in DEVICE.items()]
    batches = list(kit.batches(stored(options.out), options.together))
    for file in sorted({file for batch in batches for file in batch}):
        lines += kit.commands("prepare", file, options.tool)
    for number, batch in enumerate(batches):
        for turn, file in turns(batch):
            lines += [f"echo '{MARK} {number} {turn} {file}'", *kit.commands("time", file, options.tool)]
    return "\n".join(lines) + "\n"


def parse(kit: Kit, options: argparse.Namespace) -> None:
    """Add the batches that a log of `script` holds whole."""
    batches: dict[str, dict[str, tuple[list[float], int]]] = {}
    device = about(kit, options.runtime_version, "tool")
    for part in options.parse.read_text(errors="replace").split(f"{MARK} ")[1:]:
        head, _, text = part.partition("\n")
        number, rest, *file = head.strip().split(" ", 2)
        if number == "about":
            device[rest] = " ".join(file) or None
            continue
        seconds, runs = told(kit, file[0], text)
        before = batches.setdefault(number, {}).get(file[0], ([], 0))
        batches[number][file[0]] = ([*before[0], seconds], before[1] + runs)
    results = Results(kit, options.out, {**device, "frequency_hz": None})
    for batch in batches.values():
        if all(len(taken) == ROUNDS for taken, _ in batch.values()):
            results.add(batch)
        else:
            say("the log ends within a batch; --commands prints what is left")


def told(kit: Kit, file: str, text: str) -> tuple[float, int]:
    """Return the latency in seconds that the tool printed for a network, and over how many runs if it says."""
    found = [match.groupdict() for match in re.finditer(kit.manifest["tool"]["latency"], text, re.S)]
    if file not in kit.models or not found:
        raise Wrong(f"the log tells no latency of {file}, only:\n" + "\n".join(text.splitlines()[-8:]))
    runs, unit_s = int(found[-1].get("runs") or 1), {"s": 1.0, "ms": 1e-3, "us": 1e-6}[found[-1]["unit"]]
    return max(float(found[-1]["value"]) * unit_s, 1e-9) / runs, runs


def stored(path: Path) -> list[str]:
    """Return the networks of which results are there."""
    return [each["file"] for each in json.loads(path.read_text())["measured"]] if path.exists() else []


class Results:
    """results.json: begun anew unless it belongs to this kit, device, runtime and number of threads."""

    def __init__(self, kit: Kit, path: Path, about: dict[str, Any]) -> None:
        self.kit, self.path = kit, path
        same = ("schema_version", "kit", "runtime", "runtime_version", "threads", "method", "device_model", "platform")
        self.content = json.loads(path.read_text()) if path.exists() else {}
        if differing := [key for key in same if self.content.get(key) != about[key]]:
            if self.content:
                say(f"{path} was made with another {', '.join(differing)}, and is begun anew")
            self.content = {**about, "measured": []}

    @property
    def done(self) -> list[str]:
        """The networks that were timed."""
        return [each["file"] for each in self.content["measured"]]

    def add(self, batch: dict[str, tuple[list[float], int]]) -> None:
        """Add the rounds of a batch, and write the file so that it is whole or as it was."""
        dense = batch[self.kit.dense][0]
        for file, (taken, runs) in batch.items():
            if file != self.kit.dense:
                pairs = min(len(taken), len(dense))
                ratios = [taken[turn] / dense[turn] for turn in range(pairs)]
                self.content["measured"].append(
                    {
                        "file": file,
                        "latency_s": median(taken),
                        "relative": median(ratios),
                        "ci95_s": interval(taken),
                        "runs": runs,
                        "rounds_s": taken,
                        "dense_rounds_s": dense,
                    }
                )
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(temporary, self.path)


def interval(values: Sequence[float]) -> list[float]:
    """Return the 95 % percentile-bootstrap interval of the median (Efron 1979)."""
    generator = random.Random(0)
    medians = sorted(median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return [medians[round(0.025 * (RESAMPLES - 1))], medians[round(0.975 * (RESAMPLES - 1))]]


def about(kit: Kit, version: str, method: str) -> dict[str, Any]:
    """Return under which conditions is measured."""
    return {
        "schema_version": 1,
        "kit": kit.sha256,
        "runtime": kit.runtime,
        "runtime_version": version,
        "method": method,
        "threads": kit.threads,
        "device_model": device_model(),
        "platform": platform.platform(),
        "driver_version": platform.release(),
        "governor": governor(),
        "frequency_hz": frequency_hz(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    }


def pin(threads: int) -> None:
    """Stay on the fastest cores, if there are any to spare; must come before a runtime starts threads."""
    if hasattr(os, "sched_setaffinity") and len(cores := os.sched_getaffinity(0)) > threads:
        speed = {core: int(_read(CPU / f"cpu{core}/cpufreq/cpuinfo_max_freq") or 0) for core in cores}
        os.sched_setaffinity(0, sorted(cores, key=lambda core: (-speed[core], -core))[:threads])


def measure(kit: Kit, options: argparse.Namespace) -> None:
    """Time what is left in the runtime's Python package, and keep each batch."""
    kit.check()
    pin(kit.threads)
    try:
        version, opened = ENGINES[kit.runtime](kit)
    except (ImportError, KeyError) as error:
        raise Wrong(f"{kit.runtime} has no Python package here ({error}); {__doc__}") from error
    results = Results(kit, options.out, about(kit, version, "python"))
    batches = list(kit.batches(results.done, options.together))
    start = time.monotonic()
    for number, batch in enumerate(batches):
        results.add(timed(kit, opened, batch, options.seconds))
        left_s = (time.monotonic() - start) / (number + 1) * (len(batches) - number - 1)
        say(f"{len(results.done)} of {len(kit.models) - 1} networks, about {left_s:.0f} s left")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.25, help="measuring time per network")
    parser.add_argument("--together", type=int, default=12, help="networks that are open at a time")
    parser.add_argument("--runtime-version", help="version of the runtime, which the log does not tell")
    parser.add_argument("--tool", help="the runtime's benchmark tool, where it has another name or folder")
    parser.add_argument("--commands", action="store_true", help="print a shell script that calls the tool")
    parser.add_argument("--parse", type=Path, metavar="LOG", help="read what that script printed")
    parser.add_argument("--out", type=Path, default=HERE / "results.json", help="the results")
    options = parser.parse_args(arguments)
    try:
        kit = Kit(HERE)
        if options.commands:
            sys.stdout.write(script(kit, options))
        elif options.parse:
            parse(kit, options)
        else:
            measure(kit, options)
    except Wrong as wrong:
        say(str(wrong))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
