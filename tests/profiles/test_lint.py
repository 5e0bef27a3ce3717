"""Every rule of the linter has a file that breaks it and one that keeps it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from profiles import ProfileError, lint
from profiles.findings import Finding

Write = Callable[..., Path]
ID = "anvil.onnxruntime.int8"

RULE = """
[[granularity]]
op = "conv2d"
axis = "out_channels"
quantum = 8
mode = "pad"
confidence = "documented"
sources = ["manual"]
"""
SOURCE = """
[[source]]
id = "manual"
url = "https://example.org/manual"
quote = "channels come in groups of 8"
retrieved = 2026-11-20
"""
PEAK = """
[peak]
ops_per_s = { int8_dense = 4e12 }
condition = "one core at 1 GHz"
confidence = "documented"
sources = ["manual"]
"""
SPARSE = """
[[structure]]
kind = "unstructured"
pays = "conditional"
requires = ["three quarters are zero"]
speedup = [1.1, 1.4]
confidence = "published"
sources = ["manual"]
"""
MEASURED = """
[[source]]
id = "bench"
quote = "median 61 us at 64 channels"
retrieved = 2026-11-20
[source.measurement]
machine = "anvil rev 2, 4 GB"
runtime_version = "1.31.1"
driver_version = "2.0"
power_mode = "15 W"
threads = 1
batch = 1
runs = 100
median_s = 61e-6
spread_s = 1e-6
"""
GOOD = RULE + SOURCE
NUMBERS = GOOD.replace("groups of 8", "groups of 8, 4 TOPS dense, 1.1 to 1.4 times, 2 MB")

CLEAN = {
    "a rule with its source": GOOD,
    "a dense peak": NUMBERS + PEAK,
    "a range that was published": NUMBERS + SPARSE,
    "a number whose note says how it follows": GOOD.replace("quantum = 8", 'quantum = 16\nnote = "two groups"'),
    "a number written in another unit": NUMBERS
    + '[[memory]]\nname = "sram"\non_chip = true\ncapacity_bytes = 2_097_152\n'
    'confidence = "documented"\nsources = ["manual"]\n',
    "a measurement": RULE.replace('"documented"', '"measured-here"').replace('"manual"', '"bench"') + MEASURED,
    "a cliff with its fallback": GOOD.replace('"pad"', '"cliff"\nfallback = "plain"'),
    "an inferred tile of an experimental profile": 'status = "experimental"\n'
    + GOOD.replace('"documented"', '"inferred"').replace('"pad"', '"tile"'),
}

# What is broken, the file, the field, what is wrong, and the remedy.
BROKEN = [
    ("no source", RULE, "profile", "cites undefined sources manual", "add a [[source]]"),
    ("no sources at all", RULE.replace('sources = ["manual"]\n', ""), "granularity[0].sources", "is missing", "add it"),
    (
        "no confidence",
        GOOD.replace('confidence = "documented"\n', ""),
        "granularity[0].confidence",
        "is missing",
        "add",
    ),
    (
        "a guess that forbids",
        GOOD.replace('"documented"', '"folklore"').replace('"pad"', '"cliff"\nfallback = "plain"'),
        "granularity[0]",
        "may only break ties",
        "find a source, or use mode tile",
    ),
    ("a cliff to nowhere", GOOD.replace('"pad"', '"cliff"'), "granularity[0]", "needs `fallback`", "what runs instead"),
    ("a rejection to nowhere", GOOD.replace('"pad"', '"reject"'), "granularity[0].fallback", "is missing", "what runs"),
    (
        "an alpha without evidence",
        'status = "experimental"\n' + GOOD.replace('"documented"', '"inferred"').replace('"pad"', '"pad"\nalpha = 0.5'),
        "granularity[0].alpha",
        "confidence inferred",
        "absent means unknown, and a range is reported",
    ),
    (
        "a speed-up without evidence",
        NUMBERS + SPARSE.replace('"published"', '"folklore"'),
        "structure[0].speedup",
        "confidence folklore",
        "leave it out",
    ),
    (
        "a speed-up that does not pay",
        NUMBERS + SPARSE.replace('"conditional"', '"no"').replace('requires = ["three quarters are zero"]\n', ""),
        "structure[0].speedup",
        "though pays = 'no'",
        "remove it",
    ),
    ("a peak of no part", NUMBERS + PEAK.replace("condition", "# "), "peak.condition", "is missing", "name the part"),
    (
        "a sparse peak below the dense",
        NUMBERS + PEAK.replace("int8_dense = 4e12", "int8_dense = 4e12, int8_sparse = 4e12"),
        "peak.ops_per_s.int8_dense",
        "the sparse one 4e+12",
        "correct either",
    ),
    (
        "a sparse peak sold as dense",
        NUMBERS.replace("TOPS dense", "TOPS with sparsity") + PEAK,
        "peak.ops_per_s.int8_dense",
        "speak of sparse operations only",
        "name it int8_sparse",
    ),
    (
        "a peak that hides its sparsity",
        NUMBERS + PEAK.replace("int8_dense", "int8"),
        "peak.ops_per_s.int8.[key]",
        "should match pattern",
        "profiles/schema.json",
    ),
    (
        "measured without a measurement",
        GOOD.replace('"documented"', '"measured-here"'),
        "profile",
        "confidence 'measured-here' cites manual",
        "needs a source with a `measurement`",
    ),
    (
        "a measurement called documented",
        RULE.replace('"manual"', '"bench"') + MEASURED,
        "profile",
        "confidence 'documented' cites bench",
        "such a source needs measured-here",
    ),
    *(
        (
            f"measured without {key}",
            RULE.replace('"documented"', '"measured-here"').replace('"manual"', '"bench"')
            + "\n".join(line for line in MEASURED.splitlines() if not line.startswith(f"{key} =")),
            f"source[0].measurement.{key}",
            "is missing",
            "add it",
        )
        for key in ("machine", "runtime_version", "driver_version", "power_mode", "threads", "batch", "runs")
    ),
    ("measured on no day", GOOD.replace("retrieved = 2026-11-20\n", ""), "source[0].retrieved", "is missing", "add it"),
    (
        "a number that no quote states",
        GOOD.replace("quantum = 8", "quantum = 16"),
        "granularity[0].quantum",
        "16 stands in no quote of manual",
        "quote the words that state it, or say in `note`",
    ),
    ("an empty quote", GOOD.replace("channels come in groups of 8", "..."), "source[0].quote", "says nothing", "copy"),
    (
        "confirmed by inference",
        GOOD.replace('"documented"', '"inferred"'),
        "status",
        "no granularity rule has more than inference",
        "say experimental",
    ),
    ("confirmed by nothing", "", "status", "no granularity rule", "say experimental"),
    (
        "a CPU that archspec does not know",
        GOOD + '[device.match]\narchspec = "x86_64_v44"\n',
        "device.match.archspec",
        "'x86_64_v44' is unknown to archspec",
        "did you mean 'x86_64_v4'?",
    ),
    (
        "a feature that archspec does not know",
        GOOD + '[device.match]\nfeatures = ["avx512_vnn"]\n',
        "device.match.features",
        "'avx512_vnn' is unknown",
        "did you mean 'avx512_vnni'?",
    ),
    ("a key with a slip", GOOD.replace("quantum", "quantun"), "granularity[0].quantun", "is not a key", "'quantum'"),
    ("not TOML", "schema = = 1", "file", "cannot be read as TOML", "correct it there"),
]


def findings(write: Write, text: str) -> list[Finding]:
    """Lint a file with these lines after the smallest profile, keys of the whole profile before it."""
    path = write(ID, text)
    if text.startswith("status"):
        first, _, rest = text.partition("\n")
        path.write_text(f"{first}\n{write(ID, rest).read_text()}")
    elif text.startswith("schema"):
        write(ID, whole=text)
    return lint.lint(path)


@pytest.mark.parametrize("name", CLEAN)
def test_a_file_that_keeps_the_rules_is_clean(write: Write, name: str) -> None:
    assert findings(write, CLEAN[name]) == []


@pytest.mark.parametrize(("text", "field", "what", "remedy"), [pytest.param(*c[1:], id=c[0]) for c in BROKEN])
def test_each_rule_names_file_field_reason_and_remedy(
    write: Write, text: str, field: str, what: str, remedy: str
) -> None:
    found = findings(write, text)
    matching = [f for f in found if f.field == field]
    assert matching, [str(f) for f in found]
    assert what in matching[0].what
    assert remedy in matching[0].remedy
    assert str(matching[0]) == f"{matching[0].file}: {field}: {matching[0].what}; {matching[0].remedy}"
    assert matching[0].file.endswith(f"{ID}.toml")
    assert all("\n" not in str(f) for f in found)


def test_the_id_ends_in_the_format_of_the_weights(write: Write) -> None:
    (found,) = lint.lint(write("anvil.onnxruntime.fp16", GOOD))
    assert (found.field, "weights are int8" in found.what) == ("id", True)
    assert lint.lint(write("anvil.onnxruntime.int8-fast", GOOD)) == []


def test_every_rule_of_the_linter_is_broken_above(write: Write) -> None:
    broken = set()
    for number, (_, text, *_) in enumerate(BROKEN):
        for rule in lint.RULES:
            try:
                profile = (
                    lint.Library.here()
                    .beside(write(f"n{number}.onnxruntime.int8", text))
                    .load(f"n{number}.onnxruntime.int8")
                )
            except ProfileError:
                continue
            if list(rule(profile)):
                broken.add(rule.__name__)
    assert broken == {rule.__name__ for rule in lint.RULES} - {"_id_names_the_format"}


def test_without_files_everything_that_is_found_is_checked(write: Write) -> None:
    assert lint.lint() == []
    write(ID, RULE)
    write("acme.base", whole='schema = 1\nid = "acme.base"\nabstract = true\n' + GOOD.replace("quantum", "quantun"))
    found = {Path(finding.file).name: finding for finding in lint.lint()}
    assert set(found) == {f"{ID}.toml", "acme.base.toml"}, "abstract files are checked part by part"
    assert found["acme.base.toml"].field.startswith("granularity[0].quant")


def test_a_clean_abstract_file_may_lack_what_its_children_add(write: Write) -> None:
    path = write("acme.base", whole='schema = 1\nid = "acme.base"\nabstract = true\nextends = ["dense.base"]\n' + RULE)
    assert lint.lint(path) == []
    write("acme.base", whole=path.read_text().replace("dense.base", "dens.base"))
    (found,) = lint.lint(path)
    assert (found.field, "did you mean dense.base" in found.remedy) == ("extends", True)


def test_a_missing_file_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.toml: no such profile file; give the path"):
        lint.lint(tmp_path / "none.toml")
