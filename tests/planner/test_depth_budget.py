"""How many blocks leave is given, which ones is decided by the weights: trained, rebuilt, saved and loaded."""

from pathlib import Path

import pytest
import torch
from torch import nn

import planner
from backends import load_pruned, rebuild, save_pruned
from planner import Plan
from planner.document import with_depth_budget
from planner.pools import leaving
from profiles.errors import PlanError
from tools.examples.resnet import ResNet
from tools.given import given

SHAPE = (2, 3, 16, 16)


def fresh() -> nn.Module:
    return ResNet(2, (8, 8, 16), seed=1).eval()


def planned(model: nn.Module, keep: int) -> Plan:
    return with_depth_budget(given(planner.trace(model, (torch.ones(SHAPE),)), {}), model, keep)


def test_a_pool_over_all_blocks_compares_mean_squares() -> None:
    pool = planned(fresh(), 4).pools[-1]
    assert pool.members == ("layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1")
    assert pool.weights == (0.5, 0.5, 0.5, 0.5, 1.0, 1.0)
    assert (pool.structure, pool.budget, set(pool.costs)) == ("depth", 4, {1.0})


@pytest.mark.parametrize("weakest", [("layer1.1", "layer3.0"), ("layer2.0", "layer2.1")])
def test_the_weakest_blocks_leave_and_nothing_else_changes(weakest: tuple[str, str], tmp_path: Path) -> None:
    model = fresh()
    for name in weakest:
        model.get_parameter(f"{name}.bn2.weight").data.mul_(0.1)
    plan = planned(model, 4)
    assert planner.harden_(plan, model) == 2
    assert leaving(plan, model, plan.graph(model)) == set(weakest)
    dense = rebuild(plan, model)
    gone = {name for name in dict(model.named_parameters()) if name not in dict(dense.named_parameters())}
    assert {name for name in gone if "conv2" in name} == {f"{name}.conv2.weight" for name in weakest}
    x = torch.randn(SHAPE)
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-5)
    save_pruned(plan, dense, tmp_path)
    assert torch.equal(load_pruned(fresh, tmp_path).eval()(x), dense.eval()(x))


def test_training_decides_and_ends_on_the_budget() -> None:
    model = fresh().train()
    plan = planned(model, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    planner.attach(plan, model, optimizer, steps=20)
    x, y = torch.randn(SHAPE), torch.tensor([1, 2])
    for _ in range(24):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert len(leaving(plan, model, plan.graph(model))) == 3
    model.eval()
    torch.testing.assert_close(rebuild(plan, model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", [0, 6, 7])
def test_a_number_that_leaves_nothing_to_decide_is_refused(keep: int) -> None:
    with pytest.raises(PlanError, match=rf"6 blocks of the model can leave, of which {keep} cannot stay"):
        planned(fresh(), keep)


def test_a_plan_that_removes_blocks_itself_is_refused() -> None:
    model = fresh()
    plan = planned(model, 4)
    blocks = tuple(block.model_copy(update={"removed": block.name == "layer2.1"}) for block in plan.blocks)
    with pytest.raises(PlanError, match=r"the plan removes layer2\.1 itself"):
        with_depth_budget(plan.model_copy(update={"blocks": blocks, "pools": ()}), model, 4)
