"""The planner's benchmark times what it says, tells misses from what holds, and writes every row."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from tools import bench_planner as bench
from tools.bench_planner import Clock, Timed
from tools.examples.resnet import ResNet
from tools.rivalry import Kept


def tiny() -> nn.Module:
    return ResNet(1, (16, 32, 64))


def test_losses_that_are_drawn_rise_as_widths_shrink() -> None:
    problem = bench.posed(tiny)
    first, again, other = (bench.drawn(problem, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert next(problem.model.parameters()).is_meta
    for name, losses in first.widths.items():
        assert losses[problem.graph.width[name].size] == 0
        ordered = [losses[count] for count in sorted(losses)]
        assert ordered == sorted(ordered, reverse=True)
    assert first.blocks.keys() == {block.name for block in problem.graph.blocks if not block.frozen}


def test_a_plan_is_timed_on_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock.of("tiny", tiny, devices=(bench.PROFILE, *bench.OTHERS))
    ticks = iter([10.0, 12.5])
    monkeypatch.setattr(bench.time, "process_time", lambda: next(ticks))
    row = clock.time("all", 0.7, limit_s=2.0)
    assert (row.network, row.what, row.seconds, row.holds) == ("tiny", "all", 2.5, False)
    plan = clock.problem.solve(dict.fromkeys(clock.problem.costs, 0.7), importance=clock.importance)
    assert [own.name for own in plan.limits] == [bench.PROFILE, *bench.OTHERS]
    assert all(own.planned <= own.budget * (1 + 1e-6) for own in plan.limits)
    fresh = clock.fresh()
    assert (fresh.problem._solved, fresh.problem.graph) == ({}, clock.problem.graph)
    assert clock.problem._solved


def test_rows_hold_within_time_and_gap() -> None:
    def row(seconds: float, gap: float, limit_s: float | None, limit_gap: float = 0.0) -> Timed:
        return Timed("net", "plan", seconds, gap, "optimal", limit_s, limit_gap)

    assert row(1.0, 0.0, 2.0).holds
    assert not row(3.0, 0.0, 2.0).holds
    assert not row(1.0, 0.001, 2.0).holds
    assert row(1.0, 0.001, 2.0, 0.005).holds
    assert row(99.0, 1.0, None).holds
    cells = [list(column.cells) for column in bench._time_table([row(3.0, 0.0, 2.0), row(1.0, 0.0, None)]).columns]
    assert cells[2:4] == [["3.00", "1.00"], ["2.0 missed", ""]]


def test_every_kind_of_plan_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "EXACT", {"tiny": tiny})
    monkeypatch.setattr(bench, "LARGE", {"large": tiny})
    monkeypatch.setattr(bench, "BUDGETS", (0.7,))
    monkeypatch.setattr(bench, "SWEEP", (0.7, 0.8))
    monkeypatch.setattr(bench.imagenet, "resnet50", tiny)
    rows = list(bench.times())
    assert [row.network for row in rows] == ["tiny", "ResNet-50", "ResNet-50", "ResNet-50", "large"]
    assert [row.limit_s for row in rows[:3]] == [bench.EXACT_S, bench.POINT_S, bench.POINT_S]
    assert "three devices" in rows[3].what
    assert rows[4].limit_gap == bench.LARGE_GAP
    assert all(row.gap <= row.limit_gap and row.seconds > 0 for row in rows)


@pytest.mark.parametrize(("theirs", "code"), [(0.5, 0), (0.7, 1)])
def test_rows_are_written_and_a_miss_is_exit_1(
    theirs: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Contest:
        @staticmethod
        def of(network: str, profile: str, table: Any = None) -> Any:
            return type("", (), {"predicted": lambda _: [Kept(network, profile, 0.5, "uniform", 0.6, theirs)]})()

    monkeypatch.setattr(bench.rivalry, "Contest", Contest)
    app, threads = typer.Typer(), torch.get_num_threads()
    app.command()(bench.main)
    done = CliRunner().invoke(app, ["--only", "rivals", "--networks", "a,b", "--json", str(tmp_path / "rows.json")])
    torch.set_num_threads(threads)
    assert done.exit_code == code, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())["rivals"]
    assert [(row["network"], row["profile"]) for row in rows] == [
        (network, profile) for network in ("a", "b") for profile in (bench.PROFILE, bench.OTHERS[1])
    ]
    assert f"{0.6 / theirs - 1:+.1%}" in done.output
