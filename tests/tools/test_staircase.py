"""Staircases: pad, tile, cliff and smooth are told apart from few noisy widths."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from profiles import load
from tools.staircase import Point, explore, inferred
from tools.strand import _PROBES, Strands, known

NOISE = 0.01  # relative standard deviation of what is measured
Cost = Callable[[int], float]


def rounded(n: int, quantum: int, alpha: float) -> float:
    return (1 - alpha) * n + alpha * math.ceil(n / quantum) * quantum


class Bench:
    """Measures a cost with noise, and counts."""

    def __init__(self, cost: Cost, seed: int) -> None:
        self.cost, self.random, self.widths = cost, np.random.default_rng(seed), list[int]()

    def __call__(self, widths: Sequence[int]) -> list[Point]:
        self.widths += widths
        found = []
        for width in widths:
            true = self.cost(width)
            seen = true * (1 + NOISE * float(np.clip(self.random.standard_normal(), -2.5, 2.5)))
            found.append(Point(width, seen, (seen - 1.96 * NOISE * true, seen + 1.96 * NOISE * true)))
        return found


QUANTA = st.sampled_from([4, 8, 12, 16, 32])
EXPECTED = st.sampled_from([8, 16, 32])
SEEDS = st.integers(0, 10**6)
LAUNCH = st.sampled_from([2.0, 10.0])  # what an operation costs before it has any width, in units of one channel


@settings(deadline=None, max_examples=60)
@given(QUANTA, SEEDS, LAUNCH)
def test_padding_is_found_to_the_channel(quantum: int, seed: int, launch: float) -> None:
    bench = Bench(lambda n: launch + rounded(n, quantum, 1.0), seed)
    found = inferred(explore(bench, quantum))
    assert (found.quantum, found.cliff) == (quantum, None)
    assert found.alpha is not None
    assert found.alpha > 0.7
    assert len(bench.widths) == len(set(bench.widths)) <= 28


@pytest.mark.parametrize(("expected", "quantum"), [(16, 8), (8, 16), (32, 16), (16, 12)])
def test_another_quantum_than_expected_is_found(expected: int, quantum: int) -> None:
    right = 0
    for seed in range(10):
        found = inferred(explore(Bench(lambda n: 5 + rounded(n, quantum, 1.0), seed), expected))
        right += found.quantum == quantum and found.cliff is None
    assert right == 10


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([8, 16, 32]), SEEDS)
def test_tiles_are_found_with_the_share_that_is_paid(quantum: int, seed: int) -> None:
    found = inferred(explore(Bench(lambda n: 5 + rounded(n, quantum, 0.7), seed), quantum))
    assert (found.quantum, found.cliff) == (quantum, None)
    assert found.alpha == pytest.approx(0.7, abs=0.25)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([4, 8]), st.sampled_from([1.3, 1.9]), SEEDS)
def test_cliffs_are_found_with_their_penalty(cliff: int, penalty: float, seed: int) -> None:
    bench = Bench(lambda n: (5 + n) * (penalty if n % cliff else 1.0), seed)
    found = inferred(explore(bench, 16, lowest=16))
    assert (found.quantum, found.cliff) == (None, cliff)
    assert found.penalty == pytest.approx(penalty, rel=0.08)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([1.4, 1.9]), SEEDS)
def test_padding_beside_a_cliff_is_found_too(penalty: float, seed: int) -> None:
    bench = Bench(lambda n: penalty * (5 + n) if n % 4 else 5 + rounded(n, 16, 1.0), seed)
    found = inferred(explore(bench, 16, lowest=16))
    assert (found.quantum, found.cliff) == (16, 4)


@settings(deadline=None, max_examples=60)
@given(EXPECTED, SEEDS, LAUNCH, st.sampled_from([0.7, 1.0, 1.3]))
def test_a_smooth_curve_has_no_quantum(expected: int, seed: int, launch: float, power: float) -> None:
    found = inferred(explore(Bench(lambda n: launch + n**power, seed), expected))
    assert (found.quantum, found.cliff, found.penalty) == (None, None, None)


def test_a_constant_has_no_quantum() -> None:
    bench = Bench(lambda _: 7.0, 0)
    assert inferred(explore(bench, 16)).quantum is None
    assert len(bench.widths) < 15  # neighbours do not differ, so nothing is halved


def test_flat_steps_are_not_halved() -> None:
    bench = Bench(lambda n: 5 + rounded(n, 16, 1.0), 0)
    explore(bench, 16)
    assert len(bench.widths) < 26  # of 64
    assert {16, 17, 32, 33, 48, 49} <= set(bench.widths)  # both sides of each step


# Measured on a Zen 5 (AVX-512), one thread: microseconds by width.
RECORDED = {
    "ONNX Runtime, convolution by output": (
        {1: 10.36, 16: 10.34, 17: 15.29, 18: 15.31, 20: 15.25, 24: 15.34, 32: 15.36, 33: 21.52, 34: 21.49, 36: 21.4}
        | {
            40: 21.62,
            48: 21.72,
            49: 28.03,
            50: 27.97,
            52: 27.98,
            56: 27.94,
            60: 27.87,
            62: 28.14,
            63: 27.95,
            64: 27.92,
        },
        (16, None),
    ),
    "ONNX Runtime, convolution by input": (
        {16: 7.7, 20: 14.77, 24: 14.96, 32: 14.98, 36: 22.15, 40: 22.32, 48: 22.26, 52: 29.59, 56: 30.03, 64: 29.7}
        | {68: 37.56, 72: 37.51, 76: 37.49, 78: 77.3, 79: 77.68, 80: 37.5},
        (16, 4),
    ),
    "ONNX Runtime, depthwise": (
        {1: 2.23, 16: 2.24, 20: 4.08, 24: 4.08, 32: 4.07, 36: 5.88, 40: 6.01, 48: 5.96, 52: 7.82, 56: 7.72, 60: 7.86}
        | {62: 65.83, 63: 67.06, 64: 7.77},
        (16, 4),
    ),
    "ONNX Runtime, matrix product by output": (
        {1: 4.73, 4: 4.86, 6: 4.99, 8: 5.07, 12: 5.25, 16: 5.4, 17: 8.22, 18: 8.25, 20: 8.41, 24: 8.42, 28: 8.66}
        | {32: 8.89, 33: 12.33, 34: 12.4, 36: 12.37, 40: 12.74, 48: 13.03, 49: 16.02, 50: 16.03, 52: 16.11, 56: 16.42}
        | {60: 16.39, 62: 16.58, 63: 16.6, 64: 16.69},
        (16, None),
    ),
    "XNNPACK, convolution by output": (  # at exactly 32 it is faster than the tile explains
        {18: 18.05, 20: 18.26, 24: 17.91, 28: 18.23, 30: 18.22, 32: 14.49, 34: 29.53, 36: 29.45, 40: 29.2, 48: 29.96}
        | {64: 29.06, 66: 44.37, 68: 44.42, 72: 43.72, 80: 44.16, 96: 44.43, 97: 58.3, 98: 59.06, 100: 58.73}
        | {104: 59.9, 112: 58.72, 120: 58.08, 124: 59.94, 126: 59.19, 127: 59.53, 128: 59.44},
        (32, None),
    ),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_staircases_are_read(name: str) -> None:
    costs, expected = RECORDED[name]
    found = inferred([Point(width, cost, (0.985 * cost, 1.015 * cost)) for width, cost in costs.items()])
    assert (found.quantum, found.cliff) == expected


@pytest.mark.parametrize(("op", "axis"), sorted(_PROBES))
def test_strands_differ_by_the_operation_alone(op: str, axis: str) -> None:
    probe = _PROBES[op, axis]()
    few, many = (probe.network(5, length) for length in (2, 3))
    x = torch.randn(2, *probe.shape)
    assert few(x).shape == many(x).shape
    assert (many(x) != 0).any()
    added = Counter(type(m) for m in many.modules()) - Counter(type(m) for m in few.modules())
    assert sum(count for kind, count in added.items() if not kind.__module__.endswith(("container", "activation"))) in (
        1,
        2,  # a hidden width lies between two layers
    )
    widths = {
        (m.in_features, m.out_features)
        if isinstance(m, nn.Linear)
        else (m.in_channels // m.groups, m.out_channels // m.groups)
        for m in many.operations.modules()
        if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)
    }
    assert any(5 in pair for pair in widths) or op == "depthwise_conv2d"


def test_strands_are_measured_in_the_runtime() -> None:
    pytest.importorskip("onnxruntime")
    told: list[int] = []
    measure = Strands(load("x86_64_v3.onnxruntime.fp32"), "linear", "out_channels", seconds=0.02, progress=told.append)
    first = measure([8, 16])
    second = measure([12])  # its drift is divided out by the widest of the first call
    assert [point.width for point in (*first, *second)] == [8, 16, 12]
    assert all(point.latency_s > 0 and point.ci95_s[0] <= point.latency_s <= point.ci95_s[1] for point in first)
    assert all(point.runs >= 30 for point in (*first, *second))
    assert told == [1, 2, 3]
    assert known("linear", "out_channels")
    assert not known("matmul", "heads")
