"""The graph knows every width and tie, says why it refuses and where, counts what runs, and leaves the model alone."""

import copy
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from backends.rebuild import cut
from planner.blocks import Block
from planner.graph import Graph, trace
from planner.groups import group
from planner.structures import Filter
from planner.widths import Width
from profiles.errors import PlanError
from tools.examples.resnet import ResNet

from . import nets
from .nets import PIXELS, Lambda, Sum, conv, example

HERE = re.escape(str(Path(__file__)))
NETS = [*nets.CUTTABLE, *nets.REFUSING]


def traced(model: nn.Module, shape: tuple[int, ...] = PIXELS) -> Graph:
    """Trace `model` on ones."""
    return trace(model, (torch.ones(shape),))


def count_macs(model: nn.Module) -> int:
    """Return the multiply-accumulates that PyTorch itself counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.ones(PIXELS))
    return counter.get_total_flops() // 2


# --- widths and ties ----------------------------------------------------------------------------------------------

WIDTHS = {
    "residual, option B": {
        "conv1": (8, ["conv1", "layer1.0.conv2", "layer1.1.conv2"]),
        "layer1.0.conv1": (8, ["layer1.0.conv1"]),
        "layer2.0.conv2": (12, ["layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"]),
        "layer3.1.conv1": (16, ["layer3.1.conv1"]),
    },
    "residual, option A": {
        "layer2.0.conv1": (12, ["layer2.0.conv1"]),
        "conv1": (8, ["conv1", *(f"layer{i}.{j}.conv2" for i in (1, 2, 3) for j in (0, 1))]),
        "layer2.0.conv2": (4, [f"layer{i}.{j}.conv2" for i in (2, 3) for j in (0, 1)]),  # 2 + 2 where zeros are padded
        "layer3.0.conv2": (4, [f"layer3.{j}.conv2" for j in (0, 1)]),
    },
    "VGG": {"0": (8, ["0"]), "3": (12, ["3"]), "6": (10, ["6"]), "10": (16, ["10"])},
    "MobileNet": {"0": (8, ["0", "3.body.6"]), "3.body.0": (16, ["3.body.0"]), "10": (12, ["10", "12.body.6"])},
    "pre-activation": {"0": (8, ["0", "1.body.5"]), "2.body.2": (12, ["2.body.2", "2.shortcut.0", "3.body.5"])},
    "densely connected": {"stem": (8, ["stem"]), "one": (4, ["one"]), "two": (6, ["two"])},
    "shared twice": {"0": (8, ["0", "2", "4"])},
    "tied weights": {"0": (8, ["0", "2", "4"])},
    "functional": {"stem": (8, ["stem", "two", "three"]), "one": (6, ["one"])},
}


@pytest.mark.parametrize("name", WIDTHS)
def test_layers_that_are_added_share_one_width(name: str) -> None:
    _, graph = example(name)
    found = {width: (graph.width[width].size, list(graph.width[width].makers)) for width in WIDTHS[name]}
    assert found == WIDTHS[name]


def owned(width: Width) -> dict[tuple[str, int], tuple[list[int], bool]]:
    return {(piece.tensor, piece.axis): (piece.units.tolist(), piece.penalised) for piece in width.slices}


def test_a_channel_owns_its_filter_normalisation_and_readers() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    width = traced(net, (1, 1, 4, 4)).width["0"]
    of_zero = {key: value for key, value in owned(width).items() if value[1]}
    assert of_zero == dict.fromkeys([("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0)], ([0, 1], True))
    assert owned(width)["1.running_mean", 0] == ([0, 1], False)
    assert owned(width)["4.weight", 1] == ([0, 0, 0, 0, 1, 1, 1, 1], False)


def test_joined_channels_are_read_at_their_own_places() -> None:
    _, graph = example("densely connected")
    assert owned(graph.width["one"])["bn2.weight", 0] == ([-1] * 8 + [0, 1, 2, 3], True)
    assert owned(graph.width["one"])["bn3.weight", 0] == ([-1] * 14 + [0, 1, 2, 3], True)


def test_a_depthwise_multiplier_repeats_its_channel() -> None:
    _, graph = example("MobileNet")
    assert owned(graph.width["10"])["13.weight", 0] == ([i // 2 for i in range(24)], True)


@pytest.mark.parametrize("name", nets.CUTTABLE)
def test_nothing_but_the_output_is_frozen(name: str) -> None:
    reasons = [width.frozen for width in example(name)[1].widths if width.frozen]
    assert reasons == ["it is an output of the model"]


@pytest.mark.parametrize("name", nets.REFUSING)
def test_what_is_not_followed_is_frozen_with_operation_and_place(name: str) -> None:
    reason = nets.REFUSING[name][1]
    frozen = [width.frozen for width in example(name)[1].widths if width.frozen and reason in width.frozen]
    assert frozen
    if name != "shared with the image":  # the places of the others are in nets.py, not within PyTorch
        assert re.search(r" at /.*nets\.py:\d+", frozen[0])


def test_places_are_lines_of_the_users_code() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.two(torch.sort(net.one(x), 1).values)  # type: ignore[no-any-return]

    line = forward.__code__.co_firstlineno + 1
    graph = traced(Lambda(forward, one=conv(3, 4), two=conv(4, 2)))
    assert graph.width["one"].frozen == f"reaches sort at {__file__}:{line}, which is not followed"
    assert graph.operations[1].where == f"conv2d at {__file__}:{line}"


@pytest.mark.parametrize("name", NETS)
def test_group_ids_cover_the_penalised_weights_once_per_axis(name: str) -> None:
    model, graph = example(name)
    groups = group([Filter(width) for width in graph.cuttable], model)
    parameters = dict(model.named_parameters())
    belongs = {name: torch.zeros(tensor.shape, dtype=torch.int64) for name, tensor in parameters.items()}
    wanted = {name: torch.zeros(tensor.shape, dtype=torch.int64) for name, tensor in parameters.items()}
    for member in groups.members:
        belongs[member.tensor] += (member.ids < groups.count).expand(parameters[member.tensor].shape)
    seen = set[tuple[str, int, int]]()
    for width in graph.cuttable:
        for piece in width.slices:
            if piece.penalised:
                owned = set((piece.units >= 0).nonzero()[0].tolist())
                assert seen.isdisjoint((piece.tensor, piece.axis, i) for i in owned)
                seen |= {(piece.tensor, piece.axis, i) for i in owned}
                wanted[piece.tensor].index_add_(
                    piece.axis,
                    torch.tensor(sorted(owned)),
                    torch.ones_like(wanted[piece.tensor]).narrow(piece.axis, 0, len(owned)),
                )
    assert all(torch.equal(belongs[name], wanted[name]) for name in parameters)
    assert groups.sizes(parameters).sum() == sum(int(tensor.sum()) for tensor in wanted.values())
    assert groups.count == sum(width.size for width in graph.cuttable)


# --- blocks -------------------------------------------------------------------------------------------------------

BLOCKS = {
    "residual, option B": ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1"],
    "residual, option A": ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1"],
    "VGG": [],
    "MobileNet": ["3", "12"],
    "pre-activation": ["1", "2", "3"],
    "bottleneck": ["2", "4"],
    "functional": ["add", "add_"],
    "nested": ["1.body.1", "1"],
    "densely connected": [],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_residual_blocks_are_found_and_free(name: str) -> None:
    _, graph = example(name)
    assert [block.name for block in graph.blocks] == BLOCKS[name]
    assert [block.frozen for block in graph.blocks] == [None] * len(BLOCKS[name])


def test_a_width_knows_the_block_around_it() -> None:
    _, graph = example("nested")
    assert [(width.name, width.block) for width in graph.cuttable] == [
        ("0", None), ("1.body.0", "1"), ("1.body.1.body.0", "1.body.1"),
    ]  # fmt: skip
    assert {operation.name: set(operation.blocks) for operation in graph.operations} == {
        "0": set(), "1.body.0": {"1"}, "1.body.1.body.0": {"1.body.1", "1"}, "1.body.1.body.2": {"1.body.1", "1"},
        "1.body.2": {"1"}, "3": set(),
    }  # fmt: skip


class Overwriting(nn.Module):
    """Its body's first step writes into what the shortcut passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(x, inplace=True)) + x  # type: ignore[no-any-return]


class Branching(Sum):
    """A block whose forward branches on a size, which torch.fx cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 0 else x


def _embedded() -> nn.Module:
    net = Lambda(lambda net, x: net.fc((net.conv(x) + net.place).flatten(1)), conv=conv(3, 8), fc=nn.Linear(512, 5))
    net.place = nn.Parameter(torch.ones(1, 8, 8, 8))
    return net


def _shared_body() -> nn.Module:
    block = Sum(conv(8, 8), nn.BatchNorm2d(8))
    return nn.Sequential(conv(3, 8), block, nn.ReLU(), block)


NO_BLOCK = {
    "a scaled addition": (lambda: Lambda(lambda net, x: torch.add(x, net.one(x), alpha=2), one=conv(3, 3)), PIXELS),
    "a learned position added": (_embedded, (1, 3, 8, 8)),
    "a body that ends in a sigmoid": (lambda: Sum(conv(3, 3), nn.Sigmoid()), PIXELS),
    "a body that ends in a bare normalisation": (lambda: Sum(conv(3, 3), nn.BatchNorm2d(3, affine=False)), PIXELS),
    "broadcasting": (lambda: Sum(conv(3, 3), nn.AdaptiveAvgPool2d(1), conv(3, 3, 1)), PIXELS),
}
FROZEN_BLOCK = {"a body used twice": (_shared_body, "1.body.1.weight is also used by batch_norm")}
BY_GRAPH = {  # blocks that cannot be taken out of the user's own forward
    "an overwritten shortcut": lambda: nn.Sequential(conv(3, 8), Overwriting()),
    "a branch on the input": lambda: nn.Sequential(Branching(conv(3, 3))),
}


@pytest.mark.parametrize("case", NO_BLOCK)
def test_not_every_addition_is_a_block(case: str) -> None:
    make, shape = NO_BLOCK[case]
    assert traced(make(), shape).blocks == ()


@pytest.mark.parametrize("case", FROZEN_BLOCK)
def test_a_block_that_cannot_leave_says_why(case: str) -> None:
    make, reason = FROZEN_BLOCK[case]
    blocks: tuple[Block, ...] = traced(make()).blocks
    assert blocks
    assert all(reason in (block.frozen or "") for block in blocks)


@pytest.mark.parametrize("case", BY_GRAPH)
def test_a_block_whose_forward_cannot_be_followed_leaves_the_graph(case: str) -> None:
    model = nets.looking_trained(BY_GRAPH[case]()).eval()
    (block,) = traced(model).blocks
    dense = cut(model, traced(model), {}, frozenset({block.name}))
    assert block.frozen is None
    assert isinstance(dense, torch.fx.GraphModule)
    assert not block.modules & dict(dense.named_modules()).keys()


# --- operations ---------------------------------------------------------------------------------------------------


def test_operations_of_a_small_net_by_hand() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten()),
        nn.Linear(8 * 4, 5),
    )
    graph = traced(net, (2, 3, 8, 8))
    first, second, third = graph.operations
    assert [operation.kind for operation in graph.operations] == ["conv2d", "depthwise_conv2d", "linear"]
    assert [operation.macs(graph.dense) for operation in graph.operations] == [
        2 * 4 * 4 * 9 * 3 * 8,
        2 * 2 * 2 * 9 * 8,
        2 * 32 * 5,
    ]
    half = graph.choice({"0": 4})
    assert [first.widths(half), second.widths(half), third.widths(half)] == [(3, 4), (4, 4), (16, 5)]
    assert graph.macs(half) == 2 * (4 * 4 * 9 * 3 * 4 + 2 * 2 * 9 * 4 + 16 * 5)
    assert first.signature == "conv2d 3x3 s2x2 p1x1 d1 @2x8x8 relu"


def test_grouped_convolutions_of_other_groups_differ() -> None:
    two, four = (traced(conv(8, 8, groups=groups), (1, 8, 4, 4)).operations[0] for groups in (2, 4))
    assert two.kind == four.kind == "grouped_conv2d"
    assert two.signature != four.signature


@pytest.mark.parametrize("name", NETS)
def test_macs_are_those_that_pytorch_counts(name: str) -> None:
    model, graph = example(name)
    assert graph.macs(graph.dense) == count_macs(model)


@pytest.mark.parametrize("name", nets.CUTTABLE)
def test_macs_of_a_choice_are_those_of_the_cut_model(name: str) -> None:
    model, graph = example(name)
    keep = {width.name: (width.size + 1) // 2 for width in graph.cuttable}
    for removed in (frozenset[str](), frozenset(block.name for block in graph.blocks[::2])):
        small = cut(model, graph, {name: torch.arange(count) for name, count in keep.items()}, removed)
        assert graph.macs(graph.choice(keep, removed)) == count_macs(small)


def test_epilogues_say_what_runtimes_fuse() -> None:
    graph = traced(ResNet(1, (8, 8, 8)))
    words = {operation.name: operation.signature.split("@")[1].split(" ")[1:] for operation in graph.operations}
    assert words["layer1.0.conv1"] == ["relu"]
    assert words["layer1.0.conv2"] == ["add+relu"]
    assert words["fc"] == []


# --- fingerprints -------------------------------------------------------------------------------------------------

BASE = ResNet(1, (8, 12, 16))


def _in_order(first: str, second: str) -> nn.Module:
    """Return a net of two convolutions and an addition; which one is added differs."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        made = {"one": net.one(x)}
        made["two"] = net.two(made["one"])
        made["three"] = net.three(made["two"])
        return made[first] + made[second]  # type: ignore[no-any-return]

    return Lambda(forward, one=conv(3, 8), two=conv(8, 8), three=conv(8, 8))


DIFFERENT = {
    "width": (BASE, ResNet(1, (8, 12, 20))),
    "depth": (BASE, ResNet(2, (8, 12, 16))),
    "shortcut": (BASE, ResNet(1, (8, 12, 16), pad_shortcuts=True)),
    "wiring": (_in_order("one", "three"), _in_order("two", "three")),
    "activation": (nn.Sequential(conv(3, 4), nn.ReLU()), nn.Sequential(conv(3, 4), nn.SiLU())),
    "slope": (nn.Sequential(conv(3, 4), nn.LeakyReLU(0.1)), nn.Sequential(conv(3, 4), nn.LeakyReLU(0.2))),
    "dilation": (nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=2, dilation=2)),
    "name": (nn.Sequential(conv(3, 4)), Lambda(lambda net, x: net.one(x), one=conv(3, 4))),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_fingerprints_of_other_architectures_differ(case: str) -> None:
    first, second = (traced(model).fingerprint for model in DIFFERENT[case])
    assert first != second


def test_the_fingerprint_depends_on_the_inputs() -> None:
    prints = {traced(BASE, shape).fingerprint for shape in [(2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 16, 16)]}
    assert len(prints) == 3


def test_the_fingerprint_does_not_depend_on_weights_or_mode() -> None:
    model = copy.deepcopy(BASE)
    before = traced(model).fingerprint
    assert traced(nets.looking_trained(model).train()).fingerprint == before
    assert traced(model.eval()).fingerprint == before


# --- the model itself ---------------------------------------------------------------------------------------------


def modes(model: nn.Module) -> Counter[tuple[str, bool]]:
    return Counter((name, module.training) for name, module in model.named_modules())


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = nets.looking_trained(ResNet(1, (8, 8, 8))).train()
    model.get_submodule("bn1").eval()
    before, state = modes(model), copy.deepcopy(model.state_dict())
    traced(model)
    assert modes(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class Deciding(nn.Module):
    """Branches in Python on its data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y if y.sum() > 0 else -y


def test_wrong_input_is_refused_with_the_place() -> None:
    model = Lambda(lambda net, x: net.one(x), one=conv(3, 4)).train()
    with pytest.raises(PlanError, match=r"does not run on inputs of shape 2x5x8x8: .*expected input.* at .*\.py:\d+"):
        traced(model, (2, 5, 8, 8))
    assert model.training
    assert model.get_submodule("one").training


def test_a_branch_on_data_is_refused_with_the_place() -> None:
    model, line = Deciding().train(), Deciding.forward.__code__.co_firstlineno + 2
    with pytest.raises(PlanError, match=rf"cannot be traced on inputs of shape 2x3x8x8: .* at {HERE}:{line} \(return"):
        traced(model)
    assert model.training


def test_a_model_without_layers_has_no_widths() -> None:
    graph = traced(nn.ReLU())
    assert (graph.widths, graph.blocks, graph.operations) == ((), (), ())


def test_a_wrapped_model_is_refused() -> None:
    model = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3)), backend="eager")
    with pytest.raises(PlanError, match="wrapped by OptimizedModule"):
        trace(model, (torch.ones(PIXELS),))
