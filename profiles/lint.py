"""What a profile file must keep beyond its schema, so that nobody takes a guess for a number."""

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import archspec.cpu
from pydantic import TypeAdapter, ValidationError

from profiles.errors import ProfileError
from profiles.evidence import QUOTED, UNPROVEN, Cited, Source
from profiles.findings import Finding, of_validation
from profiles.registry import Library
from profiles.schema import Granularity, Memory, Overhead, Peak, Profile, Rewrite, Structure

_Problem = tuple[str, str, str]  # field, what, remedy
_PARTS: dict[str, TypeAdapter[Any]] = {
    "granularity": TypeAdapter(list[Granularity]),
    "structure": TypeAdapter(list[Structure]),
    "rewrite": TypeAdapter(list[Rewrite]),
    "memory": TypeAdapter(list[Memory]),
    "overhead": TypeAdapter(list[Overhead]),
    "source": TypeAdapter(list[Source]),
    "peak": TypeAdapter(Peak),
}
_NUMBER = re.compile(r"(?<![\d.])(?<!fp)(?<!bf)(?<!int)(?<!float)(?<!avx)\d+(?:\.\d+)?", re.IGNORECASE)
_SCALES = {  # in which units a quote may write a number down
    "quantum": (1.0,),
    "preferred": (1.0,),
    "alpha": (1.0,),
    "penalty": (1.0,),
    "speedup": (1.0,),
    "capacity_bytes": (1.0, *(2.0**-s for s in (10, 20, 30)), *(10.0**-s for s in (3, 6, 9))),
    "bandwidth_bytes_per_s": (1e-6, 1e-9, 1e-12),
    "spill_penalty": (1.0,),
    "latency_s": (1e3, 1e6),
}
_DENSE = re.compile(r"dense|w/o sparsity|without sparsity", re.IGNORECASE)


def lint(*paths: Path) -> list[Finding]:
    """Return what is wrong in these files, or in every profile file that can be found; empty if nothing is."""
    library = Library.here()
    if not paths:
        return [finding for name in sorted(library.files) for finding in _of_file(name, library)]
    if lost := [str(path) for path in paths if not path.is_file()]:
        raise ProfileError(f"{lost[0]}: no such profile file; give the path of a .toml file, or none to check all")
    return [finding for path in paths for finding in _of_file(path.name.removesuffix(".toml"), library.beside(path))]


def _of_file(name: str, library: Library) -> list[Finding]:
    file = library.files[name]
    try:
        if library.is_abstract(name):
            library.resolved(name)
            return _of_abstract(library.table(name), file)
        profile = library.load(name)
    except ProfileError as error:
        return [arg if isinstance(arg, Finding) else _unread(str(file), arg) for arg in error.args]
    return [Finding(str(file), *problem) for rule in RULES for problem in rule(profile)]


def _unread(file: str, reason: object) -> Finding:
    what, _, remedy = str(reason).removeprefix(f"{file}: ").partition("; ")
    return Finding(file, "file", what, remedy or "correct it")


def _of_abstract(table: Mapping[str, Any], file: Traversable) -> list[Finding]:
    """Check part by part what will only be whole in the files that extend it."""
    found = []
    for part, adapter in _PARTS.items():
        try:
            adapter.validate_python(table.get(part, [] if part != "peak" else None) or [])
        except ValidationError as error:
            found += of_validation(str(file), error, at=part) if table.get(part) else []
    return found


def _id_names_the_format(profile: Profile) -> Iterator[_Problem]:
    last = profile.id.rpartition(".")[2]
    if not last.startswith(profile.dtype.weights):
        what = f"ends in {last!r}, and the weights are {profile.dtype.weights}"
        yield "id", what, f"name it <part>.<runtime>.{profile.dtype.weights}, with more after a hyphen if needed"


def _cpu_is_known(profile: Profile) -> Iterator[_Problem]:
    match, targets = profile.device.match, archspec.cpu.TARGETS
    features = {feature for target in targets.values() for feature in target.features}
    named = [("archspec", name, targets) for name in (match.archspec,) if name is not None]
    for key, name, known in [*named, *(("features", name, features) for name in match.features)]:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "python -m archspec cpu shows this machine's"
            yield f"device.match.{key}", f"{name!r} is unknown to archspec", hint


def _confirmed_has_evidence(profile: Profile) -> Iterator[_Problem]:
    if profile.status == "confirmed" and all(rule.confidence in UNPROVEN for rule in profile.granularity):
        yield (
            "status",
            "is confirmed, and no granularity rule has more than inference behind it",
            "say experimental, or find a source",
        )


def _estimates_have_evidence(profile: Profile) -> Iterator[_Problem]:
    for field, statement in _statements(profile):
        for key in ("alpha", "speedup", "spill_penalty"):
            if getattr(statement, key, None) is not None and statement.confidence in UNPROVEN:
                what = f"is stated with confidence {statement.confidence}"
                yield f"{field}.{key}", what, "leave it out: absent means unknown, and a range is reported"


def _rejection_has_fallback(profile: Profile) -> Iterator[_Problem]:
    for field, rule in _statements(profile):
        if isinstance(rule, Granularity) and rule.mode == "reject" and rule.fallback is None:
            yield f"{field}.fallback", "is missing beside mode reject", "say what runs instead"


def _speedup_agrees(profile: Profile) -> Iterator[_Problem]:
    for field, structure in _statements(profile):
        if isinstance(structure, Structure) and structure.speedup and structure.pays in ("no", "unknown"):
            what = f"is {list(structure.speedup)} though pays = {structure.pays!r}"
            yield f"{field}.speedup", what, "remove it, or say under which conditions it pays"


def _peak_is_placed(profile: Profile) -> Iterator[_Problem]:
    if profile.peak is None:
        return
    if profile.peak.condition is None:
        yield "peak.condition", "is missing", "name the part, its clock or power mode, and how many cores"
    quotes = " ".join(_quotes(profile, profile.peak)) if profile.peak.confidence in QUOTED else ""
    for name, value in profile.peak.ops_per_s.items():
        dtype, _, kind = name.rpartition("_")
        sparse = profile.peak.ops_per_s.get(f"{dtype}_sparse")
        if kind == "dense" and sparse is not None and sparse <= value:
            what = f"is {value:g} and the sparse one {sparse:g}"
            yield f"peak.ops_per_s.{name}", what, "a sparse peak is larger than the dense one: correct either"
        if kind == "dense" and re.search(r"sparse|sparsity", quotes, re.IGNORECASE) and not _DENSE.search(quotes):
            what = "is quoted from words that speak of sparse operations only"
            yield f"peak.ops_per_s.{name}", what, f"name it {dtype}_sparse, or quote the dense figure"


def _quotes_say_something(profile: Profile) -> Iterator[_Problem]:
    for index, source in enumerate(profile.source):
        if len(re.findall(r"\w", source.quote)) < 5:
            yield f"source[{index}].quote", f"{source.quote!r} says nothing", "copy the words that state the number"


def _numbers_are_quoted(profile: Profile) -> Iterator[_Problem]:
    """A number that somebody else wrote stands in the quote, or the note says how it follows from it."""
    for field, statement in _statements(profile):
        if statement.confidence not in QUOTED or statement.note is not None:
            continue
        quoted = {float(number) for quote in _quotes(profile, statement) for number in _NUMBER.findall(quote)}
        for key, number in _numbers(statement):
            if not any(math.isclose(number * scale, other) for scale in _SCALES[key] for other in quoted):
                what = f"{number:g} stands in no quote of {', '.join(statement.sources)}"
                yield f"{field}.{key}", what, "quote the words that state it, or say in `note` how it follows"


def _numbers(statement: Cited) -> Iterator[tuple[str, float]]:
    for key in _SCALES:
        value = getattr(statement, key, None)
        if key == "quantum" and value == 1:
            continue  # nothing is rounded
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            yield key, float(number)


def _quotes(profile: Profile, statement: Cited) -> list[str]:
    return [source.quote for source in profile.source if source.id in statement.sources]


def _statements(profile: Profile) -> Iterator[tuple[str, Cited]]:
    for part in ("granularity", "structure", "rewrite", "memory", "overhead"):
        for index, statement in enumerate(getattr(profile, part)):
            yield f"{part}[{index}]", statement


RULES: tuple[Callable[[Profile], Iterator[_Problem]], ...] = (
    _id_names_the_format,
    _cpu_is_known,
    _confirmed_has_evidence,
    _estimates_have_evidence,
    _rejection_has_fallback,
    _speedup_agrees,
    _peak_is_placed,
    _quotes_say_something,
    _numbers_are_quoted,
)
