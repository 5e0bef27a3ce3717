"""Every kind of structure trains to its budget through the same code: group-id maps, norms, prox, exact zeros."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import planner
from planner.graph import Graph, trace
from planner.groups import group
from planner.pools import Share, flush_, pooled
from planner.prox import Proximal, Schedule
from planner.structures import NM, Block, Channel, Depth, Filter, FilterShape, Kernel, Rows, Structure, Weight
from profiles.errors import PlanError
from tools.examples.resnet import ResNet

from .nets import looking_trained

IMAGES = (torch.ones(2, 3, 8, 8),)
STEPS = 40


@dataclass(frozen=True)
class Case:
    """A structure on a net, its budget, and how many of its weights that leaves."""

    structure: Callable[[Graph], Structure]
    budget: float
    pools: int = 1


CONV = "layer1.0.conv1.weight"  # 8 x 8 x 3 x 3
CASES = {
    "filter": Case(lambda graph: Filter(graph.width["layer1.0.conv1"]), 3),
    "stream": Case(lambda graph: Filter(graph.width["conv1"]), 5),
    "block of channels": Case(lambda graph: Block(graph.width["layer1.0.conv1"], 4), 1),
    "uneven blocks": Case(lambda graph: Block(graph.width["layer1.0.conv1"], 3), 2),
    "depth": Case(lambda graph: Depth(graph.block["layer1.0"]), 0),
    "input channel": Case(lambda graph: Channel("layer1.0.conv2.weight", 8), 5),
    "filter shape": Case(lambda graph: FilterShape(CONV, (8, 3, 3)), 30),
    "border of a kernel": Case(lambda graph: Kernel(CONV, (3, 3), inner=1), 0),
    "single weight": Case(lambda graph: Weight(CONV, 576), 100),
    "2:4": Case(lambda graph: NM(CONV, 576, 2, 4), 2, pools=144),
    "1:8": Case(lambda graph: NM(CONV, 576, 1, 8), 1, pools=72),
}


def trained(model: nn.Module, share: Share, inputs: Tensor, *, debiased: bool, optimizer: str) -> Proximal:
    """Train on random targets with the proximal steps of one share, and on after the support is fixed."""
    kinds = {"SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), "Adam": lambda p: torch.optim.Adam(p, lr=2e-3)}
    made = kinds[optimizer](model.parameters())
    proximal = Proximal(pooled([share], model), model, Schedule(STEPS), debiased=debiased, optimizer=made)
    made.register_step_post_hook(lambda *_: proximal.step())
    goal = torch.randn(model(inputs).shape, generator=torch.Generator().manual_seed(1))
    for _ in range(STEPS + 5):
        made.zero_grad()
        nn.functional.mse_loss(model(inputs), goal).backward()
        made.step()
    return proximal


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("debiased", [True, False], ids=["de-biased", "convex"])
@pytest.mark.parametrize("kind", CASES)
def test_every_kind_trains_to_its_budget(kind: str, debiased: bool, optimizer: str) -> None:
    case = CASES[kind]
    model = looking_trained(ResNet(1, (8, 8, 8)))
    structure = case.structure(trace(model, IMAGES))
    inputs = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    proximal = trained(model, Share.of(structure, case.budget), inputs, debiased=debiased, optimizer=optimizer)
    assert proximal.frozen
    groups = group([structure], model)
    parameters = dict(model.named_parameters())
    norms = groups.norms(parameters)
    assert int((norms > 0).sum()) == case.budget * case.pools
    if case.pools > 1:  # N of every M along the input axis
        runs = parameters[CONV].detach().movedim(1, -1).reshape(case.pools, -1)
        assert ((runs != 0).sum(1) == case.budget).all()
    for member in groups.members:
        weights = parameters[member.tensor].detach()
        gone = (norms == 0)[member.ids.clamp_max(groups.count - 1)] & (member.ids < groups.count)
        assert (weights[gone.expand_as(weights)] == 0).all()


def test_heads_train_to_their_budget() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 3).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(mixed.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = Attention()
    heads = Rows(("qkv.weight", "qkv.bias"), count=4, size=3)
    trained(model, Share.of(heads, 2), torch.randn(2, 5, 12), debiased=True, optimizer="SGD")
    rows = model.qkv.weight.detach().view(3, 4, -1).abs().sum((0, 2)) + model.qkv.bias.detach().view(3, 4, 3).abs().sum(
        (0, 2)
    )
    assert int((rows > 0).sum()) == 2


def test_shares_of_several_structures_split_one_budget() -> None:
    model = looking_trained(ResNet(1, (8, 8, 8)))
    graph = trace(model, IMAGES)
    filters = tuple(Filter(graph.width[f"layer{i}.0.conv1"]) for i in (1, 2, 3))
    share = Share("all", filters, (1.0, 0.5, 0.25), (1e-3, 2e-3, 4e-3), 0.02)
    trained(model, share, torch.randn(4, 3, 8, 8), debiased=True, optimizer="SGD")
    state = pooled([share], model)
    spent = float(state.costs(state.groups.norms(dict(model.named_parameters())) > 0)[0])
    assert 0.02 - 4e-3 < spent <= 0.02 * (1 + 1e-9)


def test_an_nm_pattern_that_does_not_divide_is_refused() -> None:
    with pytest.raises(PlanError, match="does not divide"):
        NM(CONV, 577, 2, 4)
    model = looking_trained(ResNet(1, (8, 8, 8)))
    with pytest.raises(PlanError, match=r"conv1\.weight has 3 inputs"):
        pooled([Share.of(NM("conv1.weight", 216, 2, 4), 2)], model)


def test_budgets_can_fall_from_everything_to_the_target() -> None:
    schedule = Schedule(10, anneal=0.5)
    target, full = torch.tensor([4.0]), torch.tensor([8.0])
    found = [float(schedule.budgets(t, target, full)) for t in range(11)]
    assert found[0] == 8
    assert found[:6] == sorted(found[:6], reverse=True)
    assert found[5:] == [4.0] * 6


def test_the_convex_form_takes_weight_decay_off_what_it_penalises(caplog: pytest.LogCaptureFixture) -> None:
    model = looking_trained(ResNet(1, (8, 8, 8)))
    graph = trace(model, IMAGES)
    from tools.bench_training import quarter

    plan = quarter(model, IMAGES).model_copy(update={"debiased": False})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-2)
    with caplog.at_level(logging.WARNING):
        planner.attach(plan, model, optimizer)
    assert "weight decay taken off" in caplog.text
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    parameters = dict(model.named_parameters())
    assert decays[id(parameters["layer1.0.conv1.weight"])] == 0
    assert decays[id(parameters["conv1.weight"])] == 1e-2
    assert len(decays) == len(parameters)
    assert graph.fingerprint == plan.fingerprint


def test_no_subnormal_is_left() -> None:
    model = nn.BatchNorm1d(4)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1.0, 1e-39, -1e-45, 2e-38]))
        model.running_var.copy_(torch.tensor([1e-40, 1.0, 1.0, 1.0]))
    flush_(model)
    for tensor in (model.weight, model.running_var):
        size = tensor.detach().abs()
        assert not ((size > 0) & (size < torch.finfo(torch.float32).tiny)).any()
    assert model.weight[3] == torch.tensor(2e-38)
