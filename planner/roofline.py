"""Latency from documented rules alone: the work and the bytes that a device rounds each operation up to.

For each operation, as in the roofline model (Williams et al. 2009),

    seconds = penalty × max(rounded multiply-accumulates / peak, elements written / rate, bytes / bandwidth of each
              memory) + elements added / rate + launch

with peak, rates, bandwidths and launch as the profile states them, or else as is typical for its kind of device: then
only ratios have meaning, and on a CPU the activations beyond what a cache holds have a bandwidth of their own. Beside a
cliff another kernel runs, which rounds nothing and takes the stated penalty, and its data are converted on the way in
and out; otherwise the penalty is 1. Where the profile does not say how much of a rounding is paid, the answer is a
range. Rules that are folklore or inferred round nothing.
"""

from dataclasses import dataclass
from math import inf
from statistics import fmean

from planner.graph import Graph
from planner.operations import Choice, Operation
from profiles import Profile
from profiles.evidence import UNPROVEN
from profiles.schema import Granularity, Structure


@dataclass(frozen=True)
class Balance:
    """What a device does in a second at best."""

    macs_per_s: float
    activation_bytes_per_s: float
    weight_bytes_per_s: float
    apart: bool  # weights and activations come from different memories, so that one does not wait for the other
    launch_s: float  # per operation
    outputs_per_s: float = inf  # elements that it writes; inf where that is never waited for
    additions_per_s: float = inf  # elements of two tensors that it adds
    cache_bytes: float = inf  # of activations that an operation moves at their speed; those beyond take their own
    beyond_bytes_per_s: float = inf


# Typical for a kind of device, where the profile is silent. A CPU: one core of an AMD EPYC (Zen 4) in ONNX Runtime 1.31
# takes 43 us for a 3x3 convolution of 2.36 million multiply-accumulates, and some 2 us for the smallest operation; by
# OpenVINO's own clock 1x1 convolutions that move 9.6 MB (8 to 16 channels of 8x112x112) take 0.4 ms, of 45 MB (16 to
# 96) 5.0 ms.
# A GPU: an A100 (312 fp16 Tflop/s and 2.0 TB/s, see nvidia-a100.cublas.fp16), with some 5 us from launch to launch.
# An NPU or DSP: an Ethos-U55-128 (128 per cycle at 500 MHz, 4 GB/s, see ethos-u55-128.vela.int8).
TYPICAL = {
    "cpu": Balance(55e9, 20e9, 20e9, False, 2e-6, cache_bytes=8e6, beyond_bytes_per_s=8e9),
    "gpu": Balance(156e12, 2e12, 2e12, False, 5e-6),
    "npu": Balance(64e9, 4e9, 4e9, False, 0.0),
    "dsp": Balance(64e9, 4e9, 4e9, False, 0.0),
}
BYTES = {"fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
BESIDE = 1.5  # time beside a cliff whose penalty is not stated anywhere in the profile; no source: between none and 2
EXPECTED_ERROR = 0.1  # of a ratio; mean over random pruned networks in ONNX Runtime and OpenVINO on one AVX-512 core
REJECTED = 10.0  # time after leaving the accelerator; no source: large, so that it is never predicted to pay


@dataclass(frozen=True)
class Load:
    """What one operation asks of a device."""

    macs: float  # after rounding, as bytes are
    activation_bytes: float
    weight_bytes: float
    written: float  # elements, before what is fused behind
    added: float  # elements of two tensors, behind it
    copied_bytes: float  # of inputs that are selected first, by a launch of its own
    converted_bytes: float  # whose layout is changed before and after; once, as a neighbour may be beside a cliff too
    penalty: float  # time over that of the usual kernel: more than 1 beside a cliff

    @property
    def beside(self) -> bool:
        """Whether another kernel runs than the usual one."""
        return self.converted_bytes > 0


def balance(profile: Profile) -> Balance:
    """Return what a device does in a second: as its profile states, and else as is typical for its kind."""
    typical = TYPICAL[profile.device.kind]
    ops = profile.peak.ops_per_s.get(f"{profile.dtype.activations}_dense") if profile.peak else None
    speeds = [(m.on_chip, m.bandwidth_bytes_per_s) for m in profile.memory if m.bandwidth_bytes_per_s]
    near = max((speed for on_chip, speed in speeds if on_chip), default=None)
    far = max((speed for on_chip, speed in speeds if not on_chip), default=None)
    launches = [overhead.latency_s for overhead in profile.overhead if overhead.per == "operation"]
    return Balance(
        macs_per_s=ops / 2 if ops else typical.macs_per_s,
        cache_bytes=inf if near or far else typical.cache_bytes,
        beyond_bytes_per_s=typical.beyond_bytes_per_s,
        activation_bytes_per_s=near or far or typical.activation_bytes_per_s,
        weight_bytes_per_s=far or near or typical.weight_bytes_per_s,
        apart=near is not None and far is not None,
        launch_s=min(launches, default=typical.launch_s),
        outputs_per_s=(profile.peak.outputs_per_s if profile.peak else None) or inf,
        additions_per_s=(profile.peak.additions_per_s if profile.peak else None) or inf,
    )


class Rules:
    """Costs from a profile's documented rules alone, in seconds of a device at its peak: only ratios have meaning."""

    overhead_s = 0.0
    reloads = ()

    def __init__(self, profile: Profile) -> None:
        """Take the granularity, peaks, bandwidths and overheads of `profile`."""
        self._profile = profile
        self.moves_strides = profile.moves_strides
        self.balance = balance(profile)
        stated = [r.penalty for r in profile.granularity if r.penalty is not None and r.confidence not in UNPROVEN]
        self._beside = max(stated, default=BESIDE)
        self._found: dict[tuple[str, tuple[int, ...], str], tuple[Granularity, ...]] = {}

    @property
    def weight_bytes(self) -> float:
        """How many bytes a weight takes."""
        return BYTES[self._profile.dtype.weights]

    def cost(self, operation: Operation, inputs: int, outputs: int) -> float:
        """Return what an operation is expected to add."""
        return self.seconds(self.load(operation, inputs, outputs))

    def whole_s(self, graph: Graph) -> None:
        """Return None: nothing is known of any whole network."""

    def latency(self, graph: Graph, choice: Choice) -> float:
        """Return what one run under `choice` is expected to take."""
        return sum(self.cost(*made) for made in graph.under(choice, strides=self.moves_strides))

    def fractions(self, graph: Graph, choice: Choice) -> tuple[float, float]:
        """Return the lowest and the highest fraction of the dense latency that the rules allow.

        All that is unknown is paid in full or not at all, in the dense network as in the smaller one.
        """
        found = [self._total(graph, choice, paid) / self._total(graph, graph.dense, paid) for paid in (0.0, None, 1.0)]
        return min(found), max(found)

    def _total(self, graph: Graph, choice: Choice, paid: float | None) -> float:
        under = graph.under(choice, strides=self.moves_strides)
        return sum(self.seconds(self.load(*made, paid=paid)) for made in under)

    def seconds(self, load: Load) -> float:
        """Return how long a load takes."""
        at = self.balance
        spilled = max(0.0, load.activation_bytes - at.cache_bytes)
        held = load.activation_bytes - spilled
        activations = held / at.activation_bytes_per_s + spilled / at.beyond_bytes_per_s
        weights = load.weight_bytes / at.weight_bytes_per_s
        moved = max(activations, weights) if at.apart else activations + weights
        converted = load.converted_bytes / at.activation_bytes_per_s
        busy = max(load.macs / at.macs_per_s, load.written / at.outputs_per_s, moved)
        copied = load.copied_bytes / at.activation_bytes_per_s + at.launch_s if load.copied_bytes else 0.0
        return load.penalty * busy + converted + copied + load.added / at.additions_per_s + at.launch_s

    def load(self, operation: Operation, inputs: int, outputs: int, *, paid: float | None = None) -> Load:
        """Return what an operation asks of the device; `paid` is the share of a rounding where that is unknown.

        None: all of it where work is padded, half of it in a tile.
        """
        penalty = self._penalty(operation, inputs, outputs, paid)
        wide, deep = float(outputs), float(inputs)
        if penalty is None:
            wide = self._rounded(operation, "out_channels", outputs, paid)
            deep = self._rounded(operation, "in_channels", inputs, paid)
        pairs = wide if operation.grouped else wide * deep
        dtype = self._profile.dtype
        additions = operation.additions if operation.macs_per_pair else 0
        elements = operation.moved_per_output * wide / (1 + additions)
        moved = BYTES[dtype.activations] * (operation.read_per_input * deep + operation.moved_per_output * wide)
        return Load(
            macs=operation.macs_per_pair * pairs * self._computed(operation, paid),
            activation_bytes=moved,
            weight_bytes=BYTES[dtype.weights] * operation.weights_per_pair * pairs,
            written=elements,
            added=elements * additions,
            copied_bytes=2 * BYTES[dtype.activations] * operation.copied_per_input * inputs,
            converted_bytes=0.0 if penalty is None else moved,
            penalty=penalty or 1.0,
        )

    def _computed(self, operation: Operation, paid: float | None) -> float:
        """Return the share of the multiply-accumulates that is waited for where n of every m weights are kept.

        From both peaks, or the speed-up that was published, if the profile states them; else between n / m and 1, as
        nobody says how near to its peak a device comes. 1 where the pattern does not pay.
        """
        known = self._pattern(operation.pattern) if operation.sparse else None
        if known is None:
            return 1.0
        n, m = map(int, operation.pattern.split(":"))
        low, high = (1 / known.speedup[1], 1 / known.speedup[0]) if known.speedup else (n / m, 1.0)
        ops, number = (self._profile.peak.ops_per_s if self._profile.peak else {}), self._profile.dtype.activations
        if f"{number}_dense" in ops and f"{number}_sparse" in ops:
            low = high = ops[f"{number}_dense"] / ops[f"{number}_sparse"]
        return low + (high - low) * (0.5 if paid is None else paid)

    def _pattern(self, pattern: str) -> Structure | None:
        found = (own for own in self._profile.structure if own.kind == "nm_sparsity" and own.pattern == pattern)
        return next((own for own in found if own.pays in ("yes", "conditional")), None)

    def alignment(self, operation: Operation, inputs: int, outputs: int) -> str:
        """Return of which of the quanta that the profile states the widths are multiples, a sign for each.

        "+" is a multiple, "-" is not, and "." is no width that the rule is about.
        """
        rules = {
            (r.quantum, r.at_least, r.at_most): r
            for axis in ("out_channels", "in_channels")
            for r in self._rules(operation, axis)
        }
        return "".join(
            "." if not r.about(n) else "-" if n % r.quantum else "+" for n in (outputs, inputs) for r in rules.values()
        )

    def _rules(self, operation: Operation, axis: str) -> tuple[Granularity, ...]:
        """Return the rules of an axis that have evidence; none for groups, whose own widths are never cut."""
        key = (operation.kind, operation.kernel, axis)
        if key not in self._found:
            grouped = operation.kind.startswith("grouped_")
            self._found[key] = () if grouped else self._profile.proven(operation.kind, axis, operation.kernel)
        return self._found[key]

    def _rounded(self, operation: Operation, axis: str, n: int, paid: float | None) -> float:
        """Return the width that is paid for: the mean over rules, as which of them holds is in words."""
        found = []
        for rule in self._rules(operation, axis):
            if rule.mode in ("pad", "tile") and rule.about(n):
                low, high = rule.effective(n)
                share = paid if paid is not None else 1.0 if rule.mode == "pad" else 0.5
                found.append(low + share * (high - low))
        return fmean(found) if found else float(n)

    def _penalty(self, operation: Operation, inputs: int, outputs: int, paid: float | None) -> float | None:
        """Return the time beside a cliff over that on it, None on it."""
        worst: float | None = None
        for axis, n in (("out_channels", outputs), ("in_channels", inputs)):
            for rule in self._rules(operation, axis):
                if rule.mode in ("cliff", "reject") and rule.about(n) and n % rule.quantum:
                    unknown = {0.0: 1.0, 1.0: max(self._beside, 2.0)}.get(-1.0 if paid is None else paid, self._beside)
                    own = REJECTED if rule.mode == "reject" else rule.penalty or unknown
                    worst = max(worst or 0.0, own)
        return worst
