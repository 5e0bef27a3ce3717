"""What the schema refuses, and what its numbers mean."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from profiles.evidence import Source
from profiles.schema import Device, Granularity, Match, Memory, Overhead, Profile, Runtime, Structure

PAD = {"op": "conv2d", "axis": "out_channels", "quantum": 16, "mode": "pad", "confidence": "source", "sources": ["s"]}
CLIFF = PAD | {"mode": "cliff", "fallback": "plain"}
SPARSE = {"kind": "nm_sparsity", "pattern": "2:4", "pays": "no", "confidence": "source", "sources": ["s"]}
PAGE = {"id": "s", "url": "https://example.org/", "quote": "sixteen", "retrieved": "2026-11-20"}
FILE = {"id": "s", "repo": "a/b", "path": "c.h", "commit": "0123abc", "quote": "sixteen", "retrieved": "2026-11-20"}
NPU = {"vendor": "acme", "kind": "npu", "arch": "anvil"}
PROFILE = {
    "schema": 1,
    "id": "anvil.onnxruntime.int8",
    "device": NPU,
    "runtime": {"name": "onnxruntime"},
    "dtype": {"weights": "int8", "activations": "int8"},
    "granularity": [PAD],
    "source": [PAGE],
}
PEAK = {"confidence": "source", "sources": ["s"]}
SRAM = PEAK | {"name": "sram", "on_chip": True, "capacity_bytes": 1024}
MEASURED = {
    "machine": "anvil rev 2",
    "runtime_version": "1.31.1",
    "driver_version": "2.0",
    "power_mode": "15 W",
    "threads": 1,
    "batch": 1,
    "runs": 100,
    "median_s": 61e-6,
    "spread_s": 1e-6,
}
BENCH = {"id": "s", "measurement": MEASURED, "quote": "61 us at 64 channels", "retrieved": "2026-11-20"}

REFUSED = [
    ("an unknown key", Granularity, PAD | {"quantums": 16}, "Extra inputs"),
    ("an unknown operator", Granularity, PAD | {"op": "conv"}, "conv2d"),
    ("a quantum of zero", Granularity, PAD | {"quantum": 0}, "greater than or equal to 1"),
    ("a quantum in quotes", Granularity, PAD | {"quantum": "16"}, "valid integer"),
    ("a fractional quantum", Granularity, PAD | {"quantum": 1.5}, "valid integer"),
    ("a truth for a quantum", Granularity, PAD | {"quantum": True}, "valid integer"),
    ("no source", Granularity, PAD | {"sources": []}, "at least 1"),
    ("alpha above 1", Granularity, PAD | {"alpha": 1.01}, "less than or equal to 1"),
    ("alpha below 0", Granularity, PAD | {"alpha": -0.1}, "greater than or equal to 0"),
    ("alpha of a cliff", Granularity, CLIFF | {"alpha": 0.5}, "nothing is rounded"),
    ("a cliff without fallback", Granularity, PAD | {"mode": "cliff"}, "say what runs instead"),
    ("a fallback of a pad", Granularity, PAD | {"fallback": "plain"}, "not pad"),
    ("a penalty of a pad", Granularity, PAD | {"penalty": 1.9}, "not pad"),
    ("a penalty of a rejection", Granularity, PAD | {"mode": "reject", "penalty": 1.9}, "not reject"),
    ("a penalty that rewards", Granularity, CLIFF | {"penalty": 1.0}, "greater than 1"),
    ("an inferred cliff", Granularity, CLIFF | {"confidence": "inferred"}, "only break ties"),
    ("a folklore rejection", Granularity, PAD | {"mode": "reject", "confidence": "folklore"}, "only break ties"),
    ("a preferred that is smaller", Granularity, PAD | {"preferred": 8}, "larger multiple"),
    ("a preferred that is no multiple", Granularity, PAD | {"preferred": 24}, "larger multiple"),
    ("conditional without conditions", Structure, SPARSE | {"pays": "conditional"}, "if and only if"),
    ("conditions without conditional", Structure, SPARSE | {"requires": ["C > 64"]}, "if and only if"),
    ("n:m without pattern", Structure, {k: v for k, v in SPARSE.items() if k != "pattern"}, "'2:4'"),
    ("n:m of words", Structure, SPARSE | {"pattern": "two of four"}, "'2:4'"),
    ("a speedup from high to low", Structure, SPARSE | {"speedup": [1.5, 1.2]}, "lowest, highest"),
    ("a memory without a number", Memory, PEAK | {"name": "sram", "on_chip": True}, "state `capacity_bytes`"),
    ("a memory that spills into itself", Memory, SRAM | {"spills_to": "sram"}, "itself"),
    ("a spill that is free", Memory, SRAM | {"spills_to": "dram", "spill_penalty": 1.0}, "greater than 1"),
    ("a spill to nowhere", Profile, PROFILE | {"memory": [SRAM | {"spills_to": "dram"}]}, "unknown dram"),
    ("an overhead of nothing", Overhead, PEAK | {"per": "operation", "latency_s": 0.0}, "greater than 0"),
    ("an overhead of a day", Overhead, PEAK | {"per": "day", "latency_s": 1.0}, "'operation' or 'inference'"),
    ("a capability and a family", Match, {"cuda_cc": (8, 0), "cuda_cc_from": (7, 0)}, "give one of both"),
    ("an operating system of its own", Match, {"os": "BeOS"}, "Darwin"),
    ("a cpu that cannot be matched", Device, NPU | {"kind": "cpu"}, "match.archspec"),
    ("versions in words", Runtime, {"name": "openvino", "versions": "new ones"}, "PEP 440"),
    ("a source of nowhere", Source, {k: v for k, v in PAGE.items() if k != "url"}, "either `url`, or `repo`"),
    ("a source in two places", Source, PAGE | FILE, "either `url`, or `repo`"),
    ("a page with a path", Source, PAGE | {"path": "c.h"}, "either `url`, or `repo`"),
    ("a source without a commit", Source, {k: v for k, v in FILE.items() if k != "commit"}, "either `url`, or `repo`"),
    ("a page that was measured", Source, PAGE | {"measurement": MEASURED}, "give either `url`"),
    ("a measurement without runs", Source, BENCH | {"measurement": {**MEASURED, "runs": 0}}, "greater than or equal"),
    ("a source without a quote", Source, PAGE | {"quote": ""}, "at least 1"),
    ("an undefined source", Profile, PROFILE | {"source": []}, "undefined sources s"),
    ("an unused source", Profile, PROFILE | {"source": [PAGE, PAGE | {"id": "t"}]}, "nothing cites: t"),
    ("a source twice", Profile, PROFILE | {"source": [PAGE, PAGE]}, "appears twice: s"),
    ("a rule twice", Profile, PROFILE | {"granularity": [PAD, PAD]}, "appears twice"),
    ("documented by a measurement", Profile, PROFILE | {"source": [BENCH]}, "such a source needs measured-here"),
    ("a structure twice", Profile, PROFILE | {"structure": [SPARSE, SPARSE]}, "appears twice"),
    ("a peak that hides sparsity", Profile, PROFILE | {"peak": PEAK | {"ops_per_s": {"int8": 1e12}}}, "pattern"),
    ("a newer schema", Profile, PROFILE | {"schema": 2}, "should be 1"),
    ("an id without a runtime", Profile, PROFILE | {"id": "anvil.int8"}, "pattern"),
    ("an id in capitals", Profile, PROFILE | {"id": "Anvil.onnxruntime.int8"}, "pattern"),
]


@pytest.mark.parametrize(("model", "table", "reason"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_schema_refuses(model: type[Any], table: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        TypeAdapter(model).validate_python(table)


@pytest.mark.parametrize(
    ("model", "table"),
    [
        (Granularity, PAD),
        (Granularity, CLIFF),
        (Structure, SPARSE),
        (Source, PAGE),
        (Source, FILE),
        (Source, BENCH),
        (Memory, SRAM),
        (Profile, PROFILE),
    ],
)
def test_the_tables_that_refusals_start_from_are_accepted(model: type[Any], table: dict[str, Any]) -> None:
    assert TypeAdapter(model).validate_python(table)


def test_nothing_changes_after_reading() -> None:
    profile = Profile.model_validate(PROFILE)
    with pytest.raises(ValidationError, match="frozen"):
        profile.granularity[0].quantum = 1  # type: ignore[misc]


def rule(**changes: Any) -> Granularity:
    return Granularity.model_validate(PAD | changes)


# ANNETTE's fits: database/models/layer/{dnndk,ncs2}-ref_roofline.json in embedded-machine-learning/annette@106c413.
DPU_FILTERS, DPU_CHANNELS = rule(quantum=16, alpha=0.881308), rule(quantum=16, alpha=1.0)
NCS2_FILTERS, NCS2_CHANNELS = rule(quantum=32, alpha=0.7046765447791339), rule(quantum=32, alpha=0.14579841511696096)


@pytest.mark.parametrize(
    ("fitted", "n", "effective"),
    [
        (DPU_FILTERS, 16, 16.0),
        (DPU_FILTERS, 17, 17 + 0.881308 * 15),  # 30.22: one filter more costs almost a whole block
        (DPU_CHANNELS, 17, 32.0),
        (DPU_CHANNELS, 1, 16.0),
        (NCS2_FILTERS, 33, 33 + 0.7046765447791339 * 31),
        (NCS2_FILTERS, 64, 64.0),
        (NCS2_CHANNELS, 48, 48 + 0.14579841511696096 * 16),
        (NCS2_CHANNELS, 0, 0.0),
    ],
)
def test_effective_width_is_annettes_formula(fitted: Granularity, n: int, effective: float) -> None:
    low, high = fitted.effective(n)
    assert low == high == pytest.approx(effective)


def test_unknown_alpha_gives_the_range_from_free_to_fully_paid() -> None:
    assert rule().effective(17) == (17.0, 32.0)
    assert rule().effective(32) == (32.0, 32.0)


def test_cliffs_and_rejections_do_not_round() -> None:
    assert Granularity.model_validate(CLIFF).effective(17) == (17.0, 17.0)
    assert rule(mode="reject").effective(17) == (17.0, 17.0)


def test_rule_is_silent_below_its_first_width() -> None:
    assert rule(at_least=16).effective(3) == (3.0, 3.0)
    assert rule(at_least=16).effective(17) == (17.0, 32.0)


def test_rule_is_silent_above_its_last_width() -> None:
    half = rule(at_most=24)
    assert [half.about(n) for n in (1, 24, 25)] == [True, True, False]
    assert (half.effective(17), half.effective(25)) == ((17.0, 32.0), (25.0, 25.0))


@pytest.mark.parametrize("changes", [{"at_most": 15}, {"at_least": 20, "at_most": 19}])
def test_a_rule_about_no_width_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="holds for no width"):
        rule(**changes)


def test_a_rule_of_a_kernel_takes_the_place_of_those_of_its_mode() -> None:
    rules = [PAD | {"quantum": 64}, PAD | {"when": "small", "quantum": 8, "kernel": "1x1"}]
    profile = Profile.model_validate(PROFILE | {"granularity": rules})
    asked = [profile.quantum("conv2d", "out_channels", kernel) for kernel in ((), (3, 3), (1, 1))]
    assert asked == [64, 64, 8]


@pytest.mark.parametrize("confidence", ["folklore", "inferred"])
def test_a_guess_does_not_enter_the_quantum(confidence: str) -> None:
    rules = [PAD | {"quantum": 4}, PAD | {"quantum": 64, "when": "they say", "confidence": confidence}]
    profile = Profile.model_validate(PROFILE | {"granularity": rules})
    assert profile.quantum("conv2d", "out_channels") == 4
    assert [known.quantum for known in profile.rules("conv2d", "out_channels")] == [4, 64]


def test_unknown_axes_and_kinds_are_unknown_not_zero() -> None:
    profile = Profile.model_validate(PROFILE)
    assert profile.rules("linear", "hidden") == ()
    assert profile.quantum("linear", "hidden") == 1
    assert profile.pays("heads") is None


@pytest.mark.parametrize(
    ("versions", "installed", "accepted"),
    [
        (None, "0.1", True),
        (">=1.20", "1.31.1", True),
        (">=1.20", "1.19.2", False),
        (">=2.8", "2.13.0+cpu", True),
        (">=2.8", "2.14.0.dev20261101", True),
        ("<10.8 || >=11.4.1", "10.7.0.23", True),
        ("<10.8 || >=11.4.1", "11.3.0", False),
        ("<10.8 || >=11.4.1", "11.4.1.4", True),
        (">=1.20", "unreadable", False),
    ],
)
def test_runtime_versions(versions: str | None, installed: str, accepted: bool) -> None:
    assert Runtime(name="tensorrt", versions=versions).accepts(installed) is accepted


@pytest.mark.parametrize(
    ("match", "found", "fits"),
    [
        ({"cuda_cc": (8, 0)}, (8, 0), True),
        ({"cuda_cc": (8, 0)}, (8, 6), False),
        ({"cuda_cc_from": (8, 0), "cuda_cc_to": (8, 7)}, (8, 6), True),
        ({"cuda_cc_from": (8, 0), "cuda_cc_to": (8, 7)}, (8, 9), False),
        ({"cuda_cc_from": (8, 0)}, (12, 1), True),
        ({"cuda_cc_to": (8, 9)}, (5, 3), True),
        ({"cuda_name": "A100"}, (3, 5), True),
    ],
)
def test_compute_capabilities_are_one_or_a_family(match: dict[str, Any], found: tuple[int, int], fits: bool) -> None:
    asked = Match.model_validate(match)
    assert asked.wants_cuda
    assert asked.has_capability(found) is fits


def test_a_source_knows_its_address() -> None:
    assert Source.model_validate(PAGE).place == "https://example.org/"
    assert Source.model_validate(FILE | {"lines": "3-4"}).place == "a/b@0123abc c.h lines 3-4"
    assert Source.model_validate(BENCH).place == "measured on anvil rev 2"
