"""Documented rules alone: the roofline by hand, what is rounded, ranges, and facts that were measured."""

from collections.abc import Sequence
from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import profiles
from backends.rebuild import cut
from planner.graph import Graph, trace
from planner.latency import Rules
from planner.roofline import BESIDE, BYTES, REJECTED, TYPICAL, balance
from profiles import Profile
from profiles.schema import Device, Dtype, Memory, Number, Overhead, Peak, Runtime, Source
from profiles.schema import Granularity as Rule
from tests.zoo import ZOO
from tools.examples import cifar10, imagenet

from .nets import conv

CITED: dict[str, Any] = {"confidence": "documented", "sources": ("page",)}
PIXELS = 16 * 16


def device(*rules: Rule, **more: Any) -> Profile:
    """Return an NPU with these rules."""
    return Profile(
        schema=1,
        id="some.pytorch.fp32",
        device=Device(vendor="any", kind="npu", arch="any"),
        runtime=Runtime(name="pytorch"),
        dtype=Dtype(weights="fp32", activations="fp32"),
        granularity=rules,
        source=(Source(id="page", url="https://example.org", quote="16", retrieved="2026-11-20"),)  # type: ignore[arg-type]
        if rules or more
        else (),
        **more,
    )


def rule(mode: str, quantum: int = 16, *, axis: str = "out_channels", op: str = "conv2d", **more: Any) -> Rule:
    """Return a rule that somebody documented."""
    more.setdefault("fallback", "another kernel" if mode == "cliff" else None)
    return Rule(op=op, axis=axis, quantum=quantum, mode=mode, **{**CITED, **more})  # type: ignore[arg-type]


@cache
def pair(width: int = 64, size: int = 3) -> Graph:
    """A convolution from and one back to `width` channels, on 16x16 pixels."""
    net = nn.Sequential(conv(width, width, size, bias=False), nn.ReLU(), conv(width, width, size, bias=False))
    return trace(net, (torch.ones(1, width, 16, 16),))


def work(profile: Profile, outputs: int, inputs: int = 64) -> float:
    """Return the rounded multiply-accumulates of the pair's first convolution per pixel, tap and pair of 64 x 64."""
    operation = pair().operations[0]
    load = Rules(profile).load(operation, inputs, outputs)
    return load.penalty * load.macs / (operation.macs_per_pair * 64)


# --- the roofline -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ops_per_s", "bytes_per_s", "expected_s"),
    [
        (2e9, 1e12, PIXELS * 9 * 64 * 32 / 1e9 + 1e-6),  # waits for work
        (2e15, 1e9, 4 * (PIXELS * (64 + 32) + 9 * 64 * 32) / 1e9 + 1e-6),  # waits for bytes
    ],
)
def test_an_operation_takes_its_work_or_its_bytes_and_a_launch(
    ops_per_s: float, bytes_per_s: float, expected_s: float
) -> None:
    launches = Overhead(per="operation", latency_s=1e-6, **CITED), Overhead(per="inference", latency_s=1.0, **CITED)
    profile = device(
        peak=Peak(ops_per_s={"fp32_dense": ops_per_s, "int8_dense": 1e30}, **CITED),
        memory=(Memory(name="dram", on_chip=False, bandwidth_bytes_per_s=bytes_per_s, **CITED),),
        overhead=launches,
    )
    assert Rules(profile).cost(pair().operations[0], 64, 32) == pytest.approx(expected_s)


def test_memories_that_are_apart_do_not_wait_for_each_other() -> None:
    near = Memory(name="sram", on_chip=True, bandwidth_bytes_per_s=1e8, **CITED)
    far = Memory(name="flash", on_chip=False, bandwidth_bytes_per_s=1e7, **CITED)
    activations_s, weights_s = 4 * PIXELS * 128 / 1e8, 4 * 9 * 64 * 64 / 1e7
    operation = pair().operations[0]
    assert Rules(device(memory=(near, far))).cost(operation, 64, 64) == pytest.approx(max(activations_s, weights_s))
    one = 4 * (PIXELS * 128 + 9 * 64 * 64) / 1e7
    assert Rules(device(memory=(far,))).cost(operation, 64, 64) == pytest.approx(one)


def test_what_no_cache_holds_moves_slower() -> None:
    profile = profiles.load("x86_64_v4.openvino.fp32")
    at, pointwise = balance(profile), conv(16, 16, 1, bias=False)
    operations = [trace(pointwise, (torch.ones(n, 16, 128, 128),)).operations[0] for n in (2, 8)]
    cost = [Rules(profile).cost(operation, 16, 16) for operation in operations]
    each, weights_s = 4 * 2 * 16 * 128 * 128, 4 * 16 * 16 / at.weight_bytes_per_s
    assert 2 * each < at.cache_bytes < 8 * each
    assert cost[0] == pytest.approx(2 * each / at.activation_bytes_per_s + weights_s + at.launch_s)
    beyond_s = (8 * each - at.cache_bytes) / at.beyond_bytes_per_s
    assert cost[1] == pytest.approx(at.cache_bytes / at.activation_bytes_per_s + beyond_s + weights_s + at.launch_s)


def test_a_sparse_peak_is_never_a_dense_one() -> None:
    peak = Peak(ops_per_s={"fp32_sparse": 1e20}, **CITED)
    assert balance(device(peak=peak)).macs_per_s == TYPICAL["npu"].macs_per_s


def test_every_kind_of_device_and_number_is_known() -> None:
    assert set(TYPICAL) == set(get_args(Device.model_fields["kind"].annotation))
    assert set(BYTES) == set(get_args(Number))


@pytest.mark.parametrize("name", profiles.names())
def test_every_profile_predicts_that_half_the_width_is_no_slower_and_all_of_it_is_one(name: str) -> None:
    rules, graph = Rules(profiles.load(name)), pair()
    low, high = rules.fractions(graph, graph.choice({"0": 32}))
    assert 0 < low <= high <= 1
    assert rules.fractions(graph, graph.dense) == (1.0, 1.0)


# --- rounding -----------------------------------------------------------------------------------------------------

MODES: dict[str, tuple[Sequence[Rule], float]] = {
    "nothing known": ((), 33),
    "padded": ((rule("pad"),), 48),
    "padded in part": ((rule("pad", alpha=0.25),), 33 + 0.25 * 15),
    "a tile whose price is unknown": ((rule("tile"),), (33 + 48) / 2),
    "a tile that is paid": ((rule("tile", alpha=1.0),), 48),
    "padded or in a tile, depending on words": ((rule("pad", when="a"), rule("tile", when="b")), (48 + 40.5) / 2),
    "not yet": ((rule("pad", at_least=34),), 33),
    "no more": ((rule("pad", at_most=32),), 33),
    "more than half a tile": ((rule("pad", 32, at_least=17), rule("pad", when="half a tile", at_most=16)), 64),
    "folklore": ((rule("pad", confidence="folklore"), rule("tile", 64, when="b", confidence="inferred")), 33),
    "of another operation": ((rule("pad", op="linear"),), 33),
    "beside a cliff": ((rule("cliff", 4, penalty=1.9), rule("pad", when="a")), 1.9 * 33),
    "beside a cliff without a price": ((rule("cliff", 4),), BESIDE * 33),
    "on a cliff": ((rule("cliff", 11, penalty=1.9),), 33),
    "rejected": ((rule("reject", 4),), REJECTED * 33),
}


@pytest.mark.parametrize("case", MODES)
def test_work_is_rounded_as_documented(case: str) -> None:
    rules, width = MODES[case]
    assert work(device(*rules), 33) == pytest.approx(width)


def test_inputs_are_rounded_too() -> None:
    profile = device(rule("pad"), rule("pad", 8, axis="in_channels"))
    assert work(profile, 33, 17) == pytest.approx(48 * 24 / 64)


def test_beside_a_cliff_data_are_converted_on_the_way_in_and_out() -> None:
    operation = pair().operations[0]
    rules = Rules(device(rule("cliff", 4, penalty=1.9)))
    assert rules.load(operation, 64, 32).converted_bytes == 0
    load = rules.load(operation, 64, 33)
    assert load.converted_bytes == 4 * PIXELS * (64 + 33)
    at, typical = rules.balance, Rules(device()).cost(operation, 64, 33)
    assert rules.seconds(load) == pytest.approx(1.9 * typical + load.converted_bytes / at.activation_bytes_per_s)


def test_a_rule_of_one_kernel_takes_the_place_of_that_for_any() -> None:
    both = device(rule("cliff", 4, penalty=1.9), rule("cliff", 4, penalty=1.1, when="pointwise", kernel="1x1"))
    assert Rules(both).load(pair(size=3).operations[0], 64, 33).penalty == 1.9
    assert Rules(both).load(pair(size=1).operations[0], 64, 33).penalty == 1.1
    another = device(rule("cliff", 4, penalty=1.9), rule("pad", 4, when="pointwise", kernel="1x1"))
    assert Rules(another).load(pair(size=1).operations[0], 64, 33).penalty == 1.9


def test_classes_tell_widths_below_a_rule_from_those_beside_it() -> None:
    operation, rules = (
        pair().operations[0],
        Rules(device(rule("cliff", 4, at_least=16), rule("pad", axis="in_channels"))),
    )
    assert [rules.alignment(operation, 64, n) for n in (13, 33, 36, 64)] == [".-++", "--++", "+-++", "++++"]


def test_groups_are_cut_whole_so_their_own_widths_round_nothing() -> None:
    graph = trace(nn.Conv2d(64, 64, 3, groups=4), (torch.ones(1, 64, 8, 8),))
    rules = Rules(device(rule("cliff", 48, op="grouped_conv2d", penalty=1.9)))
    assert not rules.load(graph.operations[0], 64, 64).beside


@pytest.mark.parametrize(
    ("rules", "low", "high"),
    [
        ((), 0.5, 0.5),
        ((rule("tile", 64, alpha=0.5),), 0.75, 0.75),
        ((rule("tile", 64),), 0.5, 1.0),
        ((rule("pad", 64),), 0.5, 1.0),
    ],
)
def test_what_is_unknown_makes_a_range(rules: Sequence[Rule], low: float, high: float) -> None:
    graph = trace(conv(64, 64, bias=False), (torch.ones(1, 64, 16, 16),))
    operation = graph.operations[0]
    found = Rules(device(*rules))
    whole = found.load(operation, 64, 64).macs
    assert found.load(operation, 64, 32, paid=0.0).macs / whole == low
    assert found.load(operation, 64, 32, paid=1.0).macs / whole == high
    smaller = pair().choice({"0": 32})
    bounds = found.fractions(pair(), smaller)
    expected = found.latency(pair(), smaller) / found.latency(pair(), pair().dense)
    assert bounds[0] <= expected <= bounds[1]
    assert (bounds[0] < bounds[1]) == (low < high)


# --- facts that were measured on one AVX-512 core, stated by the rules without measuring ------------------------------

ORT = "x86_64_v4.onnxruntime.fp32"
SQUARE: dict[str, tuple[int, int, int]] = {"image": (3, 224, 224), "tiny": (3, 32, 32)}


def chain(width: int) -> float:
    """Return what four convolutions of `width` channels cost."""
    layers = [conv(width, width) for _ in range(4)]
    graph = trace(nn.Sequential(*layers), (torch.ones(1, width, 16, 16),))
    return Rules(profiles.load(ORT)).latency(graph, graph.dense)


@cache
def known(name: str) -> Graph:
    nets = {"resnet56": (cifar10.resnet56, "tiny"), "mobilenet_v2": (imagenet.mobilenet_v2, "image")}
    factory, size = nets[name]
    return trace(factory(), (torch.ones(1, *SQUARE[size]),))


def speedup(graph: Graph, keep: dict[str, int]) -> float:
    rules = Rules(profiles.load(ORT))
    return rules.latency(graph, graph.dense) / rules.latency(graph, graph.choice(keep))


@pytest.mark.parametrize("width", range(49, 64))
def test_between_48_and_64_channels_nothing_is_gained(width: int) -> None:
    assert chain(64) / chain(width) <= 1.0


def test_at_48_channels_it_is() -> None:
    assert chain(64) / chain(48) == pytest.approx(1.8, rel=0.05)


def test_widths_of_15_31_63_run_slower_than_16_32_64() -> None:
    graph = known("resnet56")
    assert speedup(graph, {w.name: w.size - 1 for w in graph.cuttable}) == pytest.approx(0.71, rel=0.1)


def test_half_the_inner_widths_halve_the_macs_and_not_the_latency() -> None:
    graph = known("resnet56")
    keep = {width.name: width.size // 2 for width in graph.cuttable if not width.is_stream}
    assert graph.macs(graph.dense) / graph.macs(graph.choice(keep)) == pytest.approx(2.0, rel=0.01)
    assert speedup(graph, keep) == pytest.approx(1.65, rel=0.05)


def test_a_tenth_off_mobilenet_beside_the_grid_makes_it_slower() -> None:
    graph = known("mobilenet_v2")
    assert speedup(graph, {w.name: round(0.9 * w.size) for w in graph.cuttable}) == pytest.approx(1 / 1.5, rel=0.15)


# --- what is counted ----------------------------------------------------------------------------------------------

UNCOUNTED = {  # what torch's counter passes over
    "fused attention": ("vit", "deit", "llama", "llama_rmsnorm", "grouped_queries", "decoder_layer", "conformer"),
    "the encoder's fast path": ("encoder_layer", "encoder_layer_prenorm"),
    "an LSTM": ("lstm", "lstm_bidirectional", "seq2seq"),
}
UNUSED = ("wavenet",)  # counts a layer whose output nothing reads, which no compiled model keeps


@cache
def of_zoo(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], Graph]:
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    return model, inputs, trace(model, inputs)


@pytest.mark.parametrize("name", ZOO)
def test_macs_of_the_zoo_are_those_that_pytorch_counts(name: str) -> None:
    model, inputs, graph = of_zoo(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    counted = counter.get_total_flops() // 2
    if any(name in names for names in UNCOUNTED.values()):
        assert graph.macs(graph.dense) > counted
    elif name in UNUSED:
        assert graph.macs(graph.dense) < counted
    else:
        assert graph.macs(graph.dense) == counted


@pytest.mark.parametrize("name", sorted(set(ZOO) - {*sum(UNCOUNTED.values(), ()), *UNUSED}))
def test_macs_of_a_choice_are_those_of_the_cut_net(name: str) -> None:
    model, inputs, graph = of_zoo(name)
    keep = {width.name: (width.size + 1) // 2 for width in graph.cuttable}
    small = cut(model, graph, {name: torch.arange(count) for name, count in keep.items()}, frozenset())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(*inputs)
    assert graph.macs(graph.choice(keep)) == counter.get_total_flops() // 2


@pytest.mark.parametrize(("name", "heads"), [("vit", 4), ("vit_manual", 4)])
def test_an_attention_is_as_wide_as_its_heads_and_their_features(name: str, heads: int) -> None:
    graph = of_zoo(name)[2]
    products = [operation for operation in graph.operations if operation.kind == "matmul"]
    assert len(products) == 2 * 2  # scores and values of two blocks
    width = next(w for w in graph.cuttable if w.structure == "head")
    assert width.size == heads
    first = [o for o in products if any(part == width.name for part, _ in o.outputs.parts)]
    assert len(first) == 2
    whole, half = graph.dense, graph.choice({width.name: heads // 2})
    assert [2 * o.outputs.under(half) for o in first] == [o.outputs.under(whole) for o in first]
    assert [2 * o.macs(half) for o in first] == [o.macs(whole) for o in first]


def test_what_only_moves_data_is_listed_where_it_matters() -> None:
    layers = [
        conv(8, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(16),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(256, 5),
    ]
    graph = trace(nn.Sequential(*layers), (torch.ones(1, 8, 8, 8),))
    assert [operation.kind for operation in graph.operations] == [
        *("conv2d", "linear"),  # the ReLU is fused, the flattening free
        *("max_pool2d", "batch_norm", "sigmoid"),
    ]
    pool = graph.operations[2]
    assert (pool.macs(graph.dense), pool.read_per_input, pool.moved_per_output) == (0, 64, 16)
    assert pool.widths(graph.choice({"0": 4})) == (4, 4)
    rules = Rules(device())
    assert rules.load(pool, 16, 16).activation_bytes == 4 * (16 * 64 + 16 * 16)
    assert rules.cost(pool, 8, 8) == rules.cost(pool, 16, 16) / 2
