"""What a compiler says about a device that is not here: an estimate, never a measurement, and never mixed with one."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat

__all__ = ["Estimate", "OperatorEstimate"]

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class OperatorEstimate(BaseModel):
    """One operation of the compiled network, as the compiler names it: cycles, and multiply-accumulates."""

    model_config = _STRICT

    name: str
    kind: str
    cycles: NonNegativeInt
    macs: NonNegativeInt


class Estimate(BaseModel):
    """The compiler's own performance model of one inference; nothing ran, and `ratio` does not take it.

    `bound_cycles` are the cycles that each part of the device alone would need, by its name. Memory is what the network
    occupies: activations in SRAM, and weights where the memory mode puts them.
    """

    model_config = _STRICT

    schema_version: Literal[1] = 1
    kind: Literal["compiler's estimate"] = "compiler's estimate"
    compiler: str
    accelerator: str
    system_config: str
    memory_mode: str
    clock_hz: PositiveFloat
    latency_s: PositiveFloat
    cycles: NonNegativeInt
    bound_cycles: dict[str, NonNegativeInt]
    sram_bytes: NonNegativeInt
    dram_bytes: NonNegativeInt
    flash_bytes: NonNegativeInt
    macs: NonNegativeInt
    bandwidth_bytes: dict[str, NonNegativeFloat]
    operators: tuple[OperatorEstimate, ...]
