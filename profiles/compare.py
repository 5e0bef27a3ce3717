"""What a profile states, one fact a line, and where several profiles differ."""

from dataclasses import dataclass

from profiles.schema import Granularity, Memory, Overhead, Peak, Profile, Structure

UNKNOWN = "?"  # nothing is stated


@dataclass(frozen=True)
class Row:
    """One fact about several profiles."""

    field: str
    values: tuple[str, ...]  # one per profile, in their order

    @property
    def differs(self) -> bool:
        """Whether the profiles do not all say the same."""
        return len(set(self.values)) > 1


def compare(*profiles: Profile) -> list[Row]:
    """Return every fact that any of the profiles states, side by side."""
    stated = [facts(profile) for profile in profiles]
    fields = dict.fromkeys(field for one in stated for field in one)
    order = sorted(fields, key=lambda field: _PARTS.index(field.split()[0]))
    return [Row(field, tuple(one.get(field, UNKNOWN) for one in stated)) for field in order]


_PARTS = (
    "status",
    "device",
    "runtime",
    "layout",
    "dtype",
    "width",
    "structure",
    "rewrite",
    "peak",
    "memory",
    "overhead",
)


REWRITES = {"strides": "a 1x1 convolution's moves to what makes its input, where nothing else reads that"}


def facts(profile: Profile) -> dict[str, str]:
    """Return what a profile states, by field; several rules for one axis share a line."""
    found = {
        "status": profile.status,
        "device": f"{profile.device.vendor} {profile.device.arch} ({profile.device.kind})",
        "runtime": f"{profile.runtime.name} {profile.runtime.versions or ''}".strip(),
        "dtype": dtype(profile),
    }
    if profile.runtime.layout is not None:
        found["layout"] = profile.runtime.layout
    for rule in profile.granularity:
        _add(found, f"width {rule.op} {rule.axis}", rounding(rule))
    for structure in profile.structure:
        _add(found, f"structure {kind(structure)}", verdict(structure))
    for rewrite in profile.rewrite:
        found[f"rewrite {rewrite.kind}"] = REWRITES[rewrite.kind]
    if profile.peak is not None:
        found |= {f"peak {name}": speed for name, speed in peaks(profile.peak).items()}
    for memory in profile.memory:
        found[f"memory {memory.name}"] = storage(memory)
    for overhead in profile.overhead:
        _add(found, f"overhead per {overhead.per}", delay(overhead))
    return found


def _add(found: dict[str, str], field: str, value: str) -> None:
    found[field] = f"{found[field]}; {value}" if field in found else value


def dtype(profile: Profile) -> str:
    """Return the number formats in a word: of weights, and of activations where they differ."""
    weights, activations = profile.dtype.weights, profile.dtype.activations
    return weights if weights == activations else f"{weights} x {activations}"


def rounding(rule: Granularity) -> str:
    """Return a rule in words: its quantum, its mode, and what is known of the price."""
    words = [f"{rule.quantum} {rule.mode}"]
    if rule.mode in ("pad", "tile"):
        words.append(f"alpha {'unknown' if rule.alpha is None else f'{rule.alpha:.3g}'}")
    if rule.preferred is not None:
        words.append(f"better {rule.preferred}")
    if rule.penalty is not None:
        words.append(f"{rule.penalty:g}x")
    if rule.at_least > 1:
        words.append(f"from {rule.at_least}")
    if rule.at_most is not None:
        words.append(f"up to {rule.at_most}")
    if rule.kernel is not None:
        words.append(f"kernel {rule.kernel}")
    if rule.confidence in ("inferred", "folklore"):
        words.append(rule.confidence)
    return ", ".join(words)


def kind(structure: Structure) -> str:
    """Return the kind of a structure and its pattern."""
    return f"{structure.kind} {structure.pattern or ''}".strip()


def verdict(structure: Structure) -> str:
    """Return whether a structure pays, with the published range and the conditions."""
    words: str = structure.pays
    if structure.speedup is not None:
        words += f", {structure.speedup[0]:g}-{structure.speedup[1]:g}x"
    return words + (f", if {' and '.join(structure.requires)}" if structure.requires else "")


def peaks(peak: Peak) -> dict[str, str]:
    """Return the operations per second by number format, dense and sparse apart."""
    return {name.replace("_", " "): f"{ops_per_s / 1e12:.4g} TOPS" for name, ops_per_s in peak.ops_per_s.items()}


def storage(memory: Memory) -> str:
    """Return where a memory is, what it holds, how fast it is, and where it spills to."""
    words = ["on chip" if memory.on_chip else "off chip"]
    if memory.capacity_bytes is not None:
        words.append(_bytes(memory.capacity_bytes))
    if memory.bandwidth_bytes_per_s is not None:
        words.append(f"{memory.bandwidth_bytes_per_s / 1e9:.4g} GB/s")
    if memory.spills_to is not None:
        price = "" if memory.spill_penalty is None else f" at {memory.spill_penalty:g}x"
        words.append(f"then {memory.spills_to}{price}")
    return ", ".join(words)


def _bytes(count: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (10**9, "GB"), (10**6, "MB"), (2**10, "KiB")):
        if count >= size and count % size == 0:
            return f"{count // size} {unit}"
    return f"{count} B"


def delay(overhead: Overhead) -> str:
    """Return an overhead in microseconds, with the condition."""
    return f"{overhead.latency_s * 1e6:.3g} µs" + (f" ({overhead.condition})" if overhead.condition else "")
