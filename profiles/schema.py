"""What a profile file may say: a device, a runtime and a dtype, and what each width and structure is worth there."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import date
from typing import Annotated, Literal, Self

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, Field, model_validator

Confidence = Literal["documented", "source", "published", "computed", "measured-here", "inferred", "folklore"]
Op = Literal["conv1d", "conv2d", "grouped_conv2d", "depthwise_conv2d", "linear", "matmul"]
Axis = Literal["out_channels", "in_channels", "hidden", "heads", "head_dim", "tokens", "spatial"]
Mode = Literal["pad", "tile", "cliff", "reject"]
Kind = Literal[
    "filters", "in_channels", "kernel_shape", "depth", "heads", "hidden", "block", "nm_sparsity", "unstructured"
]
Number = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8", "int4"]

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
ProfileId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*\.[a-z0-9][a-z0-9_-]*\.[a-z0-9][a-z0-9_-]*$")]
Count = Annotated[int, Field(ge=1, strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
SourceIds = Annotated[tuple[Name, ...], Field(min_length=1)]

UNPROVEN: frozenset[str] = frozenset({"inferred", "folklore"})  # good for breaking ties, never for forbidding a width


class Part(BaseModel):
    """A table of a profile file: unknown keys are refused and nothing changes after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Cited(Part):
    """A statement with its evidence."""

    confidence: Confidence
    """Where the number comes from; `inferred` and `folklore` may only break ties."""
    sources: SourceIds
    """Ids of the [[source]] entries that state it."""
    note: Text | None = None
    """What a reader must know before trusting the number."""


class Granularity(Cited):
    """How one axis of one operator is rounded by the device."""

    op: Op
    axis: Axis
    when: Text | None = None
    """The condition in words, for people; it is not evaluated."""
    quantum: Count
    """Widths that are multiples of it are not rounded."""
    at_least: Count = 1
    """The rule holds from this width on; smaller widths are neither rounded nor punished."""
    mode: Mode
    """pad: work is rounded up. tile: the tail of a tile is partly paid. cliff: another kernel. reject: leaves the
    accelerator."""
    alpha: Annotated[float, Field(ge=0, le=1, strict=True)] | None = None
    """Share of the rounding that is paid for; absent means unknown, which is not zero."""
    preferred: Count | None = None
    """A larger, soft quantum."""
    penalty: Annotated[float, Field(gt=1, strict=True, allow_inf_nan=False)] | None = None
    """Time beside a cliff over time on it; only for a cliff."""
    fallback: Text | None = None
    """What runs instead beside a cliff or after a rejection."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        jumps = self.mode in ("cliff", "reject")
        if self.mode == "cliff" and self.fallback is None:
            raise ValueError("a cliff needs `fallback`: say what runs instead")
        if not jumps and self.fallback is not None:
            raise ValueError(f"`fallback` is for mode cliff or reject, not {self.mode}")
        if self.mode != "cliff" and self.penalty is not None:
            raise ValueError(f"`penalty` is for mode cliff, not {self.mode}")
        if jumps and self.alpha is not None:
            raise ValueError(f"`alpha` is for mode pad or tile, not {self.mode}: nothing is rounded there")
        if jumps and self.confidence in UNPROVEN:
            raise ValueError(f"confidence {self.confidence} may only break ties; mode {self.mode} needs evidence")
        if self.preferred is not None and (self.preferred <= self.quantum or self.preferred % self.quantum):
            raise ValueError(f"`preferred` {self.preferred} is not a larger multiple of the quantum {self.quantum}")
        return self

    def effective(self, n: int) -> tuple[float, float]:
        """Return the lowest and the highest width that a width of `n` may cost.

        ANNETTE (Wess et al. 2021): n_eff = (1 - a) n + a ceil(n / q) q. Without alpha the two are a = 0 and a = 1.
        Cliffs and rejections do not round, so there both are n.
        """
        assert n >= 0, n
        if self.mode in ("cliff", "reject") or n < self.at_least:
            return float(n), float(n)
        low, high = (0.0, 1.0) if self.alpha is None else (self.alpha, self.alpha)
        rounded = math.ceil(n / self.quantum) * self.quantum
        return (1 - low) * n + low * rounded, (1 - high) * n + high * rounded


class Structure(Cited):
    """Whether removing one kind of group makes the runtime faster."""

    kind: Kind
    pattern: Text | None = None
    """Which pattern of the kind; "n:m" for nm_sparsity."""
    pays: Literal["yes", "no", "conditional", "unknown"]
    requires: tuple[Text, ...] = ()
    """The conditions in words, when it pays only under some."""
    speedup: tuple[Positive, Positive] | None = None
    """Lowest and highest dense time over sparse time that were published."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.pays == "conditional") != bool(self.requires):
            raise ValueError(f"`requires` lists the conditions if and only if pays = 'conditional', not {self.pays!r}")
        if self.kind == "nm_sparsity" and not re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.pattern or ""):
            raise ValueError(f"nm_sparsity needs a `pattern` such as '2:4', not {self.pattern!r}")
        if self.speedup is not None and self.speedup[0] > self.speedup[1]:
            raise ValueError(f"`speedup` is [lowest, highest], not {list(self.speedup)}")
        return self


class Peak(Cited):
    """What the device computes at best."""

    ops_per_s: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z0-9]+_(dense|sparse)$")], Positive], Field(min_length=1)
    ]
    """Operations per second by `<dtype>_dense` or `<dtype>_sparse`; a sparse peak is never used as a dense one."""
    units: Count | None = None
    """Parallel compute units (SMs, cores) that together reach it."""
    condition: Text | None = None
    """Clock, power mode and part to which it belongs."""


class Memory(Cited):
    """One memory of the device."""

    name: Name
    on_chip: Annotated[bool, Field(strict=True)]
    capacity_bytes: Count | None = None
    bandwidth_bytes_per_s: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.capacity_bytes is None and self.bandwidth_bytes_per_s is None:
            raise ValueError("state `capacity_bytes`, `bandwidth_bytes_per_s`, or both")
        return self


class Match(Part):
    """How the device is recognised from the machine that carries it; empty if it cannot be."""

    archspec: Text | None = None
    """A microarchitecture of archspec that the CPU must be or descend from, such as x86_64_v4."""
    features: tuple[Text, ...] = ()
    """CPU flags that must all be present."""
    cuda_cc: tuple[Count, Annotated[int, Field(ge=0, strict=True)]] | None = None
    """CUDA compute capability, such as [8, 0]."""
    cuda_name: Text | None = None
    """A part of the device's name as nvidia-smi prints it."""

    @property
    def wants_cuda(self) -> bool:
        """Whether a CUDA device is asked for."""
        return self.cuda_cc is not None or self.cuda_name is not None


class Device(Part):
    """The silicon."""

    vendor: Text
    kind: Literal["cpu", "gpu", "npu", "dsp"]
    arch: Text
    match: Match = Match()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "cpu" and self.match.archspec is None:
            raise ValueError("a cpu needs match.archspec, a name of archspec.cpu.TARGETS such as 'x86_64_v3'")
        return self


class Runtime(Part):
    """The software that runs the model."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name of the backend: onnxruntime, openvino, executorch, tensorrt, pytorch, or a new one."""
    versions: Text | None = None
    """Versions for which the numbers hold: PEP 440 specifiers, alternatives joined by "||"."""
    layout: Text | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            list(self._alternatives())
        except InvalidSpecifier as error:
            raise ValueError(f"`versions` is not a PEP 440 specifier such as '>=1.20,<2': {error}") from None
        return self

    def _alternatives(self) -> Iterator[SpecifierSet]:
        return (SpecifierSet(text.strip()) for text in (self.versions or "").split("||"))

    def accepts(self, version: str) -> bool:
        """Say whether the numbers hold for this installed version; a version that PEP 440 cannot read is none."""
        try:
            parsed = Version(version)
        except InvalidVersion:
            return False
        return any(allowed.contains(parsed, prereleases=True) for allowed in self._alternatives())


class Dtype(Part):
    """The number formats of the compiled model."""

    weights: Number
    activations: Number


class Source(Part):
    """Where a number was read: a page, or a file of a repository at a commit."""

    id: Name
    url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    repo: Annotated[str, Field(pattern=r"^[^/\s]+(/[^/\s]+)+$")] | None = None
    path: Text | None = None
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")] | None = None
    lines: Text | None = None
    quote: Text
    """The words that state the number, short and verbatim where the source has words."""
    retrieved: date

    @model_validator(mode="after")
    def _check(self) -> Self:
        place = (self.repo, self.path, self.commit)
        at_url, at_commit = self.url is not None, all(place)
        if at_url == at_commit or (at_url and (any(place) or self.lines)):
            raise ValueError("give either `url`, or `repo`, `path` and `commit` (and `lines`)")
        return self


class Profile(Part):
    """One device, runtime and dtype: what widths are rounded to, which structures pay, and who says so."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    id: ProfileId
    """`<part>.<runtime>.<dtype>`, also the file's name."""
    extends: tuple[Text, ...] = ()
    """Ids of the files whose tables this one starts from."""
    status: Literal["confirmed", "experimental", "fitted-elsewhere"] = "confirmed"
    """confirmed: vendor text or the runtime's own source. experimental: rests on inference."""
    note: Text | None = None
    device: Device
    runtime: Runtime
    dtype: Dtype
    granularity: tuple[Granularity, ...] = ()
    structure: tuple[Structure, ...] = ()
    peak: Peak | None = None
    memory: tuple[Memory, ...] = ()
    source: tuple[Source, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse_duplicates("granularity (op, axis, when)", ((g.op, g.axis, g.when) for g in self.granularity))
        _refuse_duplicates("structure (kind, pattern)", ((s.kind, s.pattern) for s in self.structure))
        _refuse_duplicates("memory name", (m.name for m in self.memory))
        _refuse_duplicates("source id", (s.id for s in self.source))
        defined = {source.id for source in self.source}
        cited = {name for statement in self.cited() for name in statement.sources}
        if missing := sorted(cited - defined):
            raise ValueError(f"cites undefined sources {', '.join(missing)}; add a [[source]] for each")
        if unused := sorted(defined - cited):
            raise ValueError(f"defines sources that nothing cites: {', '.join(unused)}; cite or remove them")
        return self

    def cited(self) -> tuple[Cited, ...]:
        """Return every statement that needs evidence."""
        peak = () if self.peak is None else (self.peak,)
        return (*self.granularity, *self.structure, *peak, *self.memory)

    def rules(self, op: str, axis: str) -> tuple[Granularity, ...]:
        """Return the rounding rules for one axis of one operator, in file order; empty if nothing is known."""
        return tuple(rule for rule in self.granularity if (rule.op, rule.axis) == (op, axis))

    def quantum(self, op: str, axis: str) -> int:
        """Return the largest quantum of the rules that are not folklore, 1 if there is none."""
        return max((rule.quantum for rule in self.rules(op, axis) if rule.confidence != "folklore"), default=1)

    def pays(self, kind: str) -> Structure | None:
        """Return what is known about removing structures of this kind; the first pattern if there are several."""
        return next((structure for structure in self.structure if structure.kind == kind), None)


def _refuse_duplicates(what: str, keys: Iterable[object]) -> None:
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"{what} appears twice: {', '.join(map(str, twice))}; keep one")
