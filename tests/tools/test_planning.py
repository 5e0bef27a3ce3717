"""A plan's network is measured before training; where the table was off there it learns, and the plan is made again."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import pytest
import torch
from rich.console import Console

import profiles
from planner import (
    Graph,
    Importance,
    LatencyTable,
    Problem,
    at_random,
    calibrated_cross_entropy,
    loss_after,
    magnitude,
    taylor,
    trace,
)
from planner.candidates import candidates
from planner.latency import Key, Probe, keys
from planner.operations import Choice
from tools import planning
from tools.console import Stage
from tools.examples.resnet import ResNet
from tools.outcome import Try
from tools.planning import (
    CLOSE,
    CONTROL,
    DEPTH_PRICES,
    DRAWS,
    NOISE,
    POWERS,
    REPLANS,
    Brief,
    Settling,
    contest,
    control,
)

from ..planner.nets import anywhere, looking_trained, table_of
from . import tiny

PROFILE = profiles.load("x86_64_v4.onnxruntime.fp32")
INPUTS = (torch.ones(1, 1, 16, 16),)
BUDGET = 0.6


class Device:
    """A runtime in which narrow convolutions take longer than the table says."""

    def __init__(self, factor: float) -> None:
        self.model = tiny.model().eval()
        self.graph: Graph = trace(self.model, INPUTS)
        self.wanted = keys(self.graph, candidates(self.graph, PROFILE))
        believed = {key: 1e-9 * (100 + key[1] * key[2]) for key in self.wanted}
        narrow = [key for key in self.wanted if "conv" in key[0] and key[2] in (8, 16)]
        self.costs = {**believed, **{key: factor * believed[key] for key in narrow}}
        self.asked: list[Choice] = []
        self.table = self.tabled(believed)

    def tabled(self, costs: dict[Key, float]) -> LatencyTable:
        return table_of(self.graph, costs).model_copy(update={"profile": PROFILE.id})

    def took(self, choice: Choice) -> float:
        """Return the latency of a network as a fraction of the dense one's."""
        truth = self.tabled(self.costs)
        return truth.latency(self.graph, choice) / truth.latency(self.graph, self.graph.dense)

    def refined(self, _: Any, table: LatencyTable, choice: Choice, *, progress: Any) -> tuple[LatencyTable, float]:
        """Measure, as tools.calibrate.refined does; the table learns the costs of the layers that it saw."""
        full = self.graph.choice(choice.keep, choice.removed)
        self.asked.append(full)
        progress("measured", 1, 1)
        seen = [o for own in (full, self.graph.dense) for o in self.graph.operations if o.present(own)]
        known = {(e.operation, e.inputs, e.outputs): e.latency_s for e in table.entries}
        for own in (full, self.graph.dense):
            known |= {k: self.costs[k] for k in ((o.signature, *o.widths(own)) for o in seen if o.present(own))}
        truth = self.took(full)
        probe = Probe(keep=dict(full.keep), removed=(), latency_s=1.0, relative=truth, ci95_s=(1.0, 1.0), runs=1)
        better = self.tabled(known).model_copy(update={"probes": (*table.probes, probe)})
        said = table.latency(self.graph, full) / table.latency(self.graph, self.graph.dense)
        return better, said / truth - 1


def settling(device: Device, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settling:
    monkeypatch.setattr(planning, "refined", device.refined)
    brief = Brief(device.model, INPUTS, PROFILE, BUDGET, None)
    return Settling(brief, cast(Any, None), device.table, Stage(Console(quiet=True)), folder)


def test_a_missed_budget_is_planned_again_with_what_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(1.3)
    own = settling(device, tmp_path, monkeypatch)
    losses = magnitude(device.model, device.graph, own.posed.options(thrifty=True))
    plan = own.plan(losses)
    assert 1 < len(own.tries) == len(device.asked) <= 1 + REPLANS
    first, last = own.tries[0], own.tries[-1]
    assert first.measured > BUDGET * (1 + CLOSE)
    assert [each.corrected for each in own.tries] == [True] * (len(own.tries) - 1) + [False]
    assert last.predicted == pytest.approx(last.measured, rel=CLOSE)
    assert last.changes
    assert device.took(device.graph.choice(plan.choice.keep, plan.choice.removed)) <= BUDGET * (1 + CLOSE)
    assert plan.predicted.fraction == pytest.approx(last.measured, rel=CLOSE)
    assert [Try.model_validate(each) for each in json.loads((tmp_path / "tries.json").read_text())] == own.tries
    assert LatencyTable.load(tmp_path / "table.json") == own.table != device.table
    asked = len(device.asked)
    assert own.again(losses).choice == plan.choice  # what was measured is not measured again
    assert len(device.asked) == asked
    assert settling(device, tmp_path, monkeypatch).tries == own.tries


def test_a_device_that_no_table_describes_is_measured_four_times_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, plans = Device(1.0), list[Choice]()
    budgets, truths, solve = iter([0.6, 0.58, 0.56, 0.54, 0.52]), iter([0.9, 0.6, 0.8, 0.75, 0.1]), Problem.solve
    own = settling(device, tmp_path, monkeypatch)

    def refined(_: Any, table: LatencyTable, choice: Choice, *, progress: Any) -> tuple[LatencyTable, float]:
        plans.append(choice)
        probe = Probe(keep={}, removed=(), latency_s=1.0, relative=next(truths), ci95_s=(1.0, 1.0), runs=1)
        return table.model_copy(update={"probes": (*table.probes, probe)}), -0.2

    monkeypatch.setattr(planning, "refined", refined)
    losses = magnitude(device.model, device.graph, own.posed.options(thrifty=True))
    monkeypatch.setattr(
        Problem, "solve", lambda posed, *_, importance: solve(posed, next(budgets), importance=importance)
    )
    plan = own.plan(losses)
    assert len(plans) == len(own.tries) == 1 + REPLANS
    assert [each.corrected for each in own.tries] == [True, True, True, False]
    assert [each.measured for each in own.tries] == [0.9, 0.6, 0.8, 0.75]
    assert plan.choice == plans[1]  # the one that exceeds its budget least


def test_the_contest_finds_the_plan_that_leaves_the_best_network() -> None:
    dice = torch.Generator().manual_seed(0)
    batches = [(torch.randn(32, 3, 8, 8, generator=dice), torch.arange(32) % 5) for _ in range(2)]
    model = looking_trained(ResNet(2, (8, 16, 16)))
    brief = Brief(model, (batches[0][0][:1],), anywhere(), 0.5, batches)
    posed = brief.problem(None)
    importance = taylor(model, posed.graph, posed.options(thrifty=True), batches, loss=calibrated_cross_entropy)
    importance = replace(importance, stages=dict.fromkeys(importance.stages, 0.1))  # so that its price matters

    def loses(variant: Importance) -> float:
        plan = posed.solve(0.5, importance=variant)
        return loss_after(model, posed.graph, plan, importance, batches, loss=calibrated_cross_entropy)

    found = contest(brief, posed, importance, Stage(Console(quiet=True)))
    every = [importance.raised(power, posed.graph) for power in POWERS]
    losses = [loses(own.with_depth_priced(price)) for own in every for price in DEPTH_PRICES]
    assert min(losses) - 1e-4 <= loses(found) <= min(losses) + NOISE
    assert max(losses) > min(losses) + 2 * NOISE


def test_the_control_is_the_same_plan_with_random_channels() -> None:
    dice = torch.Generator().manual_seed(0)
    model = looking_trained(ResNet(1, (8, 16, 16)))
    images = [torch.randn(64, 3, 8, 8, generator=dice) for _ in range(2)]
    with torch.no_grad():  # labels that the model knows, so that there is something to lose
        batches = [(x, deepcopy(model).train()(x).argmax(1)) for x in images]
    brief = Brief(model, (batches[0][0][:1],), anywhere(), 0.6, batches)
    posed = brief.problem(None)
    options = posed.options(thrifty=True)
    importance = taylor(model, posed.graph, options, batches, loss=calibrated_cross_entropy)
    plan = posed.solve(0.6, importance=importance)

    def loses(ranking: Importance) -> float:
        return loss_after(model, posed.graph, plan, ranking, batches, loss=calibrated_cross_entropy)

    random = fmean(loses(at_random(posed.graph, options, seed=seed)) for seed in range(DRAWS))
    told = control(brief, posed, plan, importance, Stage(Console(quiet=True)))
    assert told.startswith(CONTROL)
    assert told.endswith(f"the loss is {loses(importance):.3f}, with random channels {random:.3f}")
    assert abs(random - loses(importance)) > 0.001
