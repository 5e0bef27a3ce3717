"""What fewer MACs gain: torch-pruning's networks, ours at their MACs and at their latency, rows that are kept."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from torch import nn

import planner
import profiles
from planner.operations import Choice
from tools import calibrate as calibration
from tools.console import Stage
from tools.evidence import macs, record, render
from tools.evidence.macs import Match, Recipe, Subject
from tools.examples.resnet import ResNet

from . import tiny

pytest.importorskip("torch_pruning")
pytest.importorskip("onnxruntime")
PROFILE = profiles.load("x86_64_v3.onnxruntime.fp32")
SHAPE = (3, 16, 16)
QUICK = 0.02


def net() -> nn.Module:
    return ResNet(2, (16, 32, 64))


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> Subject:
    """A small network, and a table without calibrating."""
    monkeypatch.setitem(macs.NETWORKS, "tiny", (net, SHAPE))
    monkeypatch.setattr(macs, "available", lambda runtime, _: PROFILE if runtime == "onnxruntime" else None)
    monkeypatch.setattr(macs, "calibrate", lambda place, *, progress: tiny.table(place))
    real = calibration.bench
    monkeypatch.setattr(macs, "bench", lambda *given: real(*given, seconds=QUICK))
    monkeypatch.setattr(calibration, "_TIMED_S", QUICK)
    monkeypatch.setattr(macs, "HALVINGS", 2)
    return Subject("tiny", None)


@pytest.fixture
def match(subject: Subject) -> Match:
    return Match.of(subject, PROFILE, lambda *_: None)


@pytest.mark.parametrize("across", [True, False])
def test_a_recipe_is_pruned_to_the_speedup_that_it_asks_for(match: Match, across: bool) -> None:
    posed = match.contest.problem
    graph, dense = posed.graph, posed.graph.macs(posed.graph.dense)
    choice = Recipe(2.11, across).made(posed)
    assert choice is not None
    assert 2.11 <= dense / graph.macs(choice) < 2.7
    assert not choice.removed
    shares = {choice.keep[w.name] / w.size for w in graph.cuttable}
    assert (max(shares) - min(shares) > 0.2) == across  # else each layer loses the same, up to a channel


def test_a_recipe_of_a_share_narrows_every_width_by_it_in_whole_steps(match: Match) -> None:
    posed = match.contest.problem
    for name, by in (("uniform 25%", None), ("uniform 25%, round_to 8", 8)):
        recipe = Recipe(0.25, round_to=by)
        assert recipe.name == name
        choice = recipe.made(posed)
        assert choice is not None
        for width in posed.graph.cuttable:
            left = width.size * 3 // 4
            assert choice.keep[width.name] == (left // by * by if by else left)


def test_what_torch_pruning_cannot_reach_is_no_network(match: Match) -> None:
    assert Recipe(1e4, across=True, round_to=16).made(match.contest.problem) is None


def test_ours_is_within_the_macs_and_faster(match: Match) -> None:
    posed, judge = match.contest.problem, match.contest.judge
    theirs = Recipe(2.11, across=True).made(posed)
    assert theirs is not None
    wanted = posed.graph.macs(theirs)
    ours = match.at_macs(wanted)
    assert ours is not None
    assert 0.85 * wanted <= posed.graph.macs(ours) <= wanted
    costing = posed.graph.choice({name: -(-count // 16) * 16 for name, count in theirs.keep.items()})
    assert judge.latency(ours) < judge.latency(costing)
    without = match.contest.ours(None, planner.Limits(macs=wanted))
    assert without is not None
    assert judge.latency(ours) <= judge.latency(without)
    assert match.at_macs(2) is None


def test_ours_at_a_latency_is_dense_from_the_dense_one_on_and_absent_below_the_floor(match: Match) -> None:
    assert match.at_latency(1.3, lambda *_: None) == match.contest.problem.graph.dense
    assert match.at_latency(1e-6, lambda *_: None) is None


@pytest.mark.parametrize("slower", [1.0, 1.2, 0.8])
def test_ours_at_a_latency_is_planned_again_while_it_misses(
    match: Match, monkeypatch: pytest.MonkeyPatch, slower: float
) -> None:
    """Networks take longer than the table says, or less."""
    asked, judge = list[float](), match.contest.judge

    def measured(place: object, choice: Choice, progress: object) -> float:
        asked.append(judge.latency(choice) * slower)
        return asked[-1]

    monkeypatch.setattr(macs, "measured", measured)
    within = match.contest.ours(0.6)
    assert within is not None
    wanted = judge.latency(within) + 1e-9
    choice = match.at_latency(wanted, lambda *_: None)
    assert choice is not None
    off = [abs(each / wanted - 1) for each in asked]
    assert judge.latency(choice) * slower == asked[off.index(min(off))]
    assert len(asked) == 1 if slower == 1.0 else 1 < len(asked) <= macs.TRIES
    assert min(off) < 0.1


def test_rows_are_measured_kept_and_not_measured_again(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, told = tmp_path / "log.json", io.StringIO()
    stage = Stage(Console(file=told, width=200))
    recipes = (Recipe(0.5), Recipe(1e4, across=True))

    def run() -> list[record.Row]:
        return macs.run(subject, ["onnxruntime", "openvino"], recipes, log=record.Log(log), seconds=QUICK, stage=stage)

    (row,) = run()
    assert (row["network"], row["recipe"], row["runtime"]) == ("tiny", "uniform 50%", "onnxruntime")
    assert row["same_macs"] is not None
    assert row["same_latency"] is not None
    for own in (row, row["same_macs"], row["same_latency"]):
        gain = own["speedup"]
        assert gain["low"] <= gain["value"] <= gain["high"]
        assert own["efficiency"] == pytest.approx(gain["value"] / own["macs_speedup"])
        assert 0 < own["kept"] <= 1
    assert row["same_macs"]["macs_speedup"] >= row["macs_speedup"] > 2
    assert "torch-pruning ends before global 10000x" in told.getvalue()
    assert list(json.loads(log.read_text()).values()) == [row]
    monkeypatch.setattr(macs.Match, "row", None)  # nothing is measured twice
    assert run() == [row]

    record.add("macs", [row], command="c", key=("network", "recipe", "runtime"), folder=tmp_path)
    text = render.rendered("<!-- evidence: macs -->\n<!-- end of evidence -->", tmp_path)
    assert f"| tiny, uniform 50% | {row['macs_speedup']:.2f}x | {row['speedup']['value']:.2f}x ±" in text
    own = row["same_latency"]
    assert f"| {row['kept']:.0%} | {own['kept']:.0%} at {own['macs_speedup']:.2f}x MACs (" in text
