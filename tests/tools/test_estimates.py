"""Tables of a compiler's estimates say what they are, hold what it said, and are refused where it is another one."""

from functools import cache
from pathlib import Path

import pytest
import torch

import profiles
from planner.candidates import candidates
from planner.graph import Graph
from planner.latency import ESTIMATE, LatencyTable, forecast
from planner.operations import Choice
from planner.roofline import Rules
from planner.search import plan
from profiles.errors import BackendUnavailable, PlanError
from tools import calibrate as calibration
from tools.calibrate import Bench, bench, calibrate, elsewhere, measure_choices
from tools.examples.resnet import ResNet

PROFILE = profiles.load("ethos-u55-128.vela.int8")
INPUTS = (torch.ones(1, 3, 8, 8),)
estimates = pytest.importorskip("tools.estimates", reason="pip install 'espalier[ethos-u]'")


@pytest.fixture(scope="module")
def place() -> Bench:
    try:
        return bench(ResNet(1, (16, 32, 32)).eval(), INPUTS, PROFILE)
    except BackendUnavailable as error:
        pytest.skip(str(error))


@cache
def rules() -> Rules:
    return Rules(PROFILE)


class Compiler:
    """Stands for the compiler: says what the rules say, operation by operation, and counts what it was asked."""

    asked = 0
    broken_after = 10**6

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @classmethod
    def of(cls, place: Bench) -> "Compiler":
        return cls(place.graph)

    def __call__(self, choice: Choice) -> object:
        Compiler.asked += 1
        if Compiler.asked > Compiler.broken_after:
            raise KeyboardInterrupt
        present = [o for o in self.graph.operations if o.macs_per_pair and o.present(choice)]
        taken = [(o.signature, *o.widths(choice), rules().cost(o, *o.widths(choice))) for o in present]
        return estimates.Estimated(latency_s=sum(row[3] for row in taken), operations=tuple(taken))


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Compiler]:
    monkeypatch.setattr(estimates, "Estimator", Compiler)
    monkeypatch.setattr(calibration, "user_cache_path", lambda name: tmp_path / name)
    Compiler.asked, Compiler.broken_after = 0, 10**6
    return Compiler


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total, what


def test_a_table_holds_what_the_compiler_says_and_says_so(place: Bench) -> None:
    table = calibrate(place, progress=quiet)
    assert table.method == ESTIMATE
    assert "Vela" in table.runtime_version
    assert table.device.startswith("ethos-u55-128")
    dense = place.graph.dense
    assert table.latency(place.graph, dense) == pytest.approx(Compiler(place.graph)(dense).latency_s)  # type: ignore[attr-defined]
    assert table.mean_error < 0.02  # the stand-in is the rules, by which the table fills its gaps
    assert table.mean_error == pytest.approx(sum(map(abs, table.errors)) / len(table.errors))


def test_fractions_are_of_what_the_compiler_says_of_the_dense_network(place: Bench) -> None:
    """Its operations may take more there than in the networks beside it, such as where they are run in cascades."""
    table, graph = calibrate(place, progress=quiet), place.graph
    first, *rest = table.probes
    assert graph.choice(first.keep, frozenset(first.removed)) == graph.dense
    longer = first.model_copy(update={"latency_s": 1.2 * first.latency_s})
    other = table.model_copy(update={"probes": (longer, *rest)})
    assert other.latency(graph, graph.dense) == longer.latency_s
    made = plan(place.model, INPUTS, PROFILE, latency=0.7, table=other)
    kept = graph.choice(made.choice.keep, made.choice.removed)
    assert made.predicted.fraction == pytest.approx(table.latency(graph, kept) / longer.latency_s)
    assert made.predicted.fraction <= 0.7 * (1 + 1e-6)
    (limit,) = made.limits
    assert (limit.dense, limit.budget) == (longer.latency_s, pytest.approx(0.7 * longer.latency_s))


def test_every_candidate_of_a_width_is_compiled(place: Bench) -> None:
    options = candidates(place.graph, PROFILE)
    wanted = estimates.design(place.graph, options)
    for name, counts in options.items():
        assert set(counts) <= {choice.keep[name] for choice, judges in wanted if not judges}
    assert any(choice.removed for choice, judges in wanted if judges)


def test_an_interrupted_calibration_goes_on_where_it_was(place: Bench) -> None:
    total = len(estimates.design(place.graph, candidates(place.graph, PROFILE)))
    Compiler.broken_after = 5
    with pytest.raises(KeyboardInterrupt):
        calibrate(place, progress=quiet)
    Compiler.broken_after = 10**6
    calibrate(place, progress=quiet)
    assert Compiler.asked == total + 1  # the sixth was asked twice
    calibrate(place, progress=quiet)
    assert Compiler.asked == total + 1


def test_choices_are_estimated_relative_to_the_dense_network(place: Bench) -> None:
    (probe,) = measure_choices(place, [place.graph.dense], progress=quiet)
    assert probe.relative == 1.0


def test_a_plan_from_estimates_names_them_as_its_basis(place: Bench) -> None:
    table = calibrate(place, progress=quiet)
    made = plan(place.model, INPUTS, PROFILE, latency=0.7, table=table)
    assert made.predicted.basis == "estimated by the compiler"
    whole = place.graph.choice(made.choice.keep, made.choice.removed)
    assert forecast(table, place.graph, whole).basis == "estimated by the compiler"


def test_a_table_of_another_compiler_or_batch_is_refused(place: Bench) -> None:
    table = calibrate(place, progress=quiet)
    assert elsewhere(table, PROFILE, INPUTS) == []
    older = table.model_copy(update={"runtime_version": "1.0, Vela 1.0"})
    with pytest.raises(PlanError, match=r"estimated by 1\.0, Vela 1\.0"):
        elsewhere(older, PROFILE, INPUTS)
    assert elsewhere(older, PROFILE, INPUTS, any_table=True)
    with pytest.raises(PlanError, match="batch"):
        elsewhere(table, PROFILE, (torch.ones(2, 3, 8, 8),))
    measured: LatencyTable = table.model_copy(update={"method": "calibrate"})
    with pytest.raises(PlanError, match="it was measured"):
        elsewhere(measured, PROFILE, INPUTS)


def test_a_refined_table_is_right_on_the_planned_network(place: Bench) -> None:
    table = calibrate(place, progress=quiet)
    choice = place.graph.choice(dict.fromkeys(candidates(place.graph, PROFILE), 7), frozenset())
    better, _ = calibration.refined(place, table, choice, progress=quiet)
    assert better.latency(place.graph, choice) == pytest.approx(Compiler(place.graph)(choice).latency_s)  # type: ignore[attr-defined]
