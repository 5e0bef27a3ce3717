"""Calibration kit: a folder to carry to a device that cannot run PyTorch, and the table made of what comes back.

The folder holds the networks as files of the profile's runtime, `manifest.json`, and `run.py`, which needs Python and
that runtime only, or the runtime's benchmark tool (tools.kit_runner).
"""

import importlib
import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from backends import export_onnx
from backends.artifact import TensorSpec, sha256_of, specs_of
from backends.settings import number
from planner.candidates import candidates
from planner.graph import Graph, random_input, trace
from planner.latency import LatencyTable, Probe
from planner.operations import Choice
from profiles import BackendUnavailable, PlanError, Profile, atomic, load
from tools.calibrate import Progress, batch_of, fitted_at
from tools.design import design, off_the_grid
from tools.networks import network, random_samples
from tools.place import Place

MANIFEST, RUNNER, RESULTS = "manifest.json", "run.py", "results.json"
_TIME = r"(?P<value>[\d.]+) (?P<unit>[mu]?s)"  # as the tools print it
_MACS_PER_S = 5e9  # of a slow device, to say how often its tool runs a network
_CAN = {  # the number formats of each runtime that a kit can be written for
    "executorch": ("fp32", "int8"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "fp16", "int8"),
    "tensorrt": ("fp32", "fp16", "int8"),
}
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
T = TypeVar("T", bound=BaseModel)
_NETWORKS = 49  # the dense one and 48 others: they predict MobileNetV2 within 3 % on average


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class KitModel(_Part):
    """One network of a kit: its file, and what it keeps of the dense one."""

    file: str
    sha256: Digest
    keep: dict[str, int]
    removed: tuple[str, ...]
    words: dict[str, int]  # what a command of the tool says of it: runs


class Tool(_Part):
    """The runtime's benchmark tool: commands with {file} and {runs}, and where it prints <value>, <unit> and <runs>."""

    prepare: tuple[str, ...] = ()
    time: tuple[str, ...]
    latency: str


class Manifest(_Part):
    """What is in a kit; the first network is the dense one, with which the others are timed in turns."""

    schema_version: Literal[1] = 1
    profile: str
    fingerprint: str
    runtime: str
    settings: dict[str, Any]  # what run.py opens networks with
    threads: Count
    batch: Count
    inputs: tuple[TensorSpec, ...]
    tool: Tool | None = None
    models: Annotated[tuple[KitModel, ...], Field(min_length=2)]


class Measured(_Part):
    """What run.py found of one network."""

    file: str
    latency_s: Positive
    relative: Positive
    ci95_s: tuple[Positive, Positive]
    runs: Count
    rounds_s: tuple[Positive, ...]
    dense_rounds_s: tuple[Positive, ...]


class Results(_Part):
    """What run.py writes."""

    schema_version: Literal[1]
    kit: Digest
    runtime: str
    runtime_version: str | None
    method: str
    threads: Count
    device_model: str | None
    platform: str
    driver_version: str | None
    governor: str | None
    frequency_hz: Positive | None
    started: str
    measured: tuple[Measured, ...]


def write_kit(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    profile: Profile,
    folder: Path,
    *,
    threads: int = 1,
    progress: Progress = lambda *_: None,
) -> Manifest:
    """Write the networks that calibration of `model` for `profile` measures, and what is needed to time them.

    The profile's runtime need not be installed for fp32 networks in ONNX. Raises BackendUnavailable for what cannot be
    timed away from here.
    """
    wanted = _number(profile)
    settings, tool = _way(profile, wanted, threads)
    graph = trace(model, inputs)
    networks = design(graph, candidates(graph, profile))[:_NETWORKS]
    models = []
    for index, choice in enumerate(networks):
        file = f"models/{index:03d}{'.pte' if profile.runtime.name == 'executorch' else '.onnx'}"
        small, path = network(model, graph, choice), folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(small, inputs, profile, path, wanted)
        models.append(_described(graph, choice, file, path))
        progress("writing", index + 1, len(networks))
    manifest = Manifest(
        profile=profile.id,
        fingerprint=graph.fingerprint,
        runtime=profile.runtime.name,
        settings=settings,
        threads=threads,
        batch=batch_of(inputs),
        inputs=specs_of(inputs),
        tool=tool,
        models=tuple(models),
    )
    atomic.write_text(folder / RUNNER, (importlib.resources.files("tools") / "kit_runner.py").read_text())
    atomic.write_text(folder / MANIFEST, manifest.model_dump_json(indent=1, exclude_none=True) + "\n")
    return manifest


def _number(profile: Profile) -> str:
    name = profile.runtime.name
    if name not in _CAN:
        raise BackendUnavailable(
            f"there is no kit for {name} (profile {profile.id}); choose a profile of {', '.join(_CAN)}"
        )
    return number(profile, runtime=name, can=_CAN[name])


def _described(graph: Graph, choice: Choice, file: str, path: Path) -> KitModel:
    return KitModel(
        file=file,
        sha256=sha256_of(path.read_bytes()),
        keep=dict(choice.keep),
        removed=tuple(sorted(choice.removed)),
        words={"runs": int(min(500, max(10, 0.3 * _MACS_PER_S / max(1, graph.macs(choice)))))},
    )


def _write(model: nn.Module, inputs: tuple[Tensor, ...], profile: Profile, path: Path, wanted: str) -> None:
    """Write one network for the profile's runtime."""
    name = profile.runtime.name
    if name == "tensorrt" and wanted == "int8":
        from backends.quantisation import for_onnxruntime

        samples = random_samples(inputs, profile)
        for_onnxruntime(model, inputs, path, samples=samples, signed=True, reduce_range=False)
    elif name == "tensorrt" and wanted == "fp16":
        from backends.tensorrt import Half

        export_onnx(Half(model), inputs, path)
    elif name == "executorch" or wanted == "int8":
        from backends import load as runtime_of

        with off_the_grid():
            runtime_of(name).build(model, inputs, profile, path, samples=random_samples(inputs, profile))
    else:
        export_onnx(model, inputs, path)


def _way(profile: Profile, wanted: str, threads: int) -> tuple[dict[str, Any], Tool | None]:
    """Return how networks are opened on the device, as the backend opens them here, and the command of the tool."""
    name = profile.runtime.name
    module = importlib.import_module(f"backends.{name}")
    options = module.options_for(profile) if name == "executorch" else module.options_for(profile, wanted)
    if name == "onnxruntime":
        providers = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
        return {"provider": providers.get(options.provider, "CPUExecutionProvider")}, None
    if name == "openvino":
        return _openvino(options, threads)
    if name == "tensorrt":
        return {}, _trtexec(profile, options)
    if options.delegate != "xnnpack":
        raise BackendUnavailable(
            f"{profile.id} runs on an {options.accelerator}, which has no operating system to run a kit on; calibrate "
            "with the estimates of its compiler"
        )
    command = ("executor_runner", "--model_path={file}", "--num_executions={runs}", f"--cpu_threads={threads}")
    return {}, Tool(time=command, latency=r"executed successfully (?P<runs>\d+) time\(s\) in " + _TIME)


def _openvino(options: Any, threads: int) -> tuple[dict[str, Any], Tool]:
    device = options.device.upper()
    precision = {"bf16": "bf16", "fp16": "f16"}.get(options.number, "f32")
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    command = ["benchmark_app", "-m", "{file}", "-d", device, "-api", "sync", "-t", "1"]
    if device == "CPU":
        # One thread runs in the caller, whose cores run.py chooses; OpenVINO's own pinning would overrule it.
        properties |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        command += ["-hint", "none", "-nstreams", "1", "-nthreads", str(threads)]  # with a hint it takes no threads
    else:
        command += ["-hint", "latency"]
    command += ["-infer_precision", precision]
    tool = Tool(time=tuple(command), latency=r"Median:\s+" + _TIME)
    return {"device": device, "properties": properties}, tool


def _trtexec(profile: Profile, options: Any) -> Tool:
    """Return trtexec's commands; from 11.0 on types are those of the file, and the flags that name one are gone."""
    flags = []
    if options.number in ("fp16", "int8") and profile.runtime.accepts("10.7"):
        flags.append(f"--{options.number}")
    if options.number == "fp32":
        flags.append("--noTF32")
    if options.dla_core is not None:
        flags += [f"--useDLACore={options.dla_core}", *(["--allowGPUFallback"] if options.gpu_fallback else [])]
    if options.sparse_weights:
        flags.append("--sparsity=enable")
    graph = ["--useCudaGraph"] if options.graphs else []
    return Tool(
        prepare=("trtexec", "--onnx={file}", "--saveEngine={file}.engine", "--skipInference", *flags),
        time=("trtexec", "--loadEngine={file}.engine", "--duration=1", "--warmUp=200", "--noDataTransfers", *graph),
        latency=r"GPU Compute Time:[^\n]*median = " + _TIME,
    )


def import_results(results: Path, folder: Path, model: nn.Module, inputs: tuple[Tensor, ...]) -> LatencyTable:
    """Return the latency table of a kit's results; raises PlanError unless they are of this kit and model."""
    content, manifest = _read(folder / MANIFEST, Manifest, "write the kit again with `espalier calibrate --kit`")
    _, found = _read(results, Results, f"let {RUNNER} write it again")
    if found.kit != sha256_of(content):
        raise PlanError(f"{results} was measured with another kit than {folder}; give the folder that was copied")
    if found.runtime_version is None:
        raise PlanError(f"{results} does not say the runtime's version; parse again with --runtime-version")
    _check_files(manifest, folder)
    graph = trace(model, inputs)
    if graph.fingerprint != manifest.fingerprint:
        raise PlanError(
            f"the kit was made for another model or input shape (fingerprint {manifest.fingerprint}, this one is "
            f"{graph.fingerprint}); give the model that it was made for"
        )
    profile = load(manifest.profile)
    place = Place(
        device=found.device_model or found.platform,
        device_model=found.device_model,
        runtime=found.runtime,
        runtime_version=found.runtime_version,
        driver_version=found.driver_version,
        threads=found.threads,
        batch=manifest.batch,
        governor=found.governor,
        frequency_hz=found.frequency_hz,
        method=f"kit, {found.method}",
    )
    return fitted_at(place, _probes(manifest, found, results), candidates(graph, profile), graph=graph, profile=profile)


def inputs_of(folder: Path) -> tuple[Tensor, ...]:
    """Return inputs of the shapes that a kit was written for."""
    _, manifest = _read(folder / MANIFEST, Manifest, "give the folder of a kit")
    generator = torch.Generator().manual_seed(0)
    return tuple(random_input(spec.shape, spec.dtype, generator) for spec in manifest.inputs)


def _check_files(manifest: Manifest, folder: Path) -> None:
    for model in manifest.models:
        path = folder / model.file
        if not path.exists() or sha256_of(path.read_bytes()) != model.sha256:
            raise PlanError(f"{path} is missing or was changed since the kit was written; write the kit again")


def _probes(manifest: Manifest, found: Results, path: Path) -> list[Probe]:
    measured: Mapping[str, Measured] = {each.file: each for each in found.measured}
    dense, *others = manifest.models
    if missing := [model.file for model in others if model.file not in measured]:
        raise PlanError(
            f"{path} lacks {len(missing)} of {len(others)} networks, such as {missing[0]}; start {RUNNER} again on the "
            "device, it goes on"
        )
    rounds = [seconds for each in found.measured for seconds in each.dense_rounds_s]
    middle = median(rounds)
    first = Measured(
        file=dense.file,
        latency_s=middle,
        relative=1.0,
        ci95_s=(middle, middle),
        runs=len(rounds),
        rounds_s=(),
        dense_rounds_s=(),
    )
    return [_probe(model, measured.get(model.file, first)) for model in manifest.models]


def _probe(model: KitModel, measured: Measured) -> Probe:
    return Probe(
        keep=model.keep,
        removed=model.removed,
        latency_s=measured.latency_s,
        relative=measured.relative,
        ci95_s=measured.ci95_s,
        runs=measured.runs,
    )


def _read(path: Path, cls: type[T], remedy: str) -> tuple[bytes, T]:
    try:
        content = path.read_bytes()
        return content, cls.model_validate_json(content)
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "document"
        raise PlanError(f"{path}: {where}: {first['msg']}; {remedy}") from error
