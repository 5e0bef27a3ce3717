"""One plan for each runtime, every model on every target, and a second call that goes on from the files."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

import backends
import planner
import profiles
from backends import Artifact
from planner import LatencyTable, Plan
from planner.latency import Probe
from planner.operations import Choice
from tools import planning
from tools.bench_latency_model import NETWORKS, profile_for
from tools.calibrate import Bench
from tools.evidence import record, render, targets
from tools.targets import DENSE, Variant, record_of

from . import tiny

RUNTIMES = ("onnxruntime", "pytorch")


def as_predicted(place: Bench, table: LatencyTable, choice: Choice, *, progress: object) -> tuple[LatencyTable, float]:
    """Stand for the measurement of a planned network: it takes as long as the table says."""
    full = place.graph.choice(choice.keep, choice.removed)
    share = table.latency(place.graph, full) / table.latency(place.graph, place.graph.dense)
    about = {"keep": dict(full.keep), "removed": tuple(full.removed), "latency_s": share, "relative": share}
    return table.model_copy(update={"probes": (Probe(**about, ci95_s=(share, share), runs=1),)}), 0.0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Make the table of a tiny network; return its rows."""
    pytest.importorskip("onnxruntime")
    if any(profile_for(name) is None for name in RUNTIMES):
        pytest.skip("no fp32 profiles of ONNX Runtime and PyTorch fit this machine")
    monkeypatch.setitem(NETWORKS, "tiny", (tiny.model, (1, 8, 8)))
    monkeypatch.setattr(targets, "RUNTIMES", ",".join(RUNTIMES))
    monkeypatch.setattr(targets, "INT8", ())
    monkeypatch.setattr(targets, "calibrate", lambda place, *, progress: tiny.table(place))
    monkeypatch.setattr(planning, "refined", as_predicted)
    monkeypatch.setattr(targets, "add", partial(record.add, folder=tmp_path))

    def rows(only: str = "") -> list[record.Row]:
        settings = {"budget": 0.6, "data": None, "weights": None, "seconds": 0.02, "npus": False, "only": only}
        targets.main(networks="tiny", runtimes=",".join(RUNTIMES), out=tmp_path / "out", **settings)
        return record.read("targets", tmp_path).rows

    return rows


def test_plans_for_each_runtime_are_measured_on_all_kept_and_gone_on_with(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, folder = run(), tmp_path / "out" / "tiny"
    ids = {name: profile.id for name in RUNTIMES if (profile := profile_for(name))}
    plans = {name: Plan.load(folder / name / "plan.json") for name in RUNTIMES}
    assert {name: plan.profile for name, plan in plans.items()} == ids
    assert all(plan.predicted.fraction <= 0.6 for plan in plans.values())
    assert [(row["plan"], row["runtime"]) for row in rows] == [
        (plan, runtime) for runtime in RUNTIMES for plan in (DENSE, *RUNTIMES)
    ]
    sizes = {(row["plan"], row["runtime"]): row["size_bytes"] for row in rows}
    for row in rows:
        name, target = row["plan"], row["target"]
        suffix = backends.load(row["runtime"]).SUFFIX
        artifact = Artifact.load(record_of(folder / target / f"{name}.{target}{suffix}"))
        assert (row["parity"], row["size_bytes"]) == (artifact.parity.max_rel, artifact.size_bytes)
        assert row["parity"] <= 1e-4
        assert row["speedup"]["value"] > 0
        if name != DENSE:
            assert artifact.plan_sha256 == plans[name].sha256
            assert row["macs"] == plans[name].predicted.macs
            assert sizes[name, row["runtime"]] < sizes[DENSE, row["runtime"]]

    text = render.rendered("<!-- evidence: targets -->\n<!-- end of evidence -->", tmp_path)
    first = next(row for row in rows if row["plan"] == RUNTIMES[0])
    assert f"| network, plan | MACs | `{ids['onnxruntime']}` | `{ids['pytorch']}` |\n" in text
    assert f"| tiny, half for {RUNTIMES[0]} | {first['mac_speedup']:.2f}x | {first['speedup']['value']:.2f}x |" in text

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made a second time")

    for name in RUNTIMES:
        monkeypatch.setattr(backends.load(name), "build", never)
    monkeypatch.setattr(targets, "calibrate", never)
    monkeypatch.setattr(planner, "problem", never)
    again = run()
    same = ("plan", "target", "macs", "parity", "size_bytes")
    assert [[row[key] for key in same] for row in again] == [[row[key] for key in same] for row in rows]


def test_what_is_planned_for_are_runtimes_that_are_here_and_profiles_by_their_ids() -> None:
    here = profiles.load("x86_64_v4.onnxruntime.fp32")
    wanted = "onnxruntime,openvino,x86_64_v3.onnxruntime.int8"
    found = targets._planned(wanted, {"onnxruntime": here})
    assert {name: profile.id for name, profile in found.items()} == {
        "onnxruntime": "x86_64_v4.onnxruntime.fp32",
        "x86_64_v3.onnxruntime.int8": "x86_64_v3.onnxruntime.int8",
    }


def test_some_targets_alone_are_compiled_for(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    profile = profile_for("pytorch")
    assert profile is not None
    monkeypatch.setattr(targets, "variant", lambda case, name, *_: Variant(name, case.dense(), 1, None))
    monkeypatch.setattr(targets, "rows", lambda case, wanted, *_, **__: asked.extend(own.name for own in wanted) or [])
    assert run(only=profile.id) == []
    assert asked == [profile.id]
