"""A rebuilt model with the optimizer's carried state takes the step that the masked model takes."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import ExponentialLR

import backends
from backends.carry import carry_over
from backends.rebuild import cut
from backends.record import KEPT
from backends.shapes import crop, gather
from planner.graph import Graph, trace
from planner.groups import group
from planner.structures import Depth, Filter, FilterShape, Structure
from profiles.errors import PlanError
from tools.examples.resnet import ResNet

from ..planner import nets
from ..planner.nets import PIXELS, conv, looking_trained
from ..zoo.sequences import LSTMClassifier
from .planned import resnet_ready

TOLERANCE = 1e-6
Make = Callable[[nn.Module], Optimizer]


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return a group of matrices and kernels, and one of vectors that learns faster and does not decay."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() < 2], "lr": 0.002, "weight_decay": 0.0},
    ]


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda model: SGD(model.parameters(), lr=0.001, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda model: Adam(model.parameters(), lr=0.003, amsgrad=True),
    "AdamW": lambda model: AdamW(model.named_parameters(), lr=0.003, weight_decay=0.1),
    "RMSprop": lambda model: RMSprop(model.parameters(), lr=0.003, momentum=0.9, centered=True),
    "SGD, two groups": lambda model: SGD(two_groups(model), lr=0.001, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "AdamW, two groups": lambda model: AdamW(two_groups(model), lr=torch.tensor(0.003), weight_decay=0.1),
}
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, frozenset[str]]] = {
    "residual": (lambda: ResNet(2, (8, 12, 16)), torch.ones(PIXELS), frozenset({"layer1.1", "layer2.0"})),
    "graph": (nets.HardView, torch.ones(PIXELS), frozenset()),
    "LSTM": (LSTMClassifier, torch.ones(2, 7, dtype=torch.int64), frozenset()),
    "tied weights": (nets.tied_weights, torch.ones(PIXELS), frozenset()),
    "densely connected": (nets.densely_connected, torch.ones(PIXELS), frozenset()),
}


def inputs(like: Tensor, seed: int) -> Tensor:
    """Return random inputs, of the precision of the models here."""
    generator = torch.Generator().manual_seed(seed)
    if like.is_floating_point():
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return torch.randint(50, like.shape, generator=generator)


def step(model: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    """Train for one step."""
    optimizer.zero_grad()
    out = model.train()(x)
    ((out - 0.3) ** 2 * torch.arange(1, out.shape[1] + 1)).mean().backward()
    optimizer.step()


def holder(model: nn.Module, structures: list[Structure], stay: Tensor) -> Callable[[], None]:
    """Return what sets the groups that do not stay to zero."""
    groups, parameters = group(structures, model), dict(model.named_parameters())
    return lambda: groups.scale_(parameters, stay.float())


def held(model: nn.Module, graph: Graph, kept: Mapping[str, Tensor], removed: frozenset[str]) -> Callable[[], None]:
    """Return what sets all channels but `kept`, and the blocks `removed`, to zero."""
    structures = [*map(Filter, map(graph.width.__getitem__, kept)), *(Depth(graph.block[name]) for name in removed)]
    stay = [torch.zeros(graph.width[name].size).index_fill_(0, own, 1) for name, own in kept.items()]
    return holder(model, structures, torch.cat([*stay, torch.zeros(len(removed))]))


def some(graph: Graph) -> dict[str, Tensor]:
    """Return every other channel of each width, and the second."""
    return {w.name: torch.tensor(sorted({*range(0, w.size, 2), 1})) for w in graph.cuttable if w.size > 2}


def same(found: nn.Module, expected: nn.Module) -> None:
    """Assert that two models hold the same numbers."""
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_the_rebuilt_model_takes_the_step_of_the_masked_one(case: str, name: str) -> None:
    make, example, removed = CASES[case]
    model = looking_trained(make()).double()
    graph = trace(model, (inputs(example, 0),))
    kept = some(graph)
    optimizer, hold = OPTIMIZERS[name](model), held(model, graph, kept, removed)
    for seed in range(3):
        hold()
        step(model, optimizer, inputs(example, seed))
    hold()
    dense = cut(copy.deepcopy(model), graph, kept, removed)
    assert isinstance(dense, torch.fx.GraphModule) == (case == "graph")
    carried = carry_over(optimizer, model, dense, graph=graph)
    carries = [id(p) for own in carried.param_groups for p in own["params"]]
    assert sorted(carries) == sorted(map(id, dense.parameters()))
    fresh = copy.deepcopy(dense)
    new = OPTIMIZERS[name](fresh)
    for seed in (3, 4):
        for net, own in ((model, optimizer), (dense, carried), (fresh, new)):
            step(net, own, inputs(example, seed))
        hold()
        same(dense, cut(model, graph, kept, removed))
    with pytest.raises(AssertionError):  # a new optimizer takes other steps
        same(fresh, dense)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_keep_their_order_options_and_names(name: str) -> None:
    model, graph = copy.deepcopy(nets.example("VGG")[0]), nets.example("VGG")[1]
    optimizer = OPTIMIZERS[name](model)
    optimizer.param_groups[-1]["lr"] = 0.5
    step(model, optimizer, torch.randn(PIXELS))
    dense = cut(model, graph, some(graph))
    carried = carry_over(optimizer, model, dense, graph=graph)
    assert type(carried) is type(optimizer)
    assert carried.defaults.keys() == optimizer.defaults.keys()
    names = [{id(p): name for name, p in net.named_parameters()} for net in (model, dense)]
    for before, after in zip(optimizer.param_groups, carried.param_groups, strict=True):
        assert [names[0][id(p)] for p in before["params"]] == [names[1][id(p)] for p in after["params"]]
        assert {**before, "params": 0} == {**after, "params": 0}
    states = optimizer.state_dict()["state"], carried.state_dict()["state"]
    assert [own.keys() for own in states[0].values()] == [own.keys() for own in states[1].values()]
    held_ = {id(x) for own in optimizer.state.values() for x in own.values() if isinstance(x, Tensor)}
    assert not held_ & {id(x) for own in carried.state.values() for x in own.values()}


def test_rebuild_and_plan_give_what_carrying_needs() -> None:
    plan, model = resnet_ready()
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    with torch.no_grad():
        before = [parameter.clone() for parameter in model.parameters()]
        optimizer.step()
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.copy_(old)
    dense = backends.rebuild(plan, model)
    graph = plan.graph(model)
    carried = carry_over(optimizer, model, dense, graph=graph)
    momenta = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, old in zip(momenta.parameters(), model.parameters(), strict=True):
            parameter.copy_(optimizer.state[old]["momentum_buffer"])
    names = dict(dense.named_parameters())
    assert names.keys() == {name for name, _ in model.named_parameters() if not name.startswith("layer2.1.")}
    kept = {name: vars(dense)[KEPT].get(name, torch.arange(8)) for name in ("layer1.0.conv1", "conv1")}
    assert min(map(len, kept.values())) < 8
    found = carried.state[names["layer1.0.conv1.weight"]]["momentum_buffer"]
    expected = momenta.get_parameter("layer1.0.conv1.weight")[kept["layer1.0.conv1"]]
    assert torch.equal(found, expected[:, kept["conv1"]])


def test_cropped_and_gathered_kernels_take_the_step_of_the_masked_ones() -> None:
    like = torch.ones(2, 3, 9, 9)
    layers = [
        conv(3, 8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 5, padding=2),
        nn.ReLU(),
        conv(6, 4),
        nn.Flatten(),
    ]
    model = looking_trained(nn.Sequential(*layers)).double()
    graph = trace(model, (inputs(like, 0),))
    stay = torch.rand(8, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    stay[:, 0], stay[..., 3:] = False, False
    kept, optimizer = {"0": torch.arange(5)}, Adam(model.parameters(), lr=0.01)
    fibres: list[Structure] = [FilterShape("3.weight", (8, 5, 5)), FilterShape("5.weight", (6, 3, 3))]
    centre = torch.zeros(6, 3, 3, dtype=torch.bool)
    centre[:, 1, 1] = True
    holds = held(model, graph, kept, frozenset()), holder(model, fibres, torch.cat([stay.flatten(), centre.flatten()]))

    def smaller() -> nn.Module:
        for hold in holds:
            hold()
        return gather(crop(cut(model, graph, kept), graph), graph, ["3"])

    smaller()
    step(model, optimizer, inputs(like, 1))
    dense = smaller()
    assert [dense.get_parameter(f"{i}.weight").shape for i in (3, 5)] == [(6, int(stay[:5].sum()), 1, 1), (4, 6, 1, 1)]
    carried = carry_over(optimizer, model, dense, graph=graph)
    for net, own in ((model, optimizer), (dense, carried)):
        step(net, own, inputs(like, 2))
    same(dense, smaller())


def test_the_scale_of_a_root_mean_square_normalisation_is_carried_in_its_new_unit() -> None:
    model = looking_trained(nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 3)))
    graph = trace(model, (torch.ones(2, 6),))
    optimizer = Adam(model.parameters())
    held(model, graph, {"0": torch.arange(2)}, frozenset())()
    step(model, optimizer, torch.randn(2, 6))
    held(model, graph, {"0": torch.arange(2)}, frozenset())()
    dense = cut(model, graph, {"0": torch.arange(2)})
    scale, old = dense.get_parameter("1.weight"), model.get_parameter("1.weight")
    torch.testing.assert_close(scale, 2 * old[:2])  # √(8 / 2)
    found, before = carry_over(optimizer, model, dense, graph=graph).state[scale], optimizer.state[old]
    torch.testing.assert_close(found["exp_avg"], before["exp_avg"][:2] / 2)
    torch.testing.assert_close(found["exp_avg_sq"], before["exp_avg_sq"][:2] / 4)


def test_frozen_missing_and_foreign_parameters_and_empty_groups() -> None:
    model, graph = copy.deepcopy(nets.example("residual, option B")[0]), nets.example("residual, option B")[1]
    model.get_submodule("fc").requires_grad_(False)
    temperature = nn.Parameter(torch.ones(1))
    leaving = list(model.get_submodule("layer1.1").parameters())
    groups = [{"params": leaving}, {"params": [*model.get_submodule("fc").parameters(), temperature], "lr": 0.5}]
    optimizer = Adam([*groups, {"params": [model.get_parameter("conv1.weight")]}], lr=0.1)
    step(model, optimizer, torch.randn(PIXELS))
    temperature.grad = torch.ones(1)
    optimizer.step()
    dense = cut(model, graph, {"conv1": torch.arange(3)}, frozenset({"layer1.1"}))
    carried = carry_over(optimizer, model, dense, graph=graph)
    first, second, third = (group["params"] for group in carried.param_groups)
    assert first == []
    assert [id(p) for p in second] == [id(p) for p in (*dense.get_submodule("fc").parameters(), temperature)]
    assert [id(p) for p in third] == [id(dense.get_parameter("conv1.weight"))]
    assert carried.state.keys() == {temperature, *third}
    assert carried.state[temperature]["step"] == 1
    assert carried.state[temperature]["exp_avg"] is not optimizer.state[temperature]["exp_avg"]
    carried.step()


def test_factored_moments_are_cut_along_the_axes_that_they_have() -> None:
    model, graph = copy.deepcopy(nets.example("VGG")[0]), nets.example("VGG")[1]
    optimizer = Adafactor(model.parameters(), lr=0.01)
    step(model, optimizer, torch.randn(PIXELS))
    dense = cut(model, graph, {"10": torch.arange(5)})
    carried = carry_over(optimizer, model, dense, graph=graph)
    state = carried.state[dense.get_parameter("10.weight")]
    assert (state["row_var"].shape, state["col_var"].shape) == ((5, 1), (1, 160))
    step(dense, carried, torch.randn(PIXELS))


def test_a_scheduler_goes_on() -> None:
    model, graph = copy.deepcopy(nets.example("VGG")[0]), nets.example("VGG")[1]
    optimizer = SGD(model.parameters(), lr=1e-4)
    old = ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        step(model, optimizer, torch.randn(PIXELS))
        old.step()
    dense = cut(model, graph, some(graph))
    carried = carry_over(optimizer, model, dense, graph=graph)
    new = ExponentialLR(carried, 0.5)
    new.load_state_dict(old.state_dict())
    for own, rate in zip(carried.param_groups, old.get_last_lr(), strict=True):
        own["lr"] = rate
    for net, own_optimizer, scheduler in ((model, optimizer, old), (dense, carried, new)):
        step(net, own_optimizer, torch.randn(PIXELS))
        scheduler.step()
    assert carried.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 1e-4 / 16


def test_other_models_and_graphs_are_refused_by_name() -> None:
    model, graph = nets.example("VGG")
    optimizer = SGD(model.parameters(), lr=0.1)
    dense = cut(model, graph, {"0": torch.arange(5)})
    with pytest.raises(PlanError, match="graph has no width 0"):
        carry_over(optimizer, model, dense, graph=nets.example("residual, option B")[1])
    del vars(dense)[KEPT]
    with pytest.raises(
        PlanError, match=r"0.weight has shape \(5, 3, 3, 3\) in the rebuilt model, and not \(8, 3, 3, 3\)"
    ):
        carry_over(optimizer, model, dense, graph=graph)


class Flat(SGD):
    """An optimizer that keeps one vector of all weights, as L-BFGS does."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Keep it."""
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["history"] = parameter.detach().flatten()


class Asking(SGD):
    """An optimizer that cannot be made from its defaults."""

    def __init__(self, parameters: Any, more: int) -> None:
        super().__init__(parameters, lr=0.1)


def test_state_and_optimizers_that_cannot_be_carried_are_refused() -> None:
    model, graph = nets.example("VGG")
    dense = cut(model, graph, {"0": torch.arange(5)})
    flat = Flat(model.parameters(), lr=0.1)
    flat.step()
    with pytest.raises(PlanError, match=r"history of 0.weight has shape \(216,\)"):
        carry_over(flat, model, dense, graph=graph)
    with pytest.raises(PlanError, match="a Asking cannot be made"):
        carry_over(Asking(model.parameters(), 3), model, dense, graph=graph)
