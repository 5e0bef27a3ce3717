"""Profiles side by side: every stated fact is a row, and where they differ is marked."""

from typing import Any

import pytest

from profiles import load
from profiles.compare import UNKNOWN, compare, delay, facts, rounding, storage, verdict
from profiles.schema import Granularity, Memory, Overhead, Structure

CITED = {"confidence": "source", "sources": ["s"]}
PAD = {"op": "conv2d", "axis": "out_channels", "quantum": 16, "mode": "pad"} | CITED
SRAM = {"name": "sram", "on_chip": True} | CITED


def test_rows_hold_what_each_profile_says() -> None:
    first, second = load("x86_64_v4.onnxruntime.fp32"), load("x86_64_v3.onnxruntime.fp32")
    rows = {row.field: row for row in compare(first, second)}
    assert rows["width conv2d out_channels"].values == ("16 pad, alpha unknown", "8 pad, alpha unknown")
    assert rows["width conv2d out_channels"].differs
    assert not rows["runtime"].differs
    assert set(rows) == set(facts(first)) | set(facts(second))


def test_what_only_one_states_is_unknown_of_the_others() -> None:
    third = load("ethos-u65-512.vela.int8")
    rows = {row.field: row for row in compare(load("x86_64_v4.onnxruntime.fp32"), load("aarch64.xnnpack.fp32"), third)}
    assert rows["peak int8 dense"].values == (UNKNOWN, UNKNOWN, "1.024 TOPS")
    assert rows["memory sram"].values == (UNKNOWN, UNKNOWN, "on chip, 16 GB/s, then dram")
    assert [row.differs for row in rows.values()].count(False) >= 1


def test_a_profile_does_not_differ_from_itself() -> None:
    profile = load("nvidia-a100.cublas.fp16")
    assert not any(row.differs for row in compare(profile, profile, profile))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "16 pad, alpha unknown"),
        ({"alpha": 0.881308}, "16 pad, alpha 0.881"),
        ({"preferred": 64}, "16 pad, alpha unknown, better 64"),
        ({"mode": "cliff", "fallback": "plain", "penalty": 1.9}, "16 cliff, 1.9x"),
        ({"at_least": 16}, "16 pad, alpha unknown, from 16"),
        ({"at_most": 16}, "16 pad, alpha unknown, up to 16"),
        ({"kernel": "1x1"}, "16 pad, alpha unknown, kernel 1x1"),
        ({"confidence": "folklore"}, "16 pad, alpha unknown, folklore"),
    ],
)
def test_a_rule_in_words(changes: dict[str, Any], words: str) -> None:
    assert rounding(Granularity.model_validate(PAD | changes)) == words


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"capacity_bytes": 2**20, "spills_to": "dram"}, "on chip, 1 MiB, then dram"),
        ({"capacity_bytes": 64 * 10**9}, "on chip, 64 GB"),
        ({"capacity_bytes": 1000}, "on chip, 1000 B"),
        ({"bandwidth_bytes_per_s": 204.8e9}, "on chip, 204.8 GB/s"),
        ({"capacity_bytes": 2**23, "spills_to": "x", "spill_penalty": 3.5}, "on chip, 8 MiB, then x at 3.5x"),
    ],
)
def test_a_memory_in_words(numbers: dict[str, Any], words: str) -> None:
    assert storage(Memory.model_validate(SRAM | numbers)) == words


def test_a_structure_and_an_overhead_in_words() -> None:
    sparse = {"kind": "nm_sparsity", "pattern": "2:4", "pays": "conditional", "requires": ["C > 64", "it is hot"]}
    assert verdict(Structure.model_validate(sparse | CITED)) == "conditional, if C > 64 and it is hot"
    assert verdict(Structure.model_validate(sparse | CITED | {"speedup": [1.24, 1.47]})).startswith(
        "conditional, 1.24-1.47x, if"
    )
    launch = {"per": "operation", "latency_s": 0.9e-6, "condition": "one stream"} | CITED
    assert delay(Overhead.model_validate(launch)) == "0.9 µs (one stream)"
