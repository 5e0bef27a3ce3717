"""Throughput of streams side by side, and peak memory in a process of its own."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import backends
from backends.measure import Candidate, Clock
from backends.memory import Memory
from backends.throughput import ROUNDS, WARM_RUNS, throughput
from profiles.errors import BuildError

MS = 1_000_000


def test_examples_per_second_are_runs_times_the_batch() -> None:
    now = 0

    def run() -> None:
        nonlocal now
        now += 2 * MS

    candidate = Candidate("a", (run,), "fake", "1", batch=4)
    (found,) = throughput([candidate], seconds=1.0, clock=Clock(lambda: now, lambda: now))
    assert found.examples_per_s == pytest.approx(4 / 2e-3)
    assert (found.batch, found.streams, len(found.rounds_per_s)) == (4, 1, ROUNDS)


def test_every_stream_runs_in_its_own_thread_at_the_same_time() -> None:
    together, threads = threading.Barrier(3, timeout=30), [set[int]() for _ in range(3)]
    left = [WARM_RUNS * ROUNDS] * 3

    def stream(index: int) -> None:
        if left[index]:  # the runs that all three make equally often
            left[index] -= 1
            together.wait()
        threads[index].add(threading.get_ident())

    runs = tuple(lambda index=index: stream(index) for index in range(3))
    (found,) = throughput([Candidate("a", runs, "fake", "1")], seconds=1e-6)
    assert found.streams == 3
    assert left == [0, 0, 0]
    assert all(threads)
    assert found.examples_per_s > 0


def test_peak_memory_holds_the_weights(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, x = nn.Linear(1, 4_000_000, bias=False), torch.zeros(1, 1)
    backends.load("onnxruntime").build(model, (x,), None, tmp_path / "m.onnx").save(tmp_path / "m.json")
    found = backends.peak_memory(tmp_path / "m.json")
    assert found.added_bytes == found.peak_bytes - found.base_bytes > 16_000_000
    assert Memory.model_validate_json(found.model_dump_json()) == found


def test_peak_memory_of_weights_without_a_program_is_refused(tmp_path: Path) -> None:
    backends.load("pytorch").build(nn.Linear(2, 2), (torch.zeros(1, 2),), None, tmp_path / "m.safetensors").save(
        tmp_path / "m.json"
    )
    with pytest.raises(BuildError, match="mode = 'exported'"):
        backends.peak_memory(tmp_path / "m.json")
