"""Importance says what a cut costs, and measuring it leaves no trace."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import planner
from backends.rebuild import cut
from planner.graph import trace
from planner.groups import group
from planner.importance import (
    at_random,
    batchnorm_scale,
    calibrated_cross_entropy,
    magnitude,
    measured,
    questions,
    supplied,
    taylor,
)
from planner.structures import Filter
from profiles.errors import PlanError
from tools.examples.resnet import ResNet

from . import nets
from .nets import PIXELS, Sum, conv, looking_trained, masked

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(12, 3, 8, 8, generator=GENERATOR), torch.arange(12) % 5),
    (torch.randn(4, 3, 8, 8, generator=GENERATOR), torch.arange(4) % 5),
]


def blocks_net() -> nn.Module:
    """Two blocks of one stage and a frozen addition."""
    blocks = [Sum(conv(6, 4), nn.ReLU(), conv(4, 6), nn.BatchNorm2d(6)) for _ in range(3)]
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    return looking_trained(nn.Sequential(conv(3, 6), *blocks, *head))


def mean_loss(model: nn.Module) -> float:
    """Return the mean loss over all samples, BatchNorm by the statistics of each batch; nothing here drops out."""
    with torch.no_grad():
        losses = [len(y) * float(cross_entropy(copy.deepcopy(model).train()(x), y)) for x, y in BATCHES]
    return sum(losses) / sum(len(y) for _, y in BATCHES)


def options(model: nn.Module) -> tuple[planner.Graph, dict[str, tuple[int, ...]]]:
    """Return the graph, and every number of channels of each width, the stream's included, as a candidate."""
    graph = trace(model, (torch.ones(PIXELS),))
    return graph, {width.name: tuple(range(1, width.size + 1)) for width in graph.cuttable}


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = looking_trained(ResNet(1, (6, 6, 6))).train()
    model.get_submodule("bn1").eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    graph, candidates = options(model)
    measured(model, graph, candidates, BATCHES, loss=cross_entropy)
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert tensor.numpy().tobytes() == before[name].numpy().tobytes()  # -0.0 is not 0.0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_without_variance_is_refused_with_the_remedy() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5)).eval()
    graph, candidates = options(model)
    with pytest.raises(PlanError, match="give larger batches"):
        measured(model, graph, candidates, [(x[:1], y[:1]) for x, y in BATCHES], loss=cross_entropy)
    assert not model[2].training
    assert model[2].track_running_stats


def test_a_cut_costs_what_it_says() -> None:
    model = blocks_net()
    graph, candidates = options(model)
    found = measured(model, graph, candidates, BATCHES, loss=cross_entropy)
    base = mean_loss(model)
    assert found.name == "measured"
    for block in graph.blocks:
        rise = max(0.0, mean_loss(masked(model, graph, {}, [block.name])) - base)
        assert found.blocks[block.name] == pytest.approx(rise, abs=1e-5)
    for name, rises in found.widths.items():
        size = graph.width[name].size
        assert rises[size] == 0
        assert list(rises) == list(range(size, 0, -1))
        assert list(rises.values()) == sorted(rises.values())
        subsets = itertools.combinations(range(size), size - 1)
        ones = [max(0.0, mean_loss(masked(model, graph, {name: torch.tensor(kept)})) - base) for kept in subsets]
        assert any(rises[size - 1] == pytest.approx(one, abs=1e-5) for one in ones)


def test_the_best_temperature_is_that_of_a_search() -> None:
    outputs, targets = 7 * torch.randn(40, 6, generator=GENERATOR), torch.arange(40) % 6  # sure, and mostly wrong
    sharp = outputs + 20 * torch.nn.functional.one_hot(targets, 6)  # sure, and mostly right
    for given in (outputs, sharp, outputs / 30):
        fine = min(float(cross_entropy(given * 10 ** (power / 500), targets)) for power in range(-2000, 250))
        assert float(calibrated_cross_entropy(given, targets)) == pytest.approx(min(fine, math.log(6)), rel=5e-3)
    assert float(calibrated_cross_entropy(outputs, targets)) <= math.log(6) + 1e-6
    assert math.log(6) < float(cross_entropy(outputs, targets))
    assert float(calibrated_cross_entropy(sharp, targets)) <= float(cross_entropy(sharp, targets)) + 1e-6


def test_the_taylor_score_spares_channels_that_matter() -> None:
    model = blocks_net()
    graph, candidates = options(model)
    name = next(iter(candidates))
    model = masked(model, graph, {name: torch.tensor([1, 3])})  # the others are worth nothing
    found = measured(model, graph, candidates, BATCHES, loss=cross_entropy)
    assert found.widths[name][2] == pytest.approx(0, abs=1e-6)
    assert set(found.scores[name].topk(2).indices.tolist()) == {1, 3}
    assert found.scores[name][1] > 1e-4 < found.scores[name][3]


def test_gamma_reproduces_the_joint_loss() -> None:
    model = blocks_net()
    graph, candidates = options(model)
    found = measured(model, graph, candidates, BATCHES, loss=cross_entropy)
    (stage,) = {block.stage for block in graph.blocks}
    names = sorted(found.blocks, key=lambda name: found.blocks[name])[:2]  # the cheaper half, of three
    together = mean_loss(masked(model, graph, {}, names)) - mean_loss(model)
    alone = sum(found.blocks[name] for name in names)
    assert alone + found.stages[stage] * len(names) ** 2 == pytest.approx(max(alone, together), abs=1e-4)


def test_every_measurement_is_an_answer_and_is_not_made_twice() -> None:
    model = blocks_net()
    graph, candidates = options(model)
    answers: dict[str, float] = {}
    first = measured(model, graph, candidates, BATCHES, loss=cross_entropy, answers=answers)
    assert len(answers) == questions(graph, candidates)
    known = {question: answer + 1 for question, answer in answers.items()}
    again = measured(model, graph, candidates, BATCHES, loss=cross_entropy, answers=known)
    assert again.blocks == {name: rise + 1 for name, rise in first.blocks.items()}


def test_loss_after_a_cut_is_that_of_the_masked_network() -> None:
    model = blocks_net()
    graph, candidates = options(model)
    found = measured(model, graph, candidates, BATCHES, loss=cross_entropy)
    plan = planner.plan(model, (torch.ones(PIXELS),), nets.anywhere(), latency=0.6, importance=found)
    before = copy.deepcopy(model.state_dict())
    after = planner.loss_after(model, graph, plan, found, BATCHES, loss=cross_entropy)
    kept = {w.name: found.scores[w.name].topk(w.keep).indices for w in plan.widths if 0 < w.keep < w.dense}
    small = cut(model, graph, kept, plan.choice.removed)
    assert after == pytest.approx(mean_loss(small), rel=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_to_cut_is_measured_as_nothing() -> None:
    model, graph = nets.example("tied weights")
    found = measured(model, graph, {}, BATCHES, loss=cross_entropy)
    assert (found.widths, found.blocks, found.stages) == ({}, {}, {})


def test_magnitude_is_the_share_of_the_squared_norm_that_goes() -> None:
    model = blocks_net()
    graph, candidates = options(model)
    found = magnitude(model, graph, candidates)
    for name, counts in candidates.items():
        squares = group([Filter(graph.width[name])], model).norms(dict(model.named_parameters())).square()
        weakest_first = squares.sort().values
        for count in counts:
            lost = float(weakest_first[: len(squares) - count].sum() / squares.sum())
            assert found.widths[name][count] == pytest.approx(lost, abs=1e-5)
    assert set(found.blocks) == {block.name for block in graph.blocks}
    assert found.stages == {graph.blocks[0].stage: 0.5}


def test_a_plan_takes_measured_importance() -> None:
    model = blocks_net()
    graph, candidates = options(model)
    found = measured(model, graph, candidates, BATCHES, loss=cross_entropy)
    plan = planner.plan(model, (torch.ones(PIXELS),), nets.anywhere(), latency=0.6, importance=found)
    assert plan.importance == "measured"
    assert plan.predicted.fraction <= 0.6


def test_scores_are_the_share_that_is_cut() -> None:
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.1, -0.4, 0.2, 0.3]))
    graph = trace(model, (torch.ones(PIXELS),))
    found = batchnorm_scale(model, graph, {"0": (1, 2, 3, 4)})
    assert found.widths["0"] == pytest.approx({4: 0, 3: 0.1, 2: 0.3, 1: 0.6})
    assert found.scores["0"].tolist() == pytest.approx([0.1, 0.4, 0.2, 0.3])
    own = supplied("mine", {"0": torch.tensor([5.0, 3, 1, 1])}, graph, {"0": (2, 4)})
    assert (own.name, own.widths["0"]) == ("mine", pytest.approx({4: 0, 2: 0.2}))
    one, same, other = (at_random(graph, {"0": (1, 4)}, seed=seed) for seed in (0, 0, 1))
    assert one.widths == same.widths != other.widths
    for bad in ({}, {"0": torch.ones(3)}, {"0": torch.tensor([1.0, 1, 1, -1])}):
        with pytest.raises(PlanError, match="'mine' needs 4 scores of 0 or more for 0"):
            supplied("mine", bad, graph, {"0": (2, 4)})
    bare = nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    with pytest.raises(PlanError, match="0 has no normalisation with a scale"):
        batchnorm_scale(bare, trace(bare, (torch.ones(PIXELS),)), {"0": (2, 4)})


def test_taylor_is_the_gradient_times_the_weights_of_what_goes() -> None:
    model = blocks_net()
    graph = trace(model, (torch.ones(PIXELS),))
    name = next(width.name for width in graph.cuttable if not width.is_stream)
    found = taylor(model, graph, {name: (1, 3, 4)}, BATCHES, loss=cross_entropy)
    scores = torch.zeros(graph.width[name].size)
    for x, y in BATCHES:
        own = copy.deepcopy(model).eval()
        cross_entropy(own(x), y).backward()
        total = torch.zeros_like(scores)
        for tensor, parameter in own.named_parameters():
            if any(s.tensor == tensor and s.penalised for s in graph.width[name].slices):
                total += (
                    (parameter * parameter.grad).detach().flatten(1).sum(1)
                    if parameter.dim() > 1
                    else (parameter * parameter.grad).detach()
                )
        scores += total.abs()
    ranked = scores.sort().values
    expected = {1: float(ranked[:3].sum()), 3: float(ranked[:1].sum()), 4: 0.0}
    assert found.widths[name] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert all(cost > 0 for cost in found.blocks.values())


def test_a_power_of_losses_keeps_what_half_a_stage_costs() -> None:
    model = blocks_net()
    graph, candidates = options(model)
    found = replace(taylor(model, graph, candidates, BATCHES, loss=cross_entropy), stages={graph.blocks[0].stage: 0.3})
    (stage,) = found.stages
    cheap = sorted(found.blocks.values())[:2]  # the cheaper half, of three
    for power in (0.5, 1.0, 2.0):
        raised = found.raised(power, graph)
        assert raised.widths == {w: {n: loss**power for n, loss in own.items()} for w, own in found.widths.items()}
        assert raised.blocks == {name: loss**power for name, loss in found.blocks.items()}
        together = (sum(cheap) + 4 * 0.3) ** power
        lone = sum(loss**power for loss in cheap)
        assert lone + 4 * raised.stages[stage] == pytest.approx(max(lone, together))
        assert raised.name == {0.5: "taylor^0.5", 1.0: "taylor", 2.0: "taylor^2"}[power]
    assert found.raised(1.0, graph).stages == pytest.approx(found.stages)
