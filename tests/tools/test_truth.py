"""Plans are held against what was measured: tried again while they miss, logged, and judged by the limits."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import planner
import profiles
from planner import LatencyTable
from planner.candidates import candidates
from planner.graph import trace
from planner.latency import Probe, keys
from planner.operations import Choice
from profiles.errors import EspalierError
from tests.planner.nets import table_of
from tools import truth
from tools.console import Stage
from tools.examples.resnet import ResNet
from tools.truth import BUDGETS, NEAR, TRIES, Case

PROFILE = profiles.load("x86_64_v4.onnxruntime.fp32")
SHAPE = (3, 8, 8)
QUIET = Console(quiet=True)


def tiny() -> nn.Module:
    return ResNet(1, (16, 32, 32))


class Device:
    """Stands for the machine: narrow networks take longer than its first tables say, by less in every table."""

    def __init__(self, *off: float) -> None:
        self.off, self.graph = list(off), trace(tiny().eval(), (torch.ones(1, *SHAPE),))
        self.built: list[Choice] = []
        wanted = keys(self.graph, candidates(self.graph, PROFILE))
        self.costs = {key: 1e-9 * (100 + key[1] * key[2]) for key in wanted}

    def tabled(self, off: float) -> LatencyTable:
        """Return a table that holds narrow layers for faster by a factor."""
        costs = {key: cost * (off if key[2] < 32 else 1.0) for key, cost in self.costs.items()}
        return table_of(self.graph, costs, profile=PROFILE.id, overhead_s=1e-9)

    def bench(self, model: nn.Module, inputs: Any, profile: Any) -> "Device":
        return self

    def calibrate(self, place: Any, *, progress: Any) -> LatencyTable:
        return self.tabled(self.off[0])

    def measure_choices(self, place: Any, wanted: Sequence[Choice], *, progress: Any) -> list[Probe]:
        self.built += wanted
        exact = self.tabled(1.0)
        shares = [exact.latency(self.graph, c) / exact.latency(self.graph, self.graph.dense) for c in wanted]
        return [
            Probe(keep=dict(c.keep), removed=(), latency_s=s, relative=s, ci95_s=(s, s), runs=1)
            for c, s in zip(wanted, shares, strict=True)
        ]

    def refined(self, place: Any, table: LatencyTable, choice: Choice, *, progress: Any) -> tuple[LatencyTable, float]:
        return self.tabled(self.off[min(len(self.built), len(self.off) - 1)]), 0.0


def device(monkeypatch: pytest.MonkeyPatch, *off: float) -> Device:
    found = Device(*off)
    for name in ("bench", "calibrate", "measure_choices", "refined"):
        monkeypatch.setattr(truth, name, getattr(found, name))
    monkeypatch.setattr(truth, "NETWORKS", {"tiny": (tiny, SHAPE)})
    monkeypatch.setattr(truth, "profile_for", lambda runtime: PROFILE if runtime == "onnxruntime" else None)
    return found


def reachable(machine: Device) -> float:
    """Return a budget that a network of so few widths meets exactly."""
    model, inputs = tiny().eval(), (torch.ones(1, *SHAPE),)
    return planner.plan(model, inputs, PROFILE, latency=0.7, table=machine.tabled(1.0)).predicted.fraction + 1e-6


def tries(budget: float) -> list[dict[str, Any]]:
    found = truth.tried(Case("tiny", "onnxruntime", budget), tiny, PROFILE, SHAPE, Stage(QUIET))
    assert isinstance(found, list)
    return found


def test_a_right_table_needs_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = device(monkeypatch, 1.0)
    budget = reachable(machine)
    (only,) = tries(budget)
    assert only["measured"] == pytest.approx(only["planned"])
    assert only["of_budget"] == pytest.approx(only["measured"] / budget) == pytest.approx(1.0, abs=NEAR)
    (built,) = machine.built
    assert {name: built.keep[name] for name in only["kept"]} == only["kept"]
    assert sorted(built.removed) == only["removed"]


def test_a_plan_that_steps_keep_below_its_budget_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = device(monkeypatch, 1.0)
    model, inputs, table = tiny().eval(), (torch.ones(1, *SHAPE),), machine.tabled(1.0)
    plans = {b: planner.plan(model, inputs, PROFILE, latency=b, table=table) for b in (0.7, 0.75, 0.8, 0.85, 0.9, 0.94)}
    budget = next(b for b, plan in plans.items() if plan.predicted.fraction < b * (1 - 2 * NEAR))
    (only,) = tries(budget)
    assert only["of_budget"] < 1 - NEAR
    assert only["measured"] == pytest.approx(only["planned"])


def test_a_miss_is_tried_again_until_it_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = device(monkeypatch, 0.3, 0.6, 1.0)
    found = tries(reachable(machine))
    assert 1 < len(found) == len(machine.built) <= 1 + TRIES
    assert found[0]["of_budget"] > 1 + NEAR
    assert all(abs(each["of_budget"] - 1) > NEAR for each in found[:-1])
    assert abs(found[-1]["of_budget"] - 1) <= NEAR


def test_no_more_than_three_tries_follow_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, 0.3)
    assert len(tries(0.7)) == 1 + TRIES


def test_the_log_is_gone_on_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine, file = device(monkeypatch, 1.0), tmp_path / "truth.json"
    monkeypatch.setattr(truth, "BUDGETS", (0.7, 0.8))

    def run(plans: int, runtimes: str = "onnxruntime") -> list[str]:
        truth.run(file, networks="tiny", runtimes=runtimes, plans=plans, console=QUIET)
        return list(json.loads(file.read_text()))

    assert run(1) == ["tiny onnxruntime 0.7"]
    first = json.loads(file.read_text())
    built = len(machine.built)
    assert run(5, "openvino,onnxruntime") == ["tiny onnxruntime 0.7", "tiny onnxruntime 0.8"]
    assert json.loads(file.read_text())["tiny onnxruntime 0.7"] == first["tiny onnxruntime 0.7"]
    built = len(machine.built)
    assert len(run(5)) == 2
    assert len(machine.built) == built


@pytest.mark.parametrize(
    ("ratios", "good"),
    [
        ([1.0] * 9 + [0.9], True),  # nine tenths within 5 %, and the other is faster
        ([1.0] * 8 + [0.9, 0.9], False),
        ([1.0] * 9 + [1.09], True),
        ([1.0] * 9 + [1.11], False),  # slower by more than a tenth
        ([], False),
    ],
)
def test_limits(ratios: list[float], good: bool, capsys: pytest.CaptureFixture[str]) -> None:
    early = {"measured": 0.9, "planned": 0.5, "of_budget": 1.8}
    log = {str(i): [early, {"measured": 0.5 * r, "planned": 0.5, "of_budget": r}] for i, r in enumerate(ratios)}
    assert truth.told(log) is good
    near, slow = sum(abs(r - 1) <= NEAR for r in ratios), sum(r > 1.1 for r in ratios)
    told = capsys.readouterr().out
    assert f"{len(ratios)} plans: {near} within 5% of the budget" in " ".join(told.split())
    assert f"{slow} slower by more than 10%" in " ".join(told.split())
    assert told.count("measured 0.900 (planned 0.500), ") == len(ratios)


def test_cases_are_networks_runtimes_and_budgets() -> None:
    found = list(truth.cases("resnet20,vit_tiny", "onnxruntime,openvino"))
    assert len(found) == 4 * len(BUDGETS)
    assert found[0].key == f"resnet20 onnxruntime {BUDGETS[0]:g}"
    assert len({case.key for case in found}) == len(found)
    with pytest.raises(EspalierError, match="no network 'alexnet'; there are resnet20"):
        list(truth.cases("alexnet", "onnxruntime"))
