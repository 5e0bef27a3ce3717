"""Arm's Ethos-U NPUs: int8, lowered to TOSA, compiled by Vela, and estimated by Vela; nothing here runs on an NPU.

Parity is that of the TOSA program, the last form that both Vela and Arm's reference model read.
"""

import copy
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch

from backends.build import Job, Made
from backends.contract import Array, Bound, Session, flattened
from backends.estimate import Estimate, OperatorEstimate
from backends.executorch import left_behind, lower
from backends.folding import exported
from backends.quantisation import contiguous, quantised_pt2e
from backends.quiet import quietly
from backends.samples import Inputs
from profiles.errors import BackendUnavailable, BuildError

__all__ = ["EXTRA", "Compiled", "compiler", "dialect", "estimate_of", "estimated"]

EXTRA = "pip install 'espalier[ethos-u]'"
_KIB = 1024


@dataclass(frozen=True)
class Compiled:
    """A network compiled for one Ethos-U: the file's content, and what is known of it without the device."""

    job: Job
    program: Any  # the quantised graph, with calls to the NPU in it
    tosa: dict[str, bytes]  # the program of each part that the NPU takes, by the tag of its operations
    buffer: bytes
    made: Made

    @classmethod
    def of(cls, job: Job, accelerator: str, system_config: str | None, memory_mode: str | None) -> Self:
        """Quantise, lower and compile; raises BuildError if Vela refuses the network or its configuration."""
        if job.number != "int8":
            raise AssertionError(f"an Ethos-U computes in int8, not in {job.number}")
        with TemporaryDirectory(prefix="espalier-") as folder, quietly():
            spec = _spec(accelerator, system_config, memory_mode)
            spec.dump_intermediate_artifacts_to(folder)
            graph, count = exported(contiguous(job.model), job.laid_out)
            lowered = _lowered(graph, job, spec)
            remarks = left_behind(lowered, accelerator, f"the CPU beside the {accelerator}")
            program = copy.deepcopy(lowered.exported_program())  # what follows rewrites it
            buffer = lowered.to_executorch().buffer
            programs = sorted(Path(folder).glob("output_tag*.tosa"))
            if not programs:
                raise BuildError(f"no operation of the model runs on the {accelerator}; choose another profile")
            made = Made(
                count,
                remarks,
                estimate_of(_reports(Path(folder), programs, spec), compiler=compiler()),
            )
            return cls(job, program, {each.name.split("_")[1]: each.read_bytes() for each in programs}, buffer, made)

    def write(self, path: Path) -> Made:
        """Write the .pte file."""
        path.write_bytes(self.buffer)
        return self.made

    def session(self, content: bytes) -> Session:
        """Return what computes as the NPU does: the quantised graph around Arm's reference model of its programs."""
        assert content == self.buffer
        return Session(self.job.specs, self.job.threads, partial(_bound, self))


def estimated(program: Path, accelerator: str, system_config: str | None, memory_mode: str | None) -> Estimate:
    """Return what Vela estimates of a TOSA program that lies in a file."""
    spec = _spec(accelerator, system_config, memory_mode)
    with TemporaryDirectory(prefix="espalier-") as folder, quietly(errors_too=True):
        return estimate_of([_compiled(program, Path(folder), spec)], compiler=compiler())


def compiler() -> str:
    """Return the name and version of the compiler whose estimates these are; BackendUnavailable if it is not here."""
    try:
        return f"Vela {installed_version('ethos-u-vela')}"
    except PackageNotFoundError as error:
        raise BackendUnavailable(f"Vela is not installed: {EXTRA}") from error


def dialect(accelerator: str, system_config: str | None, memory_mode: str | None) -> str:
    """Return the dialect of TOSA that the accelerator's programs are in; several accelerators share one."""
    with quietly():
        return str(_spec(accelerator, system_config, memory_mode).tosa_spec)


def estimate_of(reports: list[tuple[dict[str, str], list[dict[str, str]]]], *, compiler: str) -> Estimate:
    """Return the estimate in Vela's reports: a summary row and the rows of its operations for each program.

    Programs run one after the other: their times add up, and so does flash; SRAM is shared.
    """
    summaries = [summary for summary, _ in reports]
    first = summaries[0]

    def total(column: str) -> float:
        return sum(float(row[column]) for row in summaries)

    return Estimate(
        compiler=compiler,
        accelerator=first["accelerator_configuration"],
        system_config=first["system_config"],
        memory_mode=first["memory_mode"],
        clock_hz=float(first["core_clock"]),
        latency_s=total("inference_time"),
        cycles=round(total("cycles_total")),
        bound_cycles={
            part: round(total(f"cycles_{part}" if part == "npu" else f"cycles_{part}_access"))
            for part in ("npu", "sram", "dram", "on_chip_flash", "off_chip_flash")
        },
        sram_bytes=round(max(float(row["sram_memory_used"]) for row in summaries) * _KIB),
        dram_bytes=round(total("dram_memory_used") * _KIB),
        flash_bytes=round((total("on_chip_flash_memory_used") + total("off_chip_flash_memory_used")) * _KIB),
        macs=round(total("nn_macs")),
        bandwidth_bytes={
            part: total(f"{part}_total_bytes") for part in ("sram", "dram", "on_chip_flash", "off_chip_flash")
        },
        operators=tuple(
            OperatorEstimate(
                name=row["Name"],
                kind=row["NNG Operator"],
                cycles=round(float(row["Op Cycles"])),
                macs=int(row["MAC Count"]),
            )
            for _, rows in reports
            for row in rows
        ),
    )


def _spec(accelerator: str, system_config: str | None, memory_mode: str | None) -> Any:
    try:
        from ethosu.vela import vela  # noqa: F401  # the import says whether the compiler is there
        from executorch.backends.arm.ethosu import EthosUCompileSpec
    except ImportError as error:
        raise BackendUnavailable(f"compiling for {accelerator} needs Vela ({error}): {EXTRA}") from error
    try:
        return EthosUCompileSpec(accelerator, system_config, memory_mode, extra_flags=["--verbose-performance"])
    except (RuntimeError, ValueError) as error:
        raise BuildError(f"{accelerator} cannot be compiled for: {error}; correct the profile") from error


def _lowered(graph: Any, job: Job, spec: Any) -> Any:
    from executorch.backends.arm.ethosu import EthosUPartitioner
    from executorch.backends.arm.quantizer import EthosUQuantizer, get_symmetric_quantization_config

    quantizer = EthosUQuantizer(spec)
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    try:
        return lower(quantised_pt2e(graph, quantizer, job.samples), job.laid_out, EthosUPartitioner(spec))
    except SystemExit as error:  # Vela's way to refuse a configuration
        raise BuildError(f"Vela refuses {spec.compiler_flags}; correct the profile's options") from error


def _reports(folder: Path, programs: list[Path], spec: Any) -> list[tuple[dict[str, str], list[dict[str, str]]]]:
    """Return Vela's summary and operations of each program; it keeps the last one's, so several are compiled anew."""
    if len(programs) == 1:
        return [_report(folder / "output")]
    return [_compiled(program, folder / f"report-{program.stem}", spec) for program in programs]


def _compiled(program: Path, output: Path, spec: Any) -> tuple[dict[str, str], list[dict[str, str]]]:
    from ethosu.vela import vela

    vela.main([*spec.compiler_flags, f"--output-dir={output}", str(program)])
    return _report(output)


def _report(folder: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    (summary,) = folder.glob("*_summary_*.csv")
    (operators,) = folder.glob("*_per-layer.csv")
    return next(_rows(summary)), list(_rows(operators))


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def _bound(compiled: Compiled, arrays: tuple[Array, ...]) -> Bound:
    tensors = tuple(map(torch.from_numpy, arrays))
    latest: list[object] = [()]

    def run() -> None:
        with quietly(), torch.no_grad():
            latest[0] = _run(compiled, tensors)

    return Bound(run, lambda: flattened(latest[0]))


def _run(compiled: Compiled, inputs: Inputs) -> object:
    """Run the lowered graph with the reference model in the place of the NPU."""
    import tosa_reference_model as reference
    from executorch.exir.delegate import executorch_call_delegate

    program = compiled.program

    class OnReference(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is not executorch_call_delegate:
                return super().call_function(target, args, kwargs)
            tosa = compiled.tosa[_tag(args[0].original_module.graph_module)]
            arrays, status = reference.run(tosa, [each.contiguous().numpy() for each in args[1:]])
            if status != reference.GraphStatus.TOSA_VALID:
                raise BuildError(f"Arm's reference model refuses the TOSA program: {status}; report the model")
            return [torch.from_numpy(array.copy()) for array in arrays]

    constants = [program.state_dict.get(name, program.constants.get(name)) for name in _lifted(program)]
    return OnReference(program.graph_module).run(*constants, *inputs)


def _tag(part: Any) -> str:
    return str(next(tag for node in part.graph.nodes if (tag := node.meta.get("delegation_tag"))))


def _lifted(program: Any) -> list[str]:
    """Return the names of the weights that the graph takes as its first inputs; most went into the delegates."""
    return [each.target for each in program.graph_signature.input_specs if each.target is not None]
