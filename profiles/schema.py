"""What a profile file may say: a device, a runtime and a dtype, and what each width and structure is worth there."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal, Self

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import Field, model_validator

from profiles.evidence import UNPROVEN, Cited, Count, Name, Part, Positive, Source, Text

Op = Literal["conv1d", "conv2d", "grouped_conv2d", "depthwise_conv2d", "linear", "matmul"]
Axis = Literal["out_channels", "in_channels", "hidden", "heads", "head_dim", "tokens", "spatial"]
Mode = Literal["pad", "tile", "cliff", "reject"]
Kind = Literal[
    "filters", "in_channels", "kernel_shape", "depth", "heads", "hidden", "block", "nm_sparsity", "unstructured"
]
Number = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8", "int4"]

ProfileId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*\.[a-z0-9][a-z0-9_-]*\.[a-z0-9][a-z0-9_-]*$")]
Capability = tuple[Count, Annotated[int, Field(ge=0, strict=True)]]


class Granularity(Cited):
    """How one axis of one operator is rounded by the device."""

    op: Op
    axis: Axis
    when: Text | None = None
    """The condition in words, for people; it is not evaluated."""
    kernel: Annotated[str, Field(pattern=r"^\d+(x\d+)*$")] | None = None
    """The kernel that the rule is about, such as 1x1; there it takes the place of the rules of that mode for any
    kernel."""
    quantum: Count
    """Widths that are multiples of it are not rounded."""
    at_least: Count = 1
    """The rule holds from this width on; smaller widths are neither rounded nor punished by it."""
    at_most: Count | None = None
    """The rule holds up to this width."""
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
            raise ValueError("a cliff needs `fallback`; say what runs instead")
        if not jumps and self.fallback is not None:
            raise ValueError(f"`fallback` is for mode cliff or reject, not {self.mode}; remove it or correct the mode")
        if self.mode != "cliff" and self.penalty is not None:
            raise ValueError(f"`penalty` is for mode cliff, not {self.mode}; remove it or correct the mode")
        if jumps and self.alpha is not None:
            raise ValueError(f"`alpha` is for mode pad or tile, not {self.mode}: nothing is rounded there; remove it")
        if jumps and self.confidence in UNPROVEN:
            raise ValueError(
                f"confidence {self.confidence} may only break ties, and mode {self.mode} forbids widths; "
                "find a source, or use mode tile"
            )
        if self.at_most is not None and self.at_most < max(self.at_least, self.quantum):
            raise ValueError(
                f"`at_most` {self.at_most} is below the quantum {self.quantum} or `at_least` {self.at_least}: the rule "
                "holds for no width; correct them"
            )
        if self.preferred is not None and (self.preferred <= self.quantum or self.preferred % self.quantum):
            raise ValueError(
                f"`preferred` {self.preferred} is not a larger multiple of the quantum {self.quantum}; correct either"
            )
        return self

    def about(self, n: int) -> bool:
        """Whether the rule holds for a width of `n`."""
        return n >= self.at_least and (self.at_most is None or n <= self.at_most)

    def effective(self, n: int) -> tuple[float, float]:
        """Return the lowest and the highest width that a width of `n` may cost.

        ANNETTE (Wess et al. 2021): n_eff = (1 - a) n + a ceil(n / q) q. Without alpha the two are a = 0 and a = 1.
        Cliffs and rejections do not round, so there both are n.
        """
        assert n >= 0, n
        if self.mode in ("cliff", "reject") or not self.about(n):
            return float(n), float(n)
        low, high = (0.0, 1.0) if self.alpha is None else (self.alpha, self.alpha)
        rounded = math.ceil(n / self.quantum) * self.quantum
        return (1 - low) * n + low * rounded, (1 - high) * n + high * rounded


class Where(Part):
    """Conditions of a structure that can be checked on a layer."""

    ops: tuple[Op, ...] = ()
    """Operators for which it holds; all if there are none."""
    multiples: dict[Axis, Count] = Field(default_factory=dict)
    """Axes that must be a multiple of a number."""
    at_least: dict[Axis, Count] = Field(default_factory=dict)
    """Axes that must be at least so wide."""

    def fits(self, axis: Axis, n: int) -> bool:
        """Say whether an axis may be so wide."""
        return n % self.multiples.get(axis, 1) == 0 and n >= self.at_least.get(axis, 1)


class Structure(Cited):
    """Whether removing one kind of group makes the runtime faster."""

    kind: Kind
    pattern: Text | None = None
    """Which pattern of the kind; "n:m" for nm_sparsity."""
    pays: Literal["yes", "no", "conditional", "unknown"]
    requires: tuple[Text, ...] = ()
    """The conditions in words, when it pays only under some."""
    where: Where | None = None
    """Those of the conditions that can be checked; without it, only a forced plan relies on the words."""
    speedup: tuple[Positive, Positive] | None = None
    """Lowest and highest dense time over sparse time that were published."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.pays == "conditional") != bool(self.requires):
            raise ValueError(
                f"`requires` lists the conditions if and only if pays = 'conditional', not {self.pays!r}; "
                "correct either"
            )
        if self.where is not None and not self.requires:
            raise ValueError("`where` says in numbers what `requires` says in words, which is empty; add it")
        if self.kind == "nm_sparsity" and not re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.pattern or ""):
            raise ValueError(f"nm_sparsity needs a `pattern`, not {self.pattern!r}; write it like '2:4'")
        if self.speedup is not None and self.speedup[0] > self.speedup[1]:
            raise ValueError(f"`speedup` {list(self.speedup)} falls; write [lowest, highest]")
        return self


class Peak(Cited):
    """What the device computes at best."""

    ops_per_s: Annotated[
        dict[Annotated[str, Field(pattern=r"^[a-z0-9]+_(dense|sparse)$")], Positive], Field(min_length=1)
    ]
    """Operations per second by `<dtype>_dense` or `<dtype>_sparse`; a sparse peak is never used as a dense one."""
    outputs_per_s: Positive | None = None
    """Elements that a layer writes per second at best, for which one of few operations per element waits."""
    additions_per_s: Positive | None = None
    """Elements of two tensors that it adds per second at best, where that is an operation of its own."""
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
    spills_to: Name | None = None
    """The memory that holds what does not fit; its bandwidth is then the cost."""
    spill_penalty: Annotated[float, Field(gt=1, strict=True, allow_inf_nan=False)] | None = None
    """Time past the capacity over time within it, where that was published."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.capacity_bytes is None and self.bandwidth_bytes_per_s is None:
            raise ValueError("holds no number; state `capacity_bytes`, `bandwidth_bytes_per_s`, or both")
        if self.spills_to == self.name:
            raise ValueError(f"`spills_to` is the memory {self.name!r} itself; name another one")
        return self


class Overhead(Cited):
    """Time that is spent before any work is done."""

    per: Literal["operation", "inference"]
    """operation: for every one that is launched. inference: once for each run of the model."""
    latency_s: Positive
    condition: Text | None = None
    """How it was launched, on which part."""


class Rewrite(Cited):
    """What the runtime's compiler changes in a network, so that layers cost something else than they would alone."""

    kind: Literal["strides"]
    """strides: that of a 1x1 convolution moves to what makes its input, where nothing else reads that."""


class Match(Part):
    """How the device is recognised from the machine that carries it; empty if it cannot be."""

    archspec: Text | None = None
    """A microarchitecture of archspec that the CPU must be or descend from, such as x86_64_v4."""
    features: tuple[Text, ...] = ()
    """CPU flags that must all be present."""
    cuda_cc: Capability | None = None
    """CUDA compute capability, such as [8, 0]."""
    cuda_cc_from: Capability | None = None
    """The lowest compute capability of a family."""
    cuda_cc_to: Capability | None = None
    """The highest compute capability of a family."""
    cuda_name: Text | None = None
    """A part of the device's name as nvidia-smi prints it."""
    device_tree: Text | None = None
    """A `compatible` string of the board's device tree, such as rockchip,rk3588."""
    accelerator: Text | None = None
    """The kernel driver of an accelerator, such as intel_vpu."""
    os: Literal["Linux", "Darwin", "Windows"] | None = None
    """The operating system, as Python's platform.system() names it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cuda_cc is not None and (self.cuda_cc_from or self.cuda_cc_to):
            raise ValueError("`cuda_cc` is one capability and `cuda_cc_from`, `cuda_cc_to` a family; give one of both")
        return self

    @property
    def wants_cuda(self) -> bool:
        """Whether a CUDA device is asked for."""
        return any((self.cuda_cc, self.cuda_cc_from, self.cuda_cc_to, self.cuda_name))

    def has_capability(self, found: tuple[int, int]) -> bool:
        """Say whether a CUDA device of this compute capability is the one or of the family that is asked for."""
        low = self.cuda_cc or self.cuda_cc_from or (0, 0)
        high = self.cuda_cc or self.cuda_cc_to or found
        return low <= found <= high


class Device(Part):
    """The silicon."""

    vendor: Text
    kind: Literal["cpu", "gpu", "npu", "dsp"]
    arch: Text
    match: Match = Match()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "cpu" and self.match.archspec is None:
            raise ValueError("a cpu needs match.archspec; give a name of archspec.cpu.TARGETS such as 'x86_64_v3'")
        return self


class Runtime(Part):
    """The software that runs the model."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name of the backend: onnxruntime, openvino, executorch, tensorrt, pytorch, or a new one."""
    versions: Text | None = None
    """Versions for which the numbers hold: PEP 440 specifiers, alternatives joined by "||"."""
    layout: Text | None = None
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """What the backend is told beside the number format, e.g. the system configuration of a compiler."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            list(self._alternatives())
        except InvalidSpecifier as error:
            raise ValueError(f"`versions` is no PEP 440 specifier ({error}); write it like '>=1.20,<2'") from None
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
    rewrite: tuple[Rewrite, ...] = ()
    peak: Peak | None = None
    memory: tuple[Memory, ...] = ()
    overhead: tuple[Overhead, ...] = ()
    source: tuple[Source, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        _refuse_duplicates("granularity (op, axis, when)", ((g.op, g.axis, g.when) for g in self.granularity))
        _refuse_duplicates("structure (kind, pattern)", ((s.kind, s.pattern) for s in self.structure))
        _refuse_duplicates("rewrite kind", (r.kind for r in self.rewrite))
        _refuse_duplicates("memory name", (m.name for m in self.memory))
        _refuse_duplicates("overhead (per, condition)", ((o.per, o.condition) for o in self.overhead))
        _refuse_duplicates("source id", (s.id for s in self.source))
        self._check_sources()
        memories = {memory.name for memory in self.memory}
        if lost := sorted({memory.spills_to for memory in self.memory if memory.spills_to} - memories):
            raise ValueError(f"memory spills to the unknown {', '.join(lost)}; add a [[memory]] for it")
        return self

    def _check_sources(self) -> None:
        measured = {source.id for source in self.source if source.measurement is not None}
        defined = {source.id for source in self.source}
        cited = {name for statement in self.cited() for name in statement.sources}
        if missing := sorted(cited - defined):
            raise ValueError(f"cites undefined sources {', '.join(missing)}; add a [[source]] for each")
        if unused := sorted(defined - cited):
            raise ValueError(f"defines sources that nothing cites: {', '.join(unused)}; cite or remove them")
        for statement in self.cited():
            if (statement.confidence == "measured-here") != bool(measured & set(statement.sources)):
                raise ValueError(
                    f"a statement of confidence {statement.confidence!r} cites {', '.join(statement.sources)}; "
                    "measured-here needs a source with a `measurement`, and such a source needs measured-here"
                )

    def cited(self) -> tuple[Cited, ...]:
        """Return every statement that needs evidence."""
        peak = () if self.peak is None else (self.peak,)
        return (*self.granularity, *self.structure, *self.rewrite, *peak, *self.memory, *self.overhead)

    @property
    def moves_strides(self) -> bool:
        """Whether the compiler moves strides of 1x1 convolutions to what makes their inputs; a guess does not count."""
        return any(own.kind == "strides" and own.confidence not in UNPROVEN for own in self.rewrite)

    def rules(self, op: str, axis: str) -> tuple[Granularity, ...]:
        """Return the rounding rules for one axis of one operator, in file order; empty if nothing is known."""
        return tuple(rule for rule in self.granularity if (rule.op, rule.axis) == (op, axis))

    def proven(self, op: str, axis: str, kernel: Sequence[int] = ()) -> tuple[Granularity, ...]:
        """Return those with evidence that hold for a kernel, any if none is given; a guess must not forbid a width."""
        known = tuple(rule for rule in self.rules(op, axis) if rule.confidence not in UNPROVEN)
        if not kernel:
            return tuple(rule for rule in known if rule.kernel is None)
        own = [rule for rule in known if rule.kernel == "x".join(map(str, kernel))]
        special = {rule.mode for rule in own}
        return (*(rule for rule in known if rule.kernel is None and rule.mode not in special), *own)

    def quantum(self, op: str, axis: str, kernel: Sequence[int] = ()) -> int:
        """Return the largest quantum of these, 1 if there is none."""
        return max((rule.quantum for rule in self.proven(op, axis, kernel)), default=1)

    def pays(self, kind: str) -> Structure | None:
        """Return what is known about removing structures of this kind; the first pattern if there are several."""
        return next((structure for structure in self.structure if structure.kind == kind), None)


def _refuse_duplicates(what: str, keys: Iterable[object]) -> None:
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"{what} appears twice: {', '.join(map(str, twice))}; keep one")
