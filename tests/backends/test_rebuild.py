"""The rebuilt model computes what the masked one does, whatever the net; what cannot be proven is refused."""

import copy
import random
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import planner
from backends.equivalence import equivalence, run
from backends.rebuild import cut, rebuild, support
from backends.weights import load_rebuilt, save
from planner.graph import Graph, trace
from planner.importance import Importance
from planner.spec import Plan
from profiles.errors import BuildError, PlanError
from tools.examples.resnet import ResNet

from ..planner import nets
from ..planner.nets import PIXELS, Lambda, conv, example, looking_trained, masked
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


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, seed=st.integers(0, 99))
def test_random_nets_compute_what_masked_ones_do(steps: list[Step], seed: int) -> None:
    model = looking_trained(RandomNet(steps, torch.ones(PIXELS)), seed=seed).eval()
    graph = trace(model, (torch.ones(PIXELS),))
    kept, removed = drawn(graph, random.Random(seed))
    zeroed = masked(model, graph, kept, removed)
    assert difference(zeroed, cut(zeroed, graph, kept, removed), seed=seed) <= TOLERANCE


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
        ("sigmoid gate", {"one": torch.arange(4)}, [], r"one cannot be cut: reaches mul at .*nets\.py:\d+"),
        ("residual, option A", {"conv1": torch.arange(4)}, [], "conv1 cannot be cut: padded by a fixed number"),
    ],
)
def test_what_is_frozen_is_not_cut(name: str, kept: dict[str, Tensor], removed: list[str], said: str) -> None:
    model, graph = example(name)
    with pytest.raises(PlanError, match=said):
        cut(model, graph, kept, frozenset(removed))


# --- rebuild and its refusals -------------------------------------------------------------------------------------


def planned(model: nn.Module, latency: float, *, importance: Importance | None = None) -> Plan:
    """Plan for a device that rounds nothing."""
    return planner.plan(model, (torch.ones(PIXELS),), nets.anywhere(), latency=latency, importance=importance)


@pytest.fixture(scope="module")
def ready() -> tuple[Plan, nn.Module]:
    """A plan that narrows and removes, and a model that is exactly zero where it says."""
    model = looking_trained(ResNet(2, (8, 12, 16))).eval()
    graph = trace(model, (torch.ones(PIXELS),))
    widths = {w.name: {n: 1 - n / w.size for n in range(1, w.size + 1)} for w in graph.cuttable}
    blocks = {block.name: 10.0 * (block.name != "layer2.1") for block in graph.blocks}
    plan = planned(model, 0.5, importance=Importance("by hand", widths, blocks, {}))
    assert [block.name for block in plan.blocks if block.removed] == ["layer2.1"]
    assert any(1 < width.keep < width.dense for width in plan.widths)
    assert planner.harden_(plan, model) > 0
    return plan, model


def test_rebuild_keeps_what_the_plan_keeps(ready: tuple[Plan, nn.Module]) -> None:
    plan, model = ready
    dense = rebuild(plan, model)
    assert difference(model, dense) <= TOLERANCE
    small = trace(dense, (torch.ones(PIXELS),))
    assert small.macs(small.dense) == plan.predicted.macs
    assert {w.name: w.keep for w in plan.widths if w.keep}.items() <= {w.name: w.size for w in small.widths}.items()


def test_a_missed_budget_is_refused_with_pool_cost_and_budget(ready: tuple[Plan, nn.Module]) -> None:
    plan, _ = ready
    pool = next(pool for pool in plan.pools if pool.structure == "filter")
    dense = next(width.dense for width in plan.widths if width.name == pool.name)
    said = rf"do not meet the plan: {re.escape(pool.name)} has cost {dense}, its budget is {pool.budget:g} .*harden_"
    with pytest.raises(BuildError, match=said):
        rebuild(plan, looking_trained(ResNet(2, (8, 12, 16))))


def test_a_size_written_into_the_forward_is_refused_with_its_line() -> None:
    model = looking_trained(nets.HardView())
    plan = planned(model, 0.6)
    planner.harden_(plan, model)
    code = nets.HardView.forward.__code__
    with pytest.raises(BuildError, match=rf"{re.escape(nets.__file__)}:{code.co_firstlineno + 3}; a size is written"):
        rebuild(plan, model)


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
            equivalence(graph, first, second, [(torch.ones(PIXELS),)])


def test_outputs_in_mappings_and_lists_are_compared() -> None:
    model = Lambda(lambda net, x: {"a": net.one(x), "b": [net.two(x), (net.one(x),)]}, one=conv(3, 4), two=conv(3, 2))
    other, graph = copy.deepcopy(model), trace(model, (torch.ones(PIXELS),))
    assert equivalence(graph, model, other, [(torch.ones(PIXELS),)]) == 0
    with torch.no_grad():
        other.get_submodule("two").bias += 1
    with pytest.raises(BuildError, match="differs"):
        equivalence(graph, model, other, [(torch.ones(PIXELS),)])


# --- weights on disk ----------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_bit_for_bit(ready: tuple[Plan, nn.Module], tmp_path: Path) -> None:
    plan, model = ready
    dense = rebuild(plan, model)
    save(dense, tmp_path / "small.safetensors")
    loaded = load_rebuilt(plan, ResNet(2, (8, 12, 16), seed=5), tmp_path / "small.safetensors").eval()
    x = torch.randn(PIXELS)
    assert loaded.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(x), dense(x))
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


@pytest.mark.parametrize(
    ("name", "latency"),
    [("tied weights", 1.0), ("shared twice", 1.0), ("nested", 0.6), ("densely connected", 0.6), ("functional", 0.6)],
)
def test_other_nets_come_back_too(name: str, latency: float, tmp_path: Path) -> None:
    model = copy.deepcopy(example(name)[0])
    plan = planned(model, latency)
    planner.harden_(plan, model)
    dense = rebuild(plan, model)
    save(dense, tmp_path / "small.safetensors")
    loaded = load_rebuilt(plan, nets.CUTTABLE[name](), tmp_path / "small.safetensors")
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _of_another_model(path: Path) -> None:
    save(ResNet(2, (8, 12, 16)), path)


def _of_something_else(path: Path) -> None:
    save_file({"conv1.weight": torch.ones(1), "layer1.0.conv1.weight": torch.ones(())}, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_cut_off, "not a whole safetensors file"),
        (Path.unlink, "not a whole safetensors file"),
        (_of_another_model, r"does not fit the model: layer\d.* such tensors"),
        (_of_something_else, r"does not fit the model: bn1.bias is absent in the file, 8 in the model"),
    ],
)
def test_spoilt_weights_are_refused(ready: tuple[Plan, nn.Module], tmp_path: Path, spoil: object, said: str) -> None:
    plan, model = ready
    path = tmp_path / "small.safetensors"
    save(rebuild(plan, model), path)
    spoil(path)  # type: ignore[operator]
    with pytest.raises(PlanError, match=said):
        load_rebuilt(plan, ResNet(2, (8, 12, 16)), path)
