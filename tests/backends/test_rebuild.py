"""The rebuilt model computes what the masked one does, whatever the net; what cannot be proven is refused."""

import copy
import os
import random
import re
from importlib import import_module

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import planner
from backends.equivalence import Proof, run
from backends.rebuild import cut, rebuild, support
from planner.graph import Graph, trace
from planner.spec import Plan
from profiles.errors import BuildError, PlanError
from tools.examples.resnet import ResNet

from ..planner import nets
from ..planner.nets import PIXELS, Lambda, conv, example, looking_trained, masked
from .planned import planned, resnet_ready
from .random_nets import STEPS, RandomNet, Step

TOLERANCE = 1e-4
NETS = [*nets.CUTTABLE, *nets.REFUSING]


def drawn(graph: Graph, dice: random.Random) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Return random channels to keep of most cuttable widths, and random blocks to remove."""
    kept = {
        width.name: torch.tensor(sorted(dice.sample(range(width.size), dice.randint(1, width.size))))
        for width in graph.cuttable
        if dice.random() < 0.8
    }
    return kept, frozenset(block.name for block in graph.blocks if not block.frozen and dice.random() < 0.5)


def difference(masked: nn.Module, dense: nn.Module, *, seed: int = 0) -> float:
    """Return max|dense - masked| / max|masked| on fresh inputs."""
    x = torch.randn(PIXELS, generator=torch.Generator().manual_seed(seed))
    expected, found = run(masked, (x,)), run(dense, (x,))
    assert expected.shape == found.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("brief", "sizes"), [(False, {4, 5}), (True, {1})])
def test_a_network_that_is_only_timed_is_shown_on_one_example(brief: bool, sizes: set[int]) -> None:
    seen: set[int] = set()

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            seen.add(len(x))
            return super().forward(x)

    model = Net(conv(3, 8, 3), nn.ReLU(), conv(8, 4, 3)).eval()
    graph = trace(model, (torch.ones(4, *PIXELS[1:]),))
    seen.clear()
    kept = {graph.cuttable[0].name: torch.arange(5)}
    dense = cut(model, graph, kept, brief=brief)
    assert seen == sizes
    assert dense[0].weight.shape[0] == 5


# --- zero invariance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETS)
def test_dense_computes_what_masked_does(name: str, seed: int) -> None:
    model, graph = example(name)
    kept, removed = drawn(graph, random.Random(f"{name}{seed}"))
    zeroed = masked(model, graph, kept, removed)
    dense = cut(zeroed, graph, kept, removed)
    assert difference(zeroed, dense, seed=seed) <= TOLERANCE
    if any(len(channels) < graph.width[width].size for width, channels in kept.items()) or removed:
        sizes = [sum(parameter.numel() for parameter in net.parameters()) for net in (model, dense)]
        assert sizes[1] < sizes[0]


def test_what_the_group_maps_zero_matters() -> None:
    model, graph = example("residual, option B")
    assert difference(model, masked(model, graph, {"layer1.0.conv1": torch.arange(4)})) > TOLERANCE
    assert difference(model, masked(model, graph, {}, ["layer1.0"])) > TOLERANCE


@pytest.mark.parametrize("name", ["residual, option B", "MobileNet", "pre-activation", "functional", "nested"])
def test_every_block_alone_and_all_together_leave_the_bare_shortcut(name: str) -> None:
    model, graph = example(name)
    names = [block.name for block in graph.blocks]
    for removed in [*([name] for name in names), names]:
        zeroed = masked(model, graph, {}, removed)
        dense = cut(zeroed, graph, {}, frozenset(removed))
        assert difference(zeroed, dense) <= TOLERANCE
        assert not {path for name in removed for path in graph.block[name].modules} & dict(dense.named_modules()).keys()


def test_a_block_between_two_relus_leaves_nothing() -> None:
    model, graph = example("residual, option B")
    dense = cut(model, graph, {}, frozenset({"layer1.1"}))
    assert type(dense.get_submodule("layer1.1")) is nn.Identity


def assert_a_random_net_is_cut_rightly(steps: list[Step], seed: int) -> None:
    model = looking_trained(RandomNet(steps, torch.ones(PIXELS)), seed=seed).eval()
    graph = trace(model, (torch.ones(PIXELS),))
    kept, removed = drawn(graph, random.Random(seed))
    zeroed = masked(model, graph, kept, removed)
    assert difference(zeroed, cut(zeroed, graph, kept, removed), seed=seed) <= TOLERANCE


EXAMPLES = 2000 if os.environ.get("ESPALIER_LONG") == "1" else 25


@pytest.mark.timeout(7200 if EXAMPLES > 25 else 300)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, seed=st.integers(0, 99))
def test_random_nets_compute_what_masked_ones_do(steps: list[Step], seed: int) -> None:
    assert_a_random_net_is_cut_rightly(steps, seed)


KEPT = {  # nets that were once wrong or refused without need
    "halves of two channels": [Step("classes", 0, 0, 1), Step("glu", 0, 1, 3)],
    "steps of a recurrence": [Step("linear", 1, 2, 5), Step("recurrent", 0, 3, 6)],
    "rolled": [Step("conv", 0, 0, 6), Step("rolled", 0, 0, 5)],
    "pixels together and halved": [Step("conv", 0, 0, 1), Step("pixels together", 0, 0, 6), Step("glu", 1, 0, 1)],
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KEPT)
def test_nets_that_were_wrong_once_are_right(name: str, seed: int) -> None:
    assert_a_random_net_is_cut_rightly(KEPT[name], seed)


# --- the module that comes out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", nets.CUTTABLE)
def test_the_cut_model_trains_and_says_its_sizes(name: str) -> None:
    model, graph = example(name)
    kept = {width.name: torch.arange((width.size + 1) // 2) for width in graph.cuttable}
    dense = cut(model, graph, kept).train()
    out = dense(torch.randn(PIXELS))
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in dense.parameters())
    for module in dense.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert {len(tensor) for tensor in module.state_dict().values() if tensor.dim()} == {module.num_features}
        elif isinstance(module, nn.PReLU):
            assert module.weight.shape == (module.num_parameters,)


def test_cutting_leaves_the_original_and_keeps_its_flags() -> None:
    model = looking_trained(ResNet(2, (8, 12, 16))).train()
    model.get_submodule("layer2.1").eval()
    model.get_submodule("fc").requires_grad_(False)
    graph, before = trace(model, (torch.ones(PIXELS),)), copy.deepcopy(model.state_dict())
    dense = cut(model, graph, {"layer2.1.conv1": torch.arange(3)}, frozenset({"layer1.1", "layer2.0"}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(before) == len(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name: modes[name] for name, module in dense.named_modules() if module.training != modes[name]} == {}
    assert [name for name, p in dense.named_parameters() if not p.requires_grad] == ["fc.weight", "fc.bias"]


def test_tied_weights_stay_tied() -> None:
    model, graph = example("tied weights")
    dense = cut(model, graph, {"0": torch.arange(5)})
    assert dense.get_submodule("2").weight is dense.get_submodule("4").weight
    assert dense.get_submodule("4").weight.shape == (5, 5, 3, 3)
    assert dense.get_submodule("4").in_channels == 5


@pytest.mark.parametrize(
    ("name", "kept", "removed", "said"),
    [
        ("sorted", {"one": torch.arange(4)}, [], r"one cannot be cut: reaches sort at .*nets\.py:\d+"),
        ("VGG", {"14": torch.arange(4)}, [], "14 cannot be cut: it is an output of the model"),
    ],
)
def test_what_is_frozen_is_not_cut(name: str, kept: dict[str, Tensor], removed: list[str], said: str) -> None:
    model, graph = example(name)
    with pytest.raises(PlanError, match=said):
        cut(model, graph, kept, frozenset(removed))


# --- rebuild and its refusals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready() -> tuple[Plan, nn.Module]:
    """A plan that narrows and removes, and a model that is exactly zero where it says."""
    return resnet_ready()


def test_rebuild_keeps_what_the_plan_keeps(ready: tuple[Plan, nn.Module]) -> None:
    plan, model = ready
    dense = rebuild(plan, model)
    assert difference(model, dense) <= TOLERANCE
    small = trace(dense, (torch.ones(PIXELS),))
    assert small.macs(small.dense) == plan.predicted.macs
    assert {w.name: w.keep for w in plan.widths if w.keep > 1}.items() <= {w.name: w.size for w in small.widths}.items()


def test_a_missed_budget_is_refused_with_pool_cost_and_budget(ready: tuple[Plan, nn.Module]) -> None:
    plan, _ = ready
    pool = next(pool for pool in plan.pools if pool.structure == "filter")
    dense = next(width.dense for width in plan.widths if width.name == pool.name)
    said = rf"do not meet the plan: {re.escape(pool.name)} has cost {dense}, its budget is {pool.budget:g} .*harden_"
    with pytest.raises(BuildError, match=said):
        rebuild(plan, looking_trained(ResNet(2, (8, 12, 16))))


def test_a_size_written_into_the_forward_is_put_right_in_a_graph() -> None:
    model = looking_trained(nets.HardView()).eval()
    plan = planned(model, 0.6)
    planner.harden_(plan, model)
    dense = rebuild(plan, model)
    assert isinstance(dense, torch.fx.GraphModule)
    assert dense.get_parameter("conv.weight").shape[0] == plan.widths[0].keep < 8
    for batch in (1, 2, 5):
        x = torch.randn(batch, *PIXELS[1:])
        torch.testing.assert_close(dense(x), model(x))


def test_a_graph_drops_out_and_normalises_by_the_batch_only_in_training() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(net.bn(net.one(x))), 0.5, net.training)
        return net.two(x.view(-1, 8, 8, 8))  # type: ignore[no-any-return]

    model = looking_trained(Lambda(forward, one=conv(3, 8), bn=nn.BatchNorm2d(8), two=conv(8, 2))).eval()
    graph, x = trace(model, (torch.ones(PIXELS),)), torch.randn(PIXELS)
    dense = cut(model, graph, {"one": torch.arange(5)})
    assert isinstance(dense, torch.fx.GraphModule)
    assert not dense.training
    assert torch.equal(dense(x), dense(x))
    before = dense.get_buffer("bn.running_mean").clone()
    dense.train()
    assert not torch.equal(dense(x), dense(x))
    assert not torch.equal(dense.get_buffer("bn.running_mean"), before)
    dense.eval()
    assert torch.equal(dense(x), dense(x))


def test_a_false_cut_is_refused_with_operation_and_line(
    ready: tuple[Plan, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def false(*arguments: object) -> nn.Module:
        dense = cut(*arguments)  # type: ignore[arg-type]
        with torch.no_grad():
            dense.get_submodule("layer3.1.conv2").weight[0] += 1
        return dense

    monkeypatch.setattr(import_module("backends.rebuild"), "cut", false)
    with pytest.raises(BuildError, match=r"first at layer3\.1\.conv2 \(conv2d at .*resnet\.py:\d+\)"):
        rebuild(*ready)


def test_other_channels_than_the_zero_ones_are_refused(
    ready: tuple[Plan, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def turned(plan: Plan, model: nn.Module, graph: Graph) -> dict[str, Tensor]:
        kept = support(plan, model, graph)
        return {name: (graph.width[name].size - 1 - channels).flip(0) for name, channels in kept.items()}

    monkeypatch.setattr(import_module("backends.rebuild"), "support", turned)
    with pytest.raises(BuildError, match="differs from the masked one by"):
        rebuild(*ready)


def test_a_plan_for_another_model_is_refused(ready: tuple[Plan, nn.Module]) -> None:
    with pytest.raises(PlanError, match="made for another model: its fingerprint is"):
        rebuild(ready[0], ResNet(2, (8, 12, 20)))


def test_fewer_channels_than_planned_are_padded_to_the_plan(ready: tuple[Plan, nn.Module]) -> None:
    plan, model = ready[0], copy.deepcopy(ready[1])
    width = next(width for width in plan.widths if 1 < width.keep < width.dense)
    graph = plan.graph(model)
    alive = support(plan, model, graph)[width.name][:1]
    model = masked(model, graph, {width.name: alive})
    assert rebuild(plan, model).get_submodule(width.name).out_channels == width.keep


def test_values_that_are_not_finite_are_refused() -> None:
    model, graph = example("VGG")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_submodule("14").bias[0] = torch.nan
    for first, second in [(broken, model), (model, broken), (broken, broken)]:
        with pytest.raises(BuildError, match="not finite"):
            Proof(graph, first).check(second)


def test_outputs_in_mappings_and_lists_are_compared() -> None:
    model = Lambda(lambda net, x: {"a": net.one(x), "b": [net.two(x), (net.one(x),)]}, one=conv(3, 4), two=conv(3, 2))
    other, graph = copy.deepcopy(model), trace(model, (torch.ones(PIXELS),))
    assert Proof(graph, model).check(other) == 0
    with torch.no_grad():
        other.get_submodule("two").bias += 1
    with pytest.raises(BuildError, match="differs"):
        Proof(graph, model).check(other)
