"""One budget for all widths: the program follows the weights until both agree; training ends on its last plan."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import planner
import profiles
from backends.rebuild import rebuild
from planner import Agreement, Plan, Problem, Recipe
from planner.agreement import AGREED
from planner.groups import group
from planner.structures import Depth, Filter
from profiles.errors import PlanError
from tools.examples.resnet import ResNet

from . import nets
from .nets import PIXELS, looking_trained
from .test_train import Noisy

INPUTS = (torch.ones(PIXELS),)
BUDGET = 0.5
WHOLE = planner.Scope(removes_blocks=False)


def fresh() -> nn.Module:
    """Return a residual net with three stages of one block."""
    return looking_trained(ResNet(1, (8, 16, 16)))


def posed(scope: planner.Scope | None = None) -> Problem:
    return planner.problem(fresh(), INPUTS, nets.anywhere(), scope=scope)


def agreement(*, every: int = 1) -> Agreement:
    return Agreement.of(posed(WHOLE), BUDGET, every=every)


def kept(plan: Plan, model: nn.Module) -> dict[str, int]:
    """Return how many channels of each width are not zero."""
    graph, parameters = plan.graph(model), dict(model.named_parameters())
    alive = {w.name: group([Filter(graph.width[w.name])], model).norms(parameters) > 0 for w in plan.widths}
    return {name: int(own.sum()) for name, own in alive.items()}


def trained(own: Agreement, model: nn.Module, *, epochs: int, steps: int) -> planner.Proximal:
    """Train with a loop of one's own."""
    optimizer, data = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), Noisy()
    proximal = own.attach(model, optimizer, steps=steps)
    for epoch in range(epochs):
        data.set_epoch(epoch)
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
        own.after_epoch()
    return proximal


@pytest.mark.parametrize("steps", [4, 40])
def test_training_ends_on_the_last_plan_within_the_budget(steps: int) -> None:
    own, model = agreement(), fresh()
    (before,) = (pool for pool in planner.with_global_budget(own.plan, model).pools if pool.structure == "filter")
    assert len(before.members) > 1
    proximal = trained(own, model, epochs=8, steps=steps)
    assert (proximal.frozen, own.settled) == (True, True)
    assert own.plan.predicted.fraction <= BUDGET * (1 + 1e-6)
    assert own.plan.importance == "norms in training"
    assert 0 <= own.plan.proof.objective <= 1
    assert kept(own.plan, model) == own.plan.choice.keep
    assert all(width.keep in width.considered for width in own.plan.widths)
    assert all(len(pool.members) == 1 for pool in own.plan.pools)
    small = rebuild(own.plan, model)
    assert small.get_submodule("layer3.0.conv1").out_channels == own.plan.choice.keep["layer3.0.conv1"]
    agreed = len(own.rounds) >= AGREED and not any(each.moved for each in own.rounds[-AGREED:])
    assert f"solved again {len(own.rounds)} times: {'agreed' if agreed else 'did not agree'}" in own.plan.notes[-1]
    assert agreed == (steps == 40)


def test_the_program_follows_the_weights() -> None:
    own, model = agreement(), fresh()
    before = own.plan.choice.keep
    own.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=100)
    shared = own.plan.pools[0]
    weak = max((w for w in own.plan.widths), key=lambda w: w.keep - min(w.considered))
    structure = group([Filter(own.graph.width[weak.name])], model)
    factors = torch.full((weak.dense,), 1e-3)
    factors[: min(weak.considered)] = 1.0
    structure.scale_(dict(model.named_parameters()), factors)
    own.after_epoch()
    assert own.plan.choice.keep[weak.name] < before[weak.name]
    assert own.rounds[0].moved >= before[weak.name] - own.plan.choice.keep[weak.name]
    assert own.rounds[0].apart < own.rounds[0].moved  # WGSEF sees the same weights
    assert own.plan.pools[0].name == shared.name == "global"
    assert own.plan.pools[0].costs != shared.costs
    assert dict(zip(own.plan.pools[0].members, own.plan.pools[0].weights, strict=True)) == dict(
        zip(shared.members, shared.weights, strict=True)
    )


def test_it_is_solved_every_few_epochs_until_it_agrees() -> None:
    own, model = agreement(every=2), fresh()
    own.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=100)
    solved = []
    for _ in range(10):
        own.after_epoch()
        solved.append(len(own.rounds))
    first = own.rounds[0].moved > 0
    assert solved[:4] == [0, 1, 1, 2]
    assert solved[-1] == AGREED + first
    assert own.settled


def test_blocks_stay_where_the_first_plan_has_them() -> None:
    problem = posed()
    graph = problem.graph
    options = problem.options()
    losses = planner.magnitude(problem.model, graph, options)
    leaving = "layer2.0"
    chosen = planner.Importance(
        "by hand", losses.widths, {block.name: 10.0 * (block.name != leaving) for block in graph.blocks}, {}
    )
    own, model = Agreement.of(problem, BUDGET, importance=chosen, every=1), fresh()
    assert own.plan.choice.removed == {leaving}
    group([Depth(graph.block["layer1.0"])], model).scale_(dict(model.named_parameters()), torch.tensor([1e-6]))
    trained(own, model, epochs=6, steps=20)
    assert own.plan.choice.removed == {leaving}
    assert 0 <= own.plan.proof.objective <= 1
    ended = group([Depth(graph.block[leaving])], model).norms(dict(model.named_parameters()))
    assert not ended.any()
    rebuild(own.plan, model)


def test_layers_stay_trimmed_as_the_first_plan_says() -> None:
    profile, model = profiles.load("x86_64_v4.onnxruntime.fp32"), looking_trained(ResNet(1, (32, 64, 64)))
    scope = planner.Scope(removes_blocks=False, force=True)
    problem = planner.problem(model, (torch.ones(1, 3, 16, 16),), profile, scope=scope)
    losses = planner.magnitude(model, problem.graph, problem.options())
    free = "layer1.0.conv1.weight kernel"
    widths = {**losses.widths, free: dict.fromkeys(losses.widths[free], 0.0)}
    own = Agreement.of(problem, 0.4, importance=replace(losses, widths=widths), every=1)
    trimmed = {trim.name: trim.keep for trim in own.plan.trims}
    assert trimmed[free] == 1
    trained(own, model, epochs=4, steps=18)
    assert {trim.name: trim.keep for trim in own.plan.trims} == trimmed
    assert own.plan.importance == "norms in training"
    rebuild(own.plan, model)


def test_an_interrupted_training_ends_the_same(tmp_path: Path) -> None:
    first = agreement()

    def run(until: int, checkpoint: Path) -> tuple[Agreement, nn.Module]:
        own, model = Agreement(first.graph, first.plan, first.solve, every=1), fresh()
        planner.fit(model, Noisy(until=until), Recipe(8, lr=0.02), plan=own, checkpoint=checkpoint)
        return own, model

    whole, model = run(99, tmp_path / "whole.safetensors")
    for until in (1, 3):  # before it agrees, and again later
        with pytest.raises(KeyboardInterrupt):
            run(until, tmp_path / "parts.safetensors")
    own, again = run(99, tmp_path / "parts.safetensors")
    assert (own.plan.choice, own.plan.pools, own.rounds) == (whole.plan.choice, whole.plan.pools, whole.rounds)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(PlanError, match="belongs to another training"):
        planner.fit(fresh(), Noisy(), Recipe(8, lr=0.02), plan=whole.first, checkpoint=tmp_path / "parts.safetensors")


def test_another_importance_may_decide() -> None:
    problem = posed(WHOLE)
    options, asked = problem.options(), []

    def random(model: nn.Module) -> planner.Importance:
        asked.append(copy.deepcopy(model.state_dict()))
        return planner.at_random(problem.graph, options)

    own = Agreement.of(problem, BUDGET, every=1)
    own.importance = random
    trained(own, fresh(), epochs=4, steps=24)
    assert own.plan.importance == "random 0"
    assert len(asked) == len(own.rounds)
    assert own.plan.choice == problem.solve(BUDGET, importance=planner.at_random(problem.graph, options)).choice


def test_what_is_wrong_says_so() -> None:
    with pytest.raises(PlanError, match="every is 0; it must be at least 1 epoch"):
        agreement(every=0)
    own, model = agreement(), fresh()
    own.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=100)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(PlanError, match="training diverged: weights not finite at step 0"):
        own.after_epoch()
