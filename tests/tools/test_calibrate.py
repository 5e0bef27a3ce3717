"""Calibration: a table says what it rests on and where it belongs, and an interrupted one goes on."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from planner.candidates import candidates
from planner.latency import LatencyTable, Probe
from planner.operations import Choice
from profiles import Machine, load
from tools import calibrate as calibration
from tools.calibrate import Bench, Countdown, batch_of, belongs, bench, calibrate, refined

from . import tiny

pytest.importorskip("onnxruntime")
PROFILE = "x86_64_v3.onnxruntime.fp32"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def a_bench(*, batch: int = 1) -> Bench:
    return bench(tiny.model(), (torch.zeros(batch, 1, 8, 8),), load(PROFILE), seconds=0.01)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return calibrate(a_bench(), progress=lambda *_: None)


def test_a_table_says_where_it_was_measured_and_what_each_entry_rests_on(table: LatencyTable) -> None:
    here = a_bench().place()
    assert table.schema_version == 3
    for name in ("device", "device_model", "runtime", "runtime_version", "driver_version", "threads", "batch"):
        assert getattr(table, name) == getattr(here, name), name
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    assert (table.governor is None) == (not governor.exists())
    total = sum(probe.runs for probe in table.probes)
    for entry in table.entries:
        assert (entry.runs > 0) == (entry.probes > 0)
        assert entry.runs <= total
        assert entry.spread_s is not None
        assert entry.spread_s > 0
    assert json.loads(table.model_dump_json())["governor"] == table.governor


def test_what_fewer_networks_hold_is_less_certain(table: LatencyTable) -> None:
    one = a_bench()
    dense_s = table.latency(one.graph, one.graph.dense)
    took_s = [table.latency(one.graph, one.graph.choice(p.keep, frozenset(p.removed))) for p in table.probes]
    known = [  # of a machine that errs in nothing, so that no fit takes its noise for something else
        probe.model_copy(update={"latency_s": own, "relative": own / dense_s})
        for probe, own in zip(table.probes, took_s, strict=True)
    ]
    few, all_ = (calibration.fitted(one, own, candidates(one.graph, one.profile)) for own in (known[:4], known))
    assert few.errors == ()  # too few to leave some out
    spread = {(e.operation, e.inputs, e.outputs): e.spread_s / e.latency_s for e in all_.entries if e.spread_s}
    wider = [e.spread_s / e.latency_s / spread[e.operation, e.inputs, e.outputs] for e in few.entries if e.spread_s]
    assert np.median(wider) > 1


def test_a_table_belongs_where_it_was_measured(table: LatencyTable) -> None:
    assert a_bench().refuses(table) == []
    reasons = a_bench(batch=4).refuses(table)
    assert reasons == ["it was measured at batch 1, and the inputs have batch 4"]


def test_a_table_is_refused_elsewhere_with_every_reason(table: LatencyTable) -> None:
    board = Machine(cpu="cortex_a72", os="Linux", cores=4)
    assert belongs(table, board, runtime_version="9.9", threads=4, batch=8) == [
        f"it was measured on {table.device}, and this is cortex_a72",
        f"it was measured with onnxruntime {table.runtime_version}, and 9.9 is here",
        "it was measured with 1 threads, and 4 are wanted",
        "it was measured at batch 1, and the inputs have batch 8",
    ]
    here = Machine.here()
    same = {"runtime_version": table.runtime_version, "threads": 1, "batch": 1}
    assert belongs(table, here, **same) == []
    assert belongs(table, here, **same, device_model=table.device_model) == []
    (reason,) = belongs(table, here, **same, device_model="another CPU of this kind")
    assert "another CPU of this kind" in reason
    old = table.model_copy(update={"device_model": None, "batch": None})  # of a version that did not record them
    assert belongs(old, here, **same, device_model="any") == []


def test_an_interrupted_calibration_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes: list[int] = []
    real = calibration.measure_choices

    def counted(*arguments: object, **named: object) -> object:
        if len(sizes) == 1 and sizes[0] > 0:
            sizes.append(-1)
            raise KeyboardInterrupt
        probes = real(*arguments, **named)  # type: ignore[arg-type]
        sizes.append(len(probes))
        return probes

    monkeypatch.setattr(calibration, "measure_choices", counted)
    one = a_bench()
    with pytest.raises(KeyboardInterrupt):
        calibrate(one, progress=lambda *_: None)
    (part,) = tmp_path.rglob("*.part.json")
    kept = json.loads(part.read_text())
    assert len(kept) == sizes[0]
    found = calibrate(one, progress=lambda *_: None)
    assert [probe.model_dump(mode="json") for probe in found.probes[: len(kept)]] == kept
    assert sum(size for size in sizes if size > 0) == len(found.probes)
    assert not list(tmp_path.rglob("*.part.json"))
    assert calibrate(one, progress=lambda *_: None) == found  # from the cache


def test_more_time_goes_on_from_the_last_table(monkeypatch: pytest.MonkeyPatch) -> None:
    one, asked = a_bench(), list[int]()

    def counted(_: Bench, wanted: Sequence[Choice], **__: object) -> list[Probe]:
        asked.append(len(wanted))
        time.sleep(0.3)
        return [
            Probe(keep=dict(c.keep), removed=(), latency_s=1.0, relative=1.0, ci95_s=(1.0, 1.0), runs=1) for c in wanted
        ]

    monkeypatch.setattr(calibration, "measure_choices", counted)
    monkeypatch.setattr(calibration, "_enough", lambda _, probes: len(probes) >= 36)
    monkeypatch.setattr(calibration, "LIMIT_S", 0.5)
    few = calibrate(one, progress=lambda *_: None)
    assert asked == [12]
    assert calibrate(one, progress=lambda *_: None) == few
    assert asked == [12]
    more = calibrate(one, progress=lambda *_: None, limit_s=60.0)
    assert asked == [12, 12, 12]
    assert more.probes[:12] == few.probes
    assert calibrate(one, progress=lambda *_: None, limit_s=60.0) == more


@pytest.mark.parametrize(
    ("errors", "enough"),
    [
        ([0.009] * 60, True),
        ([0.009] * 47, False),  # too few to trust
        ([-0.011] * 60, False),
        ([0.0] * 50 + [-0.2] * 2, True),
        ([0.0] * 50 + [0.05] * 4, False),  # good in the mean, but not for one in thirteen
    ],
)
def test_calibration_ends_when_networks_left_out_are_predicted_well(
    table: LatencyTable, monkeypatch: pytest.MonkeyPatch, errors: list[float], enough: bool
) -> None:
    monkeypatch.setattr(calibration, "cross_validated", lambda *_: tuple(errors))
    assert calibration._enough(a_bench(), [table.probes[0]] * len(errors)) is enough


@pytest.mark.parametrize(("relatives", "taken"), [((1.0,), 1.0), ((0.2, 1.0, 1.01), 1.0), ((2.0, 1.0, 2.1), 2.0)])
def test_one_disturbed_measurement_does_not_refine_a_table(
    table: LatencyTable, monkeypatch: pytest.MonkeyPatch, relatives: tuple[float, ...], taken: float
) -> None:
    one, left = a_bench(), list(relatives)
    dense = table.probes[0]
    assert dense.choice == one.graph.dense

    def measured(*_: object, **__: object) -> list[Probe]:
        relative = left.pop(0)
        return [dense.model_copy(update={"relative": relative, "latency_s": relative * dense.latency_s})]

    monkeypatch.setattr(calibration, "measure_choices", measured)
    better, error = refined(one, table, one.graph.dense, progress=lambda *_: None)
    assert left == []
    assert better.probes[-1].relative == taken
    assert error == pytest.approx(1 / taken - 1)


def test_a_refined_table_keeps_its_place(table: LatencyTable) -> None:
    one = a_bench()
    moved = table.model_copy(update={"device_model": "where it was first measured", "frequency_hz": 3e9})
    better, _ = refined(one, moved, one.graph.dense, progress=lambda *_: None)
    assert (better.device_model, better.frequency_hz) == ("where it was first measured", 3e9)
    assert len(better.probes) == len(table.probes) + 1


def test_the_time_left_is_told_once_it_is_known() -> None:
    now, told = [0.0], []
    clock = Countdown(lambda what, done, total: told.append((what, done, total)), 12, 60, clock=lambda: now[0])
    clock.step("building", 13, 60)
    now[0] = 24.0
    clock.finished(24)  # 12 networks in 24 s: 36 are left
    clock.step("building", 25, 60)
    now[0] = 34.0
    clock.step("timing", 30, 60)
    now[0] = 200.0
    clock.step("timing", 60, 60)
    assert told == [
        ("building", 13, 60),
        ("building, 1 min 12 s left", 25, 60),
        ("timing, 1 min 02 s left", 30, 60),
        ("timing, 0 s left", 60, 60),
    ]


def test_progress_counts_networks_and_never_passes_the_end() -> None:
    seen: list[tuple[str, int, int]] = []
    found = calibrate(a_bench(), progress=lambda what, done, total: seen.append((what, done, total)))
    (total,) = {total for _, _, total in seen}
    assert total >= len(found.probes)  # it ends early once networks that were left out are predicted well
    assert max(done for _, done, _ in seen) == len(found.probes)
    assert any("left" in what for what, _, _ in seen)


def test_the_time_left_is_never_more_than_the_limit() -> None:
    now, told = [0.0], []
    clock = Countdown(lambda what, *_: told.append(what), 0, 60, limit_s=100.0, clock=lambda: now[0])
    now[0] = 40.0
    clock.finished(12)  # at this rate the rest takes 160 s
    clock.step("building", 13, 60)
    assert told == ["building, 1 min 00 s left"]


def test_batch_is_the_first_axis_of_the_first_input() -> None:
    assert batch_of((torch.zeros(8, 3), torch.zeros(2))) == 8
    assert batch_of(()) == 1
