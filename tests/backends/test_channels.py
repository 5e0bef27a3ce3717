"""Input channels that weights are zero for are cut where nothing reads them, and not selected where others do."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import backends
import planner
from backends.channels import select, unread
from backends.equivalence import TOLERANCE_FLOAT64, proven, run
from backends.rebuild import cut, rebuild
from backends.record import SELECTED
from backends.shapes import crop
from planner.graph import Graph, trace
from planner.pools import with_structures
from planner.spec import Plan
from planner.structures import Block, Channel, FilterShape
from profiles.errors import BuildError, PlanError
from profiles.schema import Profile, Structure
from tools.examples.resnet import ResNet

from ..planner.nets import PIXELS, HardView, Lambda, Sum, anywhere, conv, example, looking_trained
from .test_shapes import agrees_in_onnxruntime, difference, image

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
]


def without(model: nn.Module, *places: tuple[str, int | list[int]], axis: int = 1) -> nn.Module:
    """Return a copy of `model` whose named weights are zero for some input channels."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, channels in places:
            model.get_parameter(name).index_fill_(axis, torch.tensor(channels).view(-1), 0.0)
    return model


def traced(*layers: nn.Module, shape: tuple[int, ...] = PIXELS) -> tuple[nn.Module, Graph]:
    """Return layers in a row that look trained, and their graph."""
    model = looking_trained(nn.Sequential(*layers)).eval()
    return model, trace(model, (torch.ones(shape),))


# --- channels that nothing reads ----------------------------------------------------------------------------------


def test_what_nothing_reads_is_cut_though_it_is_not_zero() -> None:
    model, graph = traced(conv(3, 8), nn.BatchNorm2d(8), nn.Sigmoid(), conv(8, 4), nn.ReLU(), conv(4, 5))
    zeros = without(model, ("3.weight", [1, 4, 6]))
    kept = unread(zeros, graph)
    assert {name: channels.tolist() for name, channels in kept.items()} == {"0": [0, 2, 3, 5, 7]}
    dense = cut(zeros, graph, kept)
    assert dense.get_parameter("0.weight").shape == (5, 3, 3, 3)
    assert difference(zeros, dense, (3, 3, 9, 9)) <= TOLERANCE_FLOAT64


def test_what_is_read_only_by_what_nothing_reads_goes_too() -> None:
    model, graph = traced(conv(3, 6), nn.ReLU(), conv(6, 4), nn.ReLU(), conv(4, 5))
    with torch.no_grad():
        model.get_parameter("2.weight")[1:, 3] = 0  # the second layer's first filter alone reads channel 3
    zeros = without(model, ("4.weight", 0))
    assert {name: channels.tolist() for name, channels in unread(zeros, graph).items()} == {
        "0": [0, 1, 2, 4, 5],
        "2": [1, 2, 3],
    }


def test_one_channel_stays_where_nothing_is_read() -> None:
    model, graph = traced(conv(3, 6), nn.ReLU(), conv(6, 4))
    kept = unread(without(model, ("2.weight", list(range(6)))), graph)
    assert {name: channels.tolist() for name, channels in kept.items()} == {"0": [0]}


def test_a_stream_loses_what_all_of_its_readers_leave() -> None:
    model, graph = traced(conv(3, 6), Sum(conv(6, 4), nn.ReLU(), conv(4, 6)), conv(6, 5))
    assert unread(without(model, ("1.body.0.weight", [2, 3])), graph) == {}
    zeros = without(model, ("1.body.0.weight", [2, 3]), ("2.weight", [3, 5]))
    kept = unread(zeros, graph)
    assert {name: channels.tolist() for name, channels in kept.items()} == {"0": [0, 1, 2, 4, 5]}
    assert difference(zeros, cut(zeros, graph, kept), PIXELS) <= TOLERANCE_FLOAT64


@pytest.mark.parametrize(
    "also", [lambda x: x.sum(1, keepdim=True), lambda x: x.mean(1, keepdim=True), lambda x: x.norm(dim=1, keepdim=True)]
)
def test_what_something_else_reads_stays(also: Callable[[Tensor], Tensor]) -> None:
    net = Lambda(lambda net, x: net.two(net.one(x)) + also(net.one(x)), one=conv(3, 6), two=conv(6, 4))
    model = looking_trained(net).eval()
    assert unread(without(model, ("two.weight", 3)), trace(model, (torch.ones(PIXELS),))) == {}


def test_units_of_a_recurrent_layer_read_each_other() -> None:
    net = Lambda(lambda net, x: net.fc(net.rnn(x)[0]), rnn=nn.GRU(4, 6, batch_first=True), fc=nn.Linear(6, 3))
    model = looking_trained(net).eval()
    graph = trace(model, (torch.ones(2, 5, 4),))
    zeros = without(model, ("fc.weight", [1, 2]))
    assert unread(zeros, graph) == {}
    zeros = without(zeros, ("rnn.weight_hh_l0", [1, 2]))
    kept = unread(zeros, graph)
    assert [len(channels) for channels in kept.values()] == [4]
    proven(graph, zeros, cut(zeros, graph, kept))


# --- select -------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (2, 3, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3), (2, 6, 9)),
    "conv2d": (nn.Conv2d(6, 4, 3, padding=1, stride=2, padding_mode="reflect"), (2, 6, 9, 8)),
    "conv3d": (nn.Conv3d(6, 4, 2), (2, 6, 5, 5, 5)),
    "grouped": (nn.Conv2d(12, 4, 3, groups=2), (2, 12, 7, 7)),
    "transposed 1d": (nn.ConvTranspose1d(6, 4, 3), (2, 6, 5)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1), (2, 6, 5, 5)),
    "transposed 3d": (nn.ConvTranspose3d(6, 4, 2), (2, 6, 3, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_selects_what_it_reads(name: str, tmp_path: Path) -> None:
    layer, shape = LAYERS[name]
    axis = 0 if name.startswith("transposed") else 1
    model, graph = traced(copy.deepcopy(layer), shape=shape)
    zeros = without(model, ("0.weight", [1, 3, 4]), axis=axis)
    dense = select(zeros, graph, ["0"])
    small: Any = dense.get_submodule("0")
    assert isinstance(small, type(layer))  # it stays what it was to whoever asks
    assert small.weight.shape[axis] == 3
    assert zeros.state_dict().keys() == dense.state_dict().keys()
    assert difference(zeros, dense, shape) <= TOLERANCE_FLOAT64
    agrees_in_onnxruntime(zeros, dense, shape, tmp_path)
    compiled = torch.compile(dense, backend="aot_eager", fullgraph=True)
    x = torch.randn(shape)
    torch.testing.assert_close(compiled(x), dense(x))
    nets = zeros.double(), copy.deepcopy(dense).double()
    for net in nets:
        net(image(*shape)).square().sum().backward()
    kept = torch.tensor([0, 2, 5])
    gradients = [net.get_parameter("0.weight").grad for net in nets]
    assert gradients[0] is not None
    torch.testing.assert_close(gradients[1], gradients[0].index_select(axis, kept))
    torch.testing.assert_close(nets[1](image(*shape)[0]), nets[0](image(*shape)[0]))


def test_a_cropped_convolution_selects() -> None:
    model, graph = traced(nn.Conv2d(6, 4, 3, padding=1), shape=(2, 6, 9, 8))
    with torch.no_grad():
        model.get_parameter("0.weight")[..., 0] = 0
    zeros = without(model, ("0.weight", [0, 1]))
    dense = select(crop(zeros, graph), graph, ["0"])
    assert dense.get_parameter("0.weight").shape == (4, 4, 3, 2)
    assert difference(zeros, dense, (2, 6, 7, 7)) <= TOLERANCE_FLOAT64


def test_shared_layers_and_weights_stay_shared() -> None:
    one, two = conv(6, 6), conv(6, 6)
    two.weight = one.weight
    model, graph = traced(conv(3, 6), one, one, two, shape=PIXELS)
    zeros = without(model, ("1.weight", [0, 5]))
    dense = select(zeros, graph, ["1", "2", "3"])
    assert dense.get_submodule("1") is dense.get_submodule("2")
    assert dense.get_parameter("1.weight") is dense.get_parameter("3.weight")
    assert difference(zeros, dense, PIXELS) <= TOLERANCE_FLOAT64


def test_a_graph_selects_too(tmp_path: Path) -> None:
    model = looking_trained(HardView()).eval()
    graph = trace(model, (torch.ones(PIXELS),))
    dense = cut(without(model, ("conv.weight", 1), ("fc.weight", [0, 1, 40])), graph, {"conv": torch.arange(1, 8)})
    assert isinstance(dense, GraphModule)
    small = select(dense, graph, ["conv", "fc"])
    assert [small.get_parameter(name).shape[1] for name in ("conv.weight", "fc.weight")] == [2, 111]
    assert difference(dense, small, PIXELS) <= TOLERANCE_FLOAT64
    agrees_in_onnxruntime(dense, small, PIXELS, tmp_path)
    small(torch.ones(PIXELS)).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    assert getattr(copy.deepcopy(small), SELECTED).keys() == {"conv.weight", "fc.weight"}


class Attention(nn.Module):
    """Holds a linear layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        x = self.first(x)
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


REFUSED: list[tuple[Callable[[], nn.Module], str, tuple[int, ...], str]] = [
    (lambda: nn.Linear(6, 2), "9", (2, 6), "9 cannot select its inputs: the model has no such layer"),
    (lambda: nn.Linear(6, 2), "1", (2, 6), "1 cannot select its inputs: its weight is zero for none"),
    (lambda: nn.BatchNorm1d(2), "1", (2, 2), "1 cannot select its inputs: BatchNorm1d is no linear layer or conv"),
    (Attention, "1.attention.out_proj", (2, 3, 6), "1.attention.out_proj cannot select its inputs: "),
    (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 2)),
        "1",
        (2, 6),
        "1 cannot select its inputs: ParametrizedLinear is no",
    ),
]


@pytest.mark.parametrize(("make", "name", "shape", "said"), REFUSED)
def test_what_cannot_select_is_refused_by_name(
    make: Callable[[], nn.Module], name: str, shape: tuple[int, ...], said: str
) -> None:
    model, graph = traced(nn.Identity(), make(), shape=shape)
    if "out_proj" in name:
        model = without(model, (f"{name}.weight", 2))
    with pytest.raises(BuildError, match=said):
        select(model, graph, [name])


def test_groups_that_read_different_numbers_are_refused() -> None:
    model, graph = traced(nn.ConvTranspose2d(6, 4, 3, groups=2), shape=(2, 6, 5, 5))
    with pytest.raises(BuildError, match="its groups read different numbers"):
        select(without(model, ("0.weight", 1), axis=0), graph, ["0"])
    dense = select(without(model, ("0.weight", [1, 5]), axis=0), graph, ["0"])
    assert dense.get_parameter("0.weight").shape == (4, 2, 3, 3)


def test_a_weight_that_the_forward_reads_is_refused() -> None:
    net = Lambda(lambda net, x: F.conv2d(x, net.one.weight) + net.one(x), one=nn.Conv2d(3, 4, 3))
    model = without(looking_trained(net).eval(), ("one.weight", 1))
    with pytest.raises(BuildError, match="one cannot select its inputs: the rebuilt model"):
        select(model, trace(model, (torch.ones(PIXELS),)), ["one"])


# --- plans that name structures -----------------------------------------------------------------------------------


def knowing(**pays: str) -> Profile:
    """Return a profile of a device that knows of some kinds whether they pay."""
    told = tuple(
        Structure(
            kind=kind,
            pays=word,
            requires=("half of it is zero",) if word == "conditional" else (),
            confidence="inferred",
            sources=("nowhere",),
        )
        for kind, word in pays.items()
    )
    return anywhere().model_copy(update={"structure": told})


INNER, STREAM, KERNEL = "layer1.1.conv2.weight", "layer2.0.conv1.weight", "layer3.1.conv2.weight"


def fresh() -> ResNet:
    """Return a residual net."""
    return looking_trained(ResNet(2, (8, 12, 16))).eval()  # type: ignore[return-value]


def planned(profile: Profile, *, force: bool = False) -> tuple[Plan, nn.Module]:
    """Return a plan with channels, kernels and runs, and a model that is exactly zero where it says."""
    model = fresh()
    plan = planner.plan(model, (torch.ones(PIXELS),), anywhere(), latency=1.0)
    budgets = [
        (Channel(INNER, 8), 5),
        (Channel(STREAM, 8), 6),
        (FilterShape(KERNEL, (16, 3, 3)), 60),
        (Block(plan.graph(model).width["layer2.1.conv1"], 4), 2),
    ]
    plan = with_structures(plan, profile, budgets, force=force)
    assert planner.harden_(plan, model) > 0
    return plan, model


def test_a_plan_with_channels_kernels_and_runs_is_rebuilt_and_comes_back(tmp_path: Path) -> None:
    profile = knowing(in_channels="yes", kernel_shape="conditional", filters="yes")
    plan, model = planned(profile)
    assert any("kernel_shape pays on any.pytorch.fp32 if half of it is zero" in note for note in plan.notes)
    dense = rebuild(plan, model, profile=profile)
    shapes = {name: tuple(dense.get_parameter(name).shape) for name in (INNER, STREAM, KERNEL, "layer2.1.conv1.weight")}
    assert shapes == {
        INNER: (8, 5, 3, 3),
        STREAM: (12, 6, 3, 3),
        KERNEL: (16, 60, 1, 1),
        "layer2.1.conv1.weight": (8, 12, 3, 3),
    }
    assert dense.get_parameter("layer1.1.conv1.weight").shape == (5, 8, 3, 3)  # nothing else reads them
    assert type(dense) is ResNet
    backends.save_pruned(plan, dense, tmp_path)
    loaded = backends.load_pruned(lambda: ResNet(2, (8, 12, 16), seed=5), tmp_path).eval()
    x = torch.randn(PIXELS)
    assert torch.equal(loaded(x), dense(x))


def test_the_optimizer_goes_on() -> None:
    profile = knowing(in_channels="yes", kernel_shape="yes", filters="yes")
    plan, model = planned(profile)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model(torch.randn(PIXELS)).square().mean().backward()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    model.load_state_dict(before)
    dense = rebuild(plan, model, profile=profile)
    carried = backends.carry_over(optimizer, model, dense, graph=plan.graph(model))
    for name in (INNER, STREAM):
        whole, part = model.get_parameter(name), dense.get_parameter(name)
        momentum = optimizer.state[whole]["momentum_buffer"][:, whole.ne(0).any(0).flatten(1).any(1)]
        assert torch.equal(carried.state[part]["momentum_buffer"], momentum)


def test_a_graph_with_selected_inputs_comes_back_and_trains_on(tmp_path: Path) -> None:
    model = looking_trained(HardView()).eval()
    plan = planner.plan(model, (torch.ones(PIXELS),), anywhere(), latency=0.6)
    assert plan.choice.keep["conv"] < 8
    profile = knowing(in_channels="yes")
    plan = with_structures(plan, profile, [(Channel("conv.weight", 3), 2)])
    planner.harden_(plan, model)
    dense = rebuild(plan, model, profile=profile)
    assert isinstance(dense, GraphModule)
    assert dense.get_parameter("conv.weight").shape == (plan.choice.keep["conv"], 2, 3, 3)
    backends.save_pruned(plan, dense, tmp_path)
    loaded = backends.load_pruned(HardView, tmp_path).eval()
    x = torch.randn(PIXELS)
    assert torch.equal(loaded(x), dense(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    carried = backends.carry_over(optimizer, model, dense, graph=plan.graph(model))
    assert sum(len(group["params"]) for group in carried.param_groups) == 4


@pytest.mark.parametrize(
    ("part", "said"), [("kept", {"layer1.9": [0]}), ("selected", {INNER: {"shape": [1, 99, 1, 1], "bits": "1"}})]
)
def test_a_file_that_keeps_what_the_model_does_not_have_is_refused(
    part: str, said: dict[str, Any], tmp_path: Path
) -> None:
    plan, model = planned(knowing(in_channels="yes", filters="yes"))
    backends.save_pruned(plan, rebuild(plan, model, profile=knowing(in_channels="yes")), tmp_path)
    path = tmp_path / "weights.safetensors"
    save_file(load_file(path), path, {part: json.dumps(said)})
    with pytest.raises(PlanError, match=r"weights\.safetensors keeps what the model does not have"):
        backends.load_pruned(fresh, tmp_path)


def test_runs_train_to_their_budget_and_are_cut_whole() -> None:
    model = fresh()
    plan = planner.plan(model, (torch.ones(PIXELS),), anywhere(), latency=1.0)
    width = plan.graph(model).width["layer2.1.conv1"]
    plan = with_structures(plan, knowing(filters="yes"), [(Block(width, 5), 2)])  # runs of 5, 5 and 2
    assert [w.keep for w in plan.widths if w.name == width.name] == [10]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    planner.attach(plan, model, optimizer, steps=30)
    x = torch.randn(PIXELS)
    goal = torch.randn(model.train()(x).shape)
    for _ in range(32):
        optimizer.zero_grad()
        F.mse_loss(model(x), goal).backward()
        optimizer.step()
    dense = rebuild(plan, model)
    assert dense.get_parameter("layer2.1.conv1.weight").shape[0] in (7, 10)
    assert dense.get_parameter("layer2.1.conv2.weight").shape[1] in (7, 10)


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (anywhere(), "does not say whether in_channels pays"),
        (knowing(in_channels="no"), "in_channels does not pay on any.pytorch.fp32"),
        (None, "whether kernel_shape pays is not known: "),  # the plan's own, which no file describes
    ],
)
def test_where_it_is_not_known_to_pay_zeros_stay_and_it_is_said(
    profile: Profile | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan, model = planned(knowing(filters="yes"))
    with caplog.at_level(logging.WARNING):
        dense = rebuild(plan, model, profile=profile)
    assert f"layer2.0.conv1: zeros stay in place: {said}" in caplog.text or said in caplog.text
    assert [dense.get_parameter(name).shape[1] for name in (INNER, STREAM, KERNEL)] == [5, 8, 16]


def test_a_forced_plan_is_rebuilt_wherever() -> None:
    plan, model = planned(knowing(in_channels="no", kernel_shape="no"), force=True)
    assert plan.forced
    assert any(note == "cutting in_channels does not pay on any.pytorch.fp32" for note in plan.notes)
    dense = rebuild(plan, model)
    assert [dense.get_parameter(name).shape[1] for name in (INNER, STREAM, KERNEL)] == [5, 6, 60]


def test_what_does_not_pay_is_not_planned() -> None:
    with pytest.raises(
        PlanError, match=r"cutting in_channels does not pay on any\S*, so layer1\.1\.conv2\.weight is not"
    ):
        planned(knowing(in_channels="no"))


def test_budgets_and_names_that_do_not_fit_are_refused() -> None:
    model, graph = example("VGG")
    plan = planner.plan(model, (torch.ones(PIXELS),), anywhere(), latency=1.0)
    with pytest.raises(PlanError, match=r"0\.weight has 3 groups, of which 4 cannot stay"):
        with_structures(plan, anywhere(), [(Channel("0.weight", 3), 4)])
    frozen = next(width for width in graph.widths if width.frozen)
    with pytest.raises(PlanError, match="cannot be cut: it is an output"):
        with_structures(plan, anywhere(), [(Block(frozen, 2), 1)])
    other = with_structures(plan, anywhere(), [(Channel("nowhere.weight", 3), 2)])
    with pytest.raises(PlanError, match=r"names 'nowhere\.weight', of which the model has no channel"):
        planner.harden_(other, copy.deepcopy(model))


def test_kernels_are_cropped_without_being_planned(tmp_path: Path) -> None:
    model = fresh()
    plan = planner.plan(model, (torch.ones(PIXELS),), anywhere(), latency=1.0)
    with torch.no_grad():
        model.get_parameter(INNER)[..., 2] = 0
    dense = rebuild(plan, model)
    assert dense.get_parameter(INNER).shape == (8, 8, 3, 2)
    backends.save_pruned(plan, dense, tmp_path)
    loaded = backends.load_pruned(lambda: ResNet(2, (8, 12, 16), seed=5), tmp_path).eval()
    assert torch.equal(run(loaded, (torch.ones(PIXELS),)), run(dense, (torch.ones(PIXELS),)))
