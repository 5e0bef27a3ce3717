"""Latency tables are fitted well, and one that lacks an entry or belongs to something else is refused."""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import planner
import profiles
from planner import LatencyTable
from planner.candidates import candidates
from planner.graph import Graph, trace
from planner.latency import Probe, Reload, Rules, cross_validated, fit, forecast, keys
from planner.operations import Choice
from planner.roofline import EXPECTED_ERROR
from profiles import Profile
from profiles.errors import PlanError
from tools.examples import cifar10, imagenet
from tools.examples.resnet import ResNet

from . import nets
from .nets import PIXELS, conv, example, table_of

INPUTS = (torch.ones(PIXELS),)


def _true_costs(graph: Graph, options: Mapping[str, Sequence[int]]) -> dict[tuple[str, int, int], float]:
    """Return costs that are a rate per kind of operation times the work, plus a launch, with a step every 4 outputs."""
    dice = random.Random(0)
    rate = {operation.signature: dice.uniform(0.5, 2.0) * 1e-10 for operation in graph.operations}
    macs = {operation.signature: operation.macs_per_pair for operation in graph.operations}
    return {
        (signature, inputs, outputs): 2e-6 + rate[signature] * macs[signature] * inputs * -(-outputs // 4) * 4
        for signature, inputs, outputs in keys(graph, options)
    }


def _one_at_a_time(graph: Graph, options: Mapping[str, Sequence[int]]) -> list[Choice]:
    return [graph.choice({name: count}) for name, counts in options.items() for count in counts]


def _at_random(graph: Graph, options: Mapping[str, Sequence[int]], count: int, *, seed: int) -> list[Choice]:
    dice = random.Random(seed)
    return [
        graph.choice(
            {name: dice.choice(counts) for name, counts in options.items()},
            frozenset(block.name for block in graph.blocks if dice.random() < 0.3),
        )
        for _ in range(count)
    ]


def _measured_choice(graph: Graph, table: LatencyTable, choice: Choice, *, noise: float) -> Probe:
    return _probe(choice, table.latency(graph, choice) * (1 + noise), table.latency(graph, graph.dense))


def _probe(choice: Choice, seconds: float, dense_s: float) -> Probe:
    about = {"relative": seconds / dense_s, "ci95_s": (seconds, seconds), "runs": 1}
    return Probe(keep=dict(choice.keep), removed=tuple(sorted(choice.removed)), latency_s=seconds, **about)


def _inner(graph: Graph, profile: Profile) -> dict[str, tuple[int, ...]]:
    """Return the candidates of widths inside blocks: streams, which touch every operation, take more networks."""
    return {name: counts for name, counts in candidates(graph, profile).items() if not graph.width[name].is_stream}


@pytest.mark.parametrize(("noise", "allowed"), [(0.0, 0.01), (0.01, 0.03)])
def test_fitting_recovers_an_additive_cost_model(noise: float, allowed: float) -> None:
    graph = trace(ResNet(2, (16, 24, 32)), INPUTS)
    options = {name: (*counts[2:-1:4], counts[-1]) for name, counts in _inner(graph, nets.anywhere()).items()}
    truth = table_of(graph, _true_costs(graph, options))
    errors = np.random.default_rng(0)
    probes = [
        _measured_choice(graph, truth, choice, noise=noise * errors.standard_normal())
        for choice in [*_one_at_a_time(graph, options), *_at_random(graph, options, 24, seed=1)]
    ]
    fitted = fit(graph, nets.anywhere(), keys(graph, options), probes)
    found = table_of(graph, {}, **dict(fitted))
    unseen = _at_random(graph, options, 40, seed=2)
    wrong = [found.latency(graph, choice) / truth.latency(graph, choice) - 1 for choice in unseen]
    assert np.abs(wrong).mean() < allowed
    assert {(e.operation, e.inputs, e.outputs) for e in fitted.entries} == set(keys(graph, options))
    assert all(entry.latency_s >= 0 for entry in fitted.entries)
    told = cross_validated(graph, nets.anywhere(), probes)
    assert len(told) == len(probes)
    assert np.abs(told).mean() < 2 * allowed


def test_what_slowed_all_networks_of_a_turn_is_not_taken_for_their_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace(ResNet(2, (16, 24, 32)), INPUTS)
    profile, options = nets.anywhere(), _inner(graph, nets.anywhere())
    truth, unseen = table_of(graph, _true_costs(graph, options)), _at_random(graph, options, 40, seed=2)
    probes = []
    for turn, slower in enumerate((0.06, -0.05, 0.05, -0.06)):  # beside a dense network of 1.0 to 1.3 times its time
        choices, drift = _at_random(graph, options, 10, seed=10 + turn), 1 + turn / 10
        times = [truth.latency(graph, choice) * (1 + slower) * drift for choice in choices]
        dense_s = truth.latency(graph, graph.dense) * drift
        probes += [_probe(choice, time, dense_s) for choice, time in zip(choices, times, strict=True)]

    def wrong() -> float:
        found = table_of(graph, {}, **dict(fit(graph, profile, keys(graph, options), probes)))
        share = np.array([found.latency(graph, choice) / truth.latency(graph, choice) for choice in unseen])
        return float(np.abs(share / np.median(share) - 1).mean())

    aware = wrong()
    monkeypatch.setattr("planner.kriging.TURN", 0.0)
    assert aware < 0.7 * wrong()


def test_a_plan_knows_of_weights_that_no_cache_keeps() -> None:
    model, profile = ResNet(2, (16, 24, 32)).eval(), nets.anywhere()
    graph = trace(model, INPUTS)
    costs, all_of_them = _true_costs(graph, candidates(graph, profile)), graph.weights(graph.dense)
    plain = table_of(graph, costs)
    each_s = plain.latency(graph, graph.dense) / all_of_them
    reloads = [Reload(beyond=share * all_of_them, each_s=each_s) for share in (0.6, 0.2)]
    table = table_of(graph, costs, reloads=tuple(reloads))
    for share in (0.9, 0.6, 0.3, 0.15):
        found = planner.plan(model, INPUTS, profile, table=table, latency=share)
        choice, before = found.choice, planner.plan(model, INPUTS, profile, table=plain, latency=share).choice
        assert found.predicted.fraction == pytest.approx(
            table.latency(graph, graph.choice(choice.keep, choice.removed)) / table.latency(graph, graph.dense)
        )
        assert found.predicted.fraction <= share + 1e-6
        assert found.proof.status == "optimal"
        for width in found.widths:
            at = width.considered.index(width.keep) if width.keep else None
            assert at is None or width.fractions[at] == pytest.approx(found.predicted.fraction)
        if share > 0.2:  # reloads weigh more in the dense latency than in that of what is left
            assert graph.weights(choice) != graph.weights(before)


# --- widths between those of the table ----------------------------------------------------------------------------

ORT = "x86_64_v4.onnxruntime.fp32"


@cache
def stairs() -> tuple[Graph, LatencyTable]:
    """A net of two convolutions that takes three times what the rules say, and a table of 40 of its widths."""
    graph = trace(nn.Sequential(conv(32, 64), nn.ReLU(), conv(64, 32)), (torch.ones(1, 32, 16, 16),))
    rules, profile = Rules(profiles.load(ORT)), profiles.load(ORT)
    widths = [*range(16, 65, 16), *np.random.default_rng(0).integers(1, 65, 36).tolist()]
    choices = [graph.choice({"0": width}) for width in widths]
    probes = [_probe(c, 3 * rules.latency(graph, c), 3 * rules.latency(graph, graph.dense)) for c in choices]
    return graph, table_of(graph, {}, **dict(fit(graph, profile, keys(graph, {"0": (64,)}), probes)), profile=ORT)


@pytest.mark.parametrize("width", range(9, 65))
def test_a_step_of_the_device_stays_one_between_two_entries(width: int) -> None:
    graph, table = stairs()
    choice, dense = graph.choice({"0": width}), graph.dense
    rules = Rules(profiles.load(ORT))
    expected = rules.latency(graph, choice) / rules.latency(graph, dense)
    assert table.latency(graph, choice) / table.latency(graph, dense) == pytest.approx(expected, rel=0.03)


def test_an_operation_that_differs_from_its_like_is_told_from_them() -> None:
    graph = trace(ResNet(2, (16, 16, 16)), INPUTS)
    profile, free = nets.anywhere(), {w.name: range(1, w.size + 1) for w in graph.cuttable if not w.is_stream}
    rules, slow = Rules(profile), graph.operations[2]

    def true_s(choice: Choice) -> float:
        present = (o for o in graph.operations if o.present(choice))
        return sum(rules.cost(o, *o.widths(choice)) * (1.3 if o.signature == slow.signature else 1) for o in present)

    probes = [_probe(c, true_s(c), true_s(graph.dense)) for c in _at_random(graph, free, 40, seed=1)]
    table = table_of(graph, {}, **dict(fit(graph, profile, keys(graph, free), probes)))
    unseen = _at_random(graph, free, 20, seed=2)
    assert max(abs(table.latency(graph, c) / true_s(c) - 1) for c in unseen) < 0.03


def _wrong(graph: Graph, options: Mapping[str, Sequence[int]], true_s: Callable[[Choice], float]) -> float:
    """Return the mean error on unseen networks of a table that is fitted to 60 others."""
    probes = [_probe(c, true_s(c), true_s(graph.dense)) for c in _at_random(graph, options, 60, seed=1)]
    table = table_of(graph, {}, **dict(fit(graph, profiles.load(ORT), keys(graph, options), probes)), profile=ORT)
    unseen = _at_random(graph, options, 40, seed=2)
    return float(np.abs([table.latency(graph, c) / true_s(c) - 1 for c in unseen]).mean())


def test_weights_that_no_cache_keeps_take_time_that_no_operation_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace(ResNet(2, (64, 128, 256)), INPUTS)
    options = _inner(graph, profiles.load(ORT))
    truth, kept = table_of(graph, _true_costs(graph, options)), graph.weights(graph.dense) / 3
    monkeypatch.setattr("planner.kriging.CACHES", (4 * kept,))
    each_s = truth.latency(graph, graph.dense) / graph.weights(graph.dense)

    def true_s(choice: Choice) -> float:
        return truth.latency(graph, choice) + each_s * max(0.0, graph.weights(choice) - kept)

    aware = _wrong(graph, options, true_s)
    assert aware < 0.03
    monkeypatch.setattr("planner.kriging.CACHES", ())
    assert aware < 0.2 * _wrong(graph, options, true_s)


def test_tensors_that_no_cache_holds_take_time_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace(ResNet(2, (16, 32, 64)), INPUTS)
    profile, options = profiles.load(ORT), _inner(graph, profiles.load(ORT))
    truth, rules = table_of(graph, _true_costs(graph, options)), Rules(profile)
    most = max(rules.load(o, *o.widths(graph.dense)).activation_bytes for o in graph.operations)
    monkeypatch.setattr("planner.kriging.CACHES", (most / 2,))
    each_s = 3 * truth.latency(graph, graph.dense) / most / len(graph.operations)

    def true_s(choice: Choice) -> float:
        moved = (rules.load(*made).activation_bytes for made in graph.under(choice))
        return truth.latency(graph, choice) + each_s * sum(max(0.0, own - most / 2) for own in moved)

    aware = _wrong(graph, options, true_s)
    assert aware < 0.01
    monkeypatch.setattr("planner.kriging.CACHES", ())
    assert aware < 0.5 * _wrong(graph, options, true_s)


def _other_penalty(profile: Profile, penalty: float) -> Profile:
    rules = [rule.model_copy(update={"penalty": penalty}) if rule.penalty else rule for rule in profile.granularity]
    return profile.model_copy(update={"granularity": tuple(rules)})


@pytest.mark.parametrize(("penalty", "off_grid", "allowed"), [(1.9, 4, 0.1), (4.0, 8, 0.15)])
def test_what_calibration_did_not_measure_is_predicted_beside_the_grid(
    penalty: float, off_grid: int, allowed: float
) -> None:
    graph, profile = trace(ResNet(2, (16, 32, 64)), (torch.ones(1, 3, 16, 16),)), profiles.load(ORT)
    rules, rate = Rules(_other_penalty(profile, penalty)), {"conv2d": 1.7, "linear": 4.0}

    def true_s(choice: Choice) -> float:
        present = (o for o in graph.operations if o.present(choice))
        return 1e-6 + sum(rate[o.kind] * rules.cost(o, *o.widths(choice)) for o in present)

    options = _inner(graph, profile)
    free = {name: range(1, graph.width[name].size + 1) for name in options}
    wanted = [*_one_at_a_time(graph, options), *_at_random(graph, options, 8, seed=1)]
    wanted += _at_random(graph, free, off_grid, seed=3)
    probes = [_probe(choice, true_s(choice), true_s(graph.dense)) for choice in wanted]
    table = table_of(graph, {}, **dict(fit(graph, profile, keys(graph, options), probes)), profile=ORT)
    errors = [abs(table.latency(graph, c) / true_s(c) - 1) for c in _at_random(graph, free, 20, seed=2)]
    assert max(errors) < allowed


@pytest.mark.parametrize(
    ("model", "share", "expected"),
    [
        (cifar10.resnet56, {"inner": 0.5}, 1.65),  # 2.0x fewer multiply-accumulates
        (cifar10.resnet56, {"inner": 0.99, "stream": 0.99}, 0.71),  # 15, 31 and 63 channels
        (imagenet.mobilenet_v2, {"inner": 0.9}, 1 / 1.5),
    ],
)
def test_rules_alone_know_what_was_measured_on_avx512(
    model: Callable[[], nn.Module], share: Mapping[str, float], expected: float
) -> None:
    pixels = 32 if model is cifar10.resnet56 else 224
    graph, rules = trace(model(), (torch.ones(1, 3, pixels, pixels),)), Rules(profiles.load(ORT))
    kind = {w.name: "stream" if w.is_stream else "inner" for w in graph.cuttable}
    kept = {name: int(graph.width[name].size * share[k]) for name, k in kind.items() if k in share}
    gain = rules.latency(graph, graph.dense) / rules.latency(graph, graph.choice(kept))
    assert gain == pytest.approx(expected, rel=0.16)


def test_an_operation_that_the_table_lacks_is_refused() -> None:
    _, table = stairs()
    other = trace(conv(8, 8, 5), (torch.ones(1, 8, 4, 4),))
    with pytest.raises(PlanError, match=r"no entry for conv2d 5x5 .* 8->8"):
        table.latency(other, other.dense)


def test_a_missing_entry_of_an_unknown_profile_is_refused_with_the_operation() -> None:
    model, graph = example("VGG")
    options = candidates(graph, nets.anywhere())
    cost = dict.fromkeys(keys(graph, options), 1e-3)
    missing = next(key for key in cost if key[1:] == (8, 6))
    del cost[missing]
    with pytest.raises(PlanError, match=rf"no entry for {missing[0]} 8->6 \(3\); run `espalier calibrate`"):
        planner.plan(model, INPUTS, nets.anywhere(), latency=0.5, table=table_of(graph, cost))


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"fingerprint": "0" * 16}, "made for another model or input shape"),
        ({"profile": "x86_64_v4.onnxruntime.fp32"}, "measured for profile x86_64_v4.onnxruntime.fp32, not any.pytorch"),
    ],
)
def test_a_table_of_something_else_is_refused(about: dict[str, str], said: str) -> None:
    model, graph = example("VGG")
    cost = dict.fromkeys(keys(graph, candidates(graph, nets.anywhere())), 1e-3)
    with pytest.raises(PlanError, match=said):
        planner.plan(model, INPUTS, nets.anywhere(), latency=0.5, table=table_of(graph, cost, **about))


def test_a_table_survives_its_file_and_a_spoilt_one_is_refused(tmp_path: Path) -> None:
    graph = example("VGG")[1]
    table = table_of(graph, dict.fromkeys(keys(graph, candidates(graph, nets.anywhere())), 1e-3))
    path = tmp_path / "table.json"
    table.save(path)
    assert LatencyTable.load(path) == table
    path.write_text(path.read_text().replace("0.001", "0.002", 1))
    with pytest.raises(PlanError, match=r"was edited after it was written.*espalier calibrate"):
        LatencyTable.load(path)


@pytest.mark.parametrize(("errors", "half"), [((), 0.0), ((0.01, -0.01), 4.3027 * 0.01), ((0.02,) * 6, 2.4469 * 0.02)])
def test_the_prediction_interval_is_students(errors: tuple[float, ...], half: float) -> None:
    table = LatencyTable(
        profile="p", runtime="r", runtime_version="1", device="d", threads=1, created="now", fingerprint="f",
        overhead_s=0.0, rates={}, entries=(), probes=(), errors=errors,
    )  # fmt: skip
    assert table.uncertainty == pytest.approx(half, rel=1e-4)


def test_a_forecast_says_what_it_rests_on_and_how_far_to_trust_it() -> None:
    graph, table = stairs()
    half, rules = graph.choice({"0": 32}), Rules(profiles.load(ORT))
    found = forecast(rules, graph, half)
    assert (found.basis, found.expected_error) == ("documented", EXPECTED_ERROR)
    assert found.trust == f"documented, expected error {EXPECTED_ERROR:.1%}"
    assert (found.low, found.high) == rules.fractions(graph, half)
    assert found.low <= found.fraction <= found.high
    untested = forecast(table, graph, half)
    assert (untested.basis, untested.expected_error, untested.low) == ("measured here", None, untested.high)
    assert untested.trust == "measured here, expected error unknown"
    judged = table.model_copy(update={"errors": (0.01, -0.01)})
    tested = forecast(judged, graph, half)
    assert (tested.basis, tested.expected_error) == ("measured here", 0.01)
    assert tested.high / tested.fraction == pytest.approx(1 + judged.uncertainty)
    assert tested.low / tested.fraction == pytest.approx(1 - judged.uncertainty)


def test_why_a_table_cannot_tell_other_widths_is_said(caplog: pytest.LogCaptureFixture) -> None:
    graph = trace(conv(3, 8), (torch.ones(1, 3, 8, 8),))
    operation = graph.operations[0]
    widths = operation.widths(graph.dense)
    table = table_of(graph, {(operation.signature, *widths): 1e-3}, rates={"launch": 1.0})
    assert table.cost(operation, *widths) == 1e-3
    with pytest.raises(PlanError, match="the latency table has no entry for"):
        table.cost(operation, widths[0], widths[1] - 1)
    assert "the table's profile is not known here" in caplog.text
    assert "any.pytorch.fp32" in caplog.text
