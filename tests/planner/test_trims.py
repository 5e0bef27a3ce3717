"""Kernels, inputs of single layers and N:M are planned where the profile says with evidence that they pay."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import planner
import profiles
from backends.rebuild import rebuild
from backends.semi_structured import is_two_of_four
from backends.shapes import CroppedConv
from planner import Plan, resources
from planner.graph import Graph, trace
from planner.groups import group
from planner.latency import Probe, Rules, cross_validated, fit, keys
from planner.offers import trimmable
from planner.operations import Operation
from planner.structures import NM, Kernel, kept, ranked
from planner.trims import Trim, structure_of
from profiles.errors import PlanError
from profiles.schema import Where
from tools.examples.resnet import ResNet
from tools.explain import reasons
from tools.networks import network

from .nets import PIXELS, conv, knowing, looking_trained, table_of

INPUTS = (torch.ones(PIXELS),)
ORT = "x86_64_v4.onnxruntime.fp32"
INNER = "layer2.1.conv2.weight"
STREAM = "layer2.1.conv1.weight"
WITH_PATTERNS = {
    *("nvidia-a100.cublas.fp16", "nvidia-h200.cublas.fp16", "nvidia-ampere.tensorrt.fp16"),
    *("nvidia-ampere.tensorrt.int8", "nvidia-a100.tensorrt.int8", "nvidia-h100.cublas.fp16"),
    *(f"jetson-agx-orin-64gb.{rest}" for rest in ("tensorrt-dla.int8", "tensorrt.int8", "tensorrt.fp16")),
    *(f"ethos-u85-{macs}.vela.int8" for macs in (128, 256, 512, 1024, 2048)),
}


def net() -> nn.Module:
    """Return convolutions and linear layers, wide enough for every condition of a profile."""
    return nn.Sequential(
        *(conv(3, 96), nn.ReLU(), conv(96, 64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)),
    )


def residual() -> nn.Module:
    """Return a residual net whose kernels are little but their centres in one layer, and whose inputs in another."""
    model = looking_trained(ResNet(2, (8, 8, 8))).eval()
    with torch.no_grad():
        weight = model.get_parameter(INNER)
        centre = weight[..., 1:2, 1:2].clone()
        weight.mul_(0.01)[..., 1:2, 1:2] = centre
        model.get_parameter(STREAM)[:, 4:] *= 0.01
    return model


def offered(model: nn.Module, profile: profiles.Profile, **scope: object) -> dict[str, Trim]:
    graph = trimmable(trace(model, INPUTS), model, profile, planner.Scope(**scope))  # type: ignore[arg-type]
    return {trim.name: trim for trim in graph.trims}


# --- what is offered ----------------------------------------------------------------------------------------------


def test_profiles_offer_only_what_they_have_evidence_for() -> None:
    model = net()
    graph = trace(model, INPUTS)
    found = {}
    for name in profiles.names():
        trims = trimmable(graph, model, profiles.load(name), planner.Scope()).trims
        found[name] = {trim.structure for trim in trims}
    assert {name for name, kinds in found.items() if kinds} == WITH_PATTERNS
    assert all(kinds == {"nm"} for kinds in found.values() if kinds)


@pytest.mark.parametrize("name", [ORT, "x86_64_v3.openvino.fp32", "aarch64.xnnpack.fp32", "ethos-u55-128.vela.int8"])
def test_plans_without_trims_are_what_they_were(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, profile = looking_trained(ResNet(1, (32, 32, 32))), profiles.load(name)
    plan = planner.plan(model, INPUTS, profile, latency=0.6)
    monkeypatch.setattr("planner.search.trimmable", lambda graph, *_: graph)
    before = planner.plan(model, INPUTS, profile, latency=0.6)
    assert plan.trims == ()
    same = {"proof": before.proof.model_copy(update={"solved_s": plan.proof.solved_s})}
    assert plan == before.model_copy(update=same)


def test_what_pays_without_evidence_or_not_at_all_takes_force() -> None:
    model = net()
    guess = knowing(kernel_shape="yes", in_channels="no")
    guess = guess.model_copy(
        update={"structure": tuple(own.model_copy(update={"confidence": "inferred"}) for own in guess.structure)}
    )
    assert offered(model, guess) == {}
    assert set(offered(model, guess, force=True)) == {"0.weight kernel", "2.weight kernel", "0.weight channel"}


def test_conditions_of_a_profile_hold_or_nothing_is_offered() -> None:
    trims = offered(net(), profiles.load("nvidia-a100.cublas.fp16"))
    assert list(trims) == ["6.weight 2:4", "8.weight 2:4"]  # linear, of 64 inputs and 32 or 64 outputs
    assert trims["6.weight 2:4"].needs == {"2": frozenset({64}), "6": frozenset({32, 64})}
    assert list(offered(net(), profiles.load("jetson-agx-orin-64gb.tensorrt-dla.int8"))) == ["2.weight 2:4"]
    where = Where(ops=("linear",), multiples={"in_channels": 4}, at_least={"in_channels": 65})
    assert [where.fits("in_channels", n) for n in (64, 66, 68)] == [False, False, True]
    assert where.fits("out_channels", 3)


def test_the_scope_holds_for_trims() -> None:
    profile = knowing(kernel_shape="yes")
    assert set(offered(net(), profile, exclude_op_names=("2",))) == {"0.weight kernel"}
    assert set(offered(net(), profile, op_types=("Linear",))) == set()


def test_kernels_are_offered_where_they_can_be_cropped() -> None:
    layers = {
        "padded": nn.Conv2d(3, 3, 5, padding=2),
        "same": nn.Conv2d(3, 3, (1, 5), padding="same", dilation=2),
        "depthwise": nn.Conv2d(3, 3, 3, padding=1, groups=3),
        "narrowly padded": nn.Conv2d(3, 3, 5, padding=1),
        "valid": nn.Conv2d(3, 3, 3, padding="valid"),
        "even": nn.Conv2d(3, 3, 2, padding=1),
        "transposed": nn.ConvTranspose2d(3, 3, 3, padding=1),
    }
    counts = {}
    for name, layer in layers.items():
        for trim in offered(nn.Sequential(layer, nn.ReLU()), knowing(kernel_shape="yes")).values():
            counts[name] = trim.counts
    assert counts == {"padded": (1, 9, 25), "same": (1, 3, 5), "depthwise": (1, 9)}


def test_inputs_are_offered_of_what_others_read_too() -> None:
    trims = offered(residual(), knowing(in_channels="yes"))
    assert {trim.groups.tensor for trim in trims.values()} >= {STREAM, "layer1.0.conv1.weight"}
    assert INNER not in {trim.groups.tensor for trim in trims.values()}  # its inputs are a width of its own
    assert trims[f"{STREAM} channel"].needs == {"layer2.0.conv2": frozenset({8})}


# --- what it costs ------------------------------------------------------------------------------------------------


def _operation(graph: Graph, weight: str) -> Operation:
    return next(own for own in graph.operations if own.weight == weight)


def test_a_trimmed_operation_says_what_is_left() -> None:
    whole = _operation(trace(ResNet(1, (8, 8, 8)), INPUTS), "layer1.0.conv2.weight")
    one, inputs, outputs = whole.trimmed({f"{whole.weight} kernel": 1}, 8, 8)
    assert (inputs, outputs, one.macs_per_pair * 9, one.whole) == (8, 8, whole.macs_per_pair, whole)
    assert one.signature == whole.signature.replace(" 3x3 ", " 1x1 ").replace(" p1x1 ", " p0x0 ")
    read, inputs, _ = whole.trimmed({f"{whole.weight} channel": 6}, 8, 8)
    assert (inputs, read.copied_per_input) == (6, whole.read_per_input)
    assert " of8 @" in read.signature
    assert whole.trimmed({f"{whole.weight} channel": 8, f"{whole.weight} kernel": 9}, 4, 8) == (whole, 4, 8)


def test_rules_price_a_crop_by_its_work_and_a_selection_with_its_copy() -> None:
    graph, rules = trace(ResNet(1, (64, 64, 64)), INPUTS), Rules(profiles.load(ORT))
    whole = _operation(graph, "layer1.0.conv2.weight")
    one, *_ = whole.trimmed({f"{whole.weight} kernel": 1}, 64, 64)
    assert rules.load(one, 64, 64).macs * 9 == rules.load(whole, 64, 64).macs
    assert rules.load(one, 64, 64).written == rules.load(whole, 64, 64).written
    read, *_ = whole.trimmed({f"{whole.weight} channel": 32}, 64, 64)
    copied_s = 2 * 4 * 32 * 2 * 64 / rules.balance.activation_bytes_per_s + rules.balance.launch_s
    assert rules.cost(read, 32, 64) == pytest.approx(rules.cost(whole, 32, 64) + copied_s)


def test_patterns_are_worth_what_the_profile_states() -> None:
    inputs = (torch.ones(4096, 512),)
    model = nn.Sequential(nn.Linear(512, 512))
    graph = trimmable(trace(model, inputs), model, profiles.load("nvidia-a100.cublas.fp16"), planner.Scope())
    (whole,) = graph.operations
    sparse, *_ = whole.trimmed({"0.weight 2:4": 2}, 512, 512)

    def share(**changes: object) -> list[float]:
        profile = profiles.load("nvidia-a100.cublas.fp16")
        (known,) = (own for own in profile.structure if own.kind == "nm_sparsity")
        peak = profile.peak
        assert peak is not None
        if ops := changes.pop("ops", None):
            peak = peak.model_copy(update={"ops_per_s": {**peak.ops_per_s, "fp16_sparse": ops}})
        structure = (known.model_copy(update=changes),)
        rules = Rules(profile.model_copy(update={"structure": structure, "peak": peak}))
        dense = rules.load(whole, 512, 512).macs
        return [rules.load(sparse, 512, 512, paid=paid).macs / dense for paid in (0.0, None, 1.0)]

    assert share() == [0.5, 0.75, 1.0]
    assert share(speedup=(1.25, 2.0)) == pytest.approx([0.5, 0.65, 0.8])
    assert share(ops=500e12) == pytest.approx([312 / 500] * 3)
    assert share(pays="no", requires=(), where=None) == [1.0, 1.0, 1.0]


def test_a_table_prices_what_it_has_not_measured_by_the_ratio_of_the_rules() -> None:
    model = residual()
    graph = trace(model, INPUTS)
    scope = planner.Scope(force=True, op_names=(INNER.removesuffix(".weight"),))
    profile = profiles.load(ORT)
    wanted = keys(graph, planner.problem(model, INPUTS, profile, scope=planner.Scope(force=True)).options(thrifty=True))
    table = table_of(graph, dict.fromkeys(wanted, 1e-3), profile=ORT)
    plan = planner.plan(model, INPUTS, profile, latency=0.995, table=table, scope=scope)
    assert [(trim.name, trim.keep) for trim in plan.trims] == [(f"{INNER} kernel", 1)]
    whole = _operation(graph, INNER)
    one, *_ = whole.trimmed({f"{INNER} kernel": 1}, 8, 8)
    rules = Rules(profile)
    assert table.cost(one, 8, 8) == pytest.approx(1e-3 * rules.cost(one, 8, 8) / rules.cost(whole, 8, 8))
    saved = (1e-3 - table.cost(one, 8, 8)) / table.latency(graph, graph.dense)
    assert plan.predicted.fraction == pytest.approx(1 - saved)
    assert any("the table has not measured layer2.1.conv2 as planned" in note for note in plan.notes)
    known = table_of(graph, {**dict.fromkeys(wanted, 1e-3), (one.signature, 8, 8): 7e-4}, profile=ORT)
    assert known.cost(one, 8, 8) == 7e-4
    with pytest.raises(PlanError, match=r"layer2\.1\.conv2 was not measured as it is trimmed, and .*any\.pytorch"):
        table_of(graph, dict.fromkeys(wanted, 1e-3)).cost(one, 8, 8)


def test_a_table_learns_from_a_network_that_was_measured_as_planned() -> None:
    model = residual()
    graph, profile = trace(model, INPUTS), profiles.load(ORT)
    rules = Rules(profile)

    def probe(slower: float = 1.0, **keep: int) -> Probe:
        choice = graph.choice(keep)
        latency_s = slower * rules.latency(graph, choice)
        ci95_s = (latency_s * 0.999, latency_s * 1.001)
        common = {
            "relative": latency_s / slower / rules.latency(graph, graph.dense),
            "ci95_s": ci95_s,
            "runs": 9,
            "removed": (),
        }
        return Probe(keep=dict(choice.keep), latency_s=latency_s, **common)

    probes = [probe(**{"layer1.0.conv1": n, "layer3.0.conv1": m}) for n in (2, 4, 8) for m in (2, 4, 8)]
    probes.append(probe(1.001, **{f"{INNER} kernel": 1, f"{STREAM} channel": 4}))  # in turns with dense alone
    found = fit(graph, profile, keys(graph, {}), probes)
    one, *_ = _operation(graph, INNER).trimmed({f"{INNER} kernel": 1}, 8, 8)
    read, *_ = _operation(graph, STREAM).trimmed({f"{STREAM} channel": 4}, 8, 8)
    table = table_of(graph, {}, profile=ORT).model_copy(update=dict(found))
    assert table.knows(one)
    assert table.knows(read)
    assert {(e.operation, e.inputs, e.outputs) for e in found.entries} >= {
        (one.signature, 8, 8),
        (read.signature, 4, 8),
    }
    assert table.latency(graph, probes[-1].choice) == pytest.approx(probes[-1].latency_s, rel=0.02)
    assert len(cross_validated(graph, profile, probes)) == len(probes)


# --- what is lost -------------------------------------------------------------------------------------------------


def test_groups_of_a_kernel_go_outwards_and_of_a_pattern_run_by_run() -> None:
    weight = torch.arange(1.0, 51).view(1, 2, 5, 5)
    square = Kernel("w", (5, 5))
    ((_, ids),) = square.maps({"w": weight.shape})
    assert ids[0, 0, 2, 2] == 0
    assert sorted(ids[0, 0, 1:4, 1:4].flatten().tolist()) == list(range(9))
    assert sorted(ids.flatten().tolist()) == list(range(25))
    ((_, border),) = Kernel("w", (5, 5), inner=9).maps({"w": weight.shape})
    assert (border[0, 0, 1:4, 1:4] == -1).all()
    assert int((border >= 0).sum()) == Kernel("w", (5, 5), inner=9).count == 16
    assert kept(square, torch.rand(25), 9).tolist() == [1.0] * 9 + [0.0] * 16
    scores = torch.tensor([4.0, 1, 3, 2, 0, 5, 6, 7])
    assert kept(NM("w", 8, 2, 4), scores, 2).tolist() == [1, 0, 1, 0, 0, 0, 1, 1]
    assert ranked(NM("w", 8, 2, 4), scores).tolist() == [11, 9, 7, 1]


def test_every_importance_knows_trims() -> None:
    model = residual()
    profile = knowing(in_channels="yes", kernel_shape="yes", nm_sparsity="yes")
    posed = planner.problem(model, INPUTS, profile)
    graph, options = posed.graph, posed.options(thrifty=True)
    assert {trim.structure for trim in graph.trims} == {"channel", "kernel", "nm"}
    batches = [(torch.randn(PIXELS), torch.tensor([0, 1]))]
    loss = F.cross_entropy
    found = [
        planner.magnitude(model, graph, options),
        planner.taylor(model, graph, options, batches, loss=loss),
        planner.measured(model, graph, options, batches, loss=loss),
        planner.batchnorm_scale(model, graph, options),
        planner.at_random(graph, options),
    ]
    for importance in found:
        for trim in graph.trims:
            losses = importance.widths[trim.name]
            assert losses[trim.size] == 0
            assert [losses[count] for count in trim.counts] == sorted(losses.values(), reverse=True)
    squares = model.get_parameter(INNER).detach().square()
    border = 1 - float(squares[..., 1, 1].sum() / squares.sum())
    assert found[0].widths[f"{INNER} kernel"][1] == pytest.approx(border, rel=1e-4)
    measured = found[2]
    masked = copy.deepcopy(model)
    with torch.no_grad():
        (kernel,) = (trim for trim in graph.trims if trim.name == f"{INNER} kernel")
        group([structure_of(kernel)], masked).scale_(dict(masked.named_parameters()), torch.eye(9)[0])
        assert (masked.get_parameter(INNER)[..., 0, 0] == 0).all()
        (x, y), *_ = batches
        rise = float(loss(masked.train()(x), y) - loss(copy.deepcopy(model).train()(x), y))  # statistics of the batch
    assert measured.widths[f"{INNER} kernel"][1] == pytest.approx(max(0.0, rise), abs=1e-5)


# --- plans --------------------------------------------------------------------------------------------------------


def trained(plan: Plan, model: nn.Module) -> nn.Module:
    """Train to exact zeros in a few steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    planner.attach(plan, model, optimizer, steps=20)
    x = torch.randn(PIXELS)
    goal = torch.randn(model.train()(x).shape)
    for _ in range(22):
        optimizer.zero_grad()
        F.mse_loss(model(x), goal).backward()
        optimizer.step()
    return model.eval()


def test_kernels_and_inputs_are_planned_trained_and_rebuilt(tmp_path: Path) -> None:
    profile = knowing(kernel_shape="yes", in_channels="yes", depth="no")
    model = residual()
    plan = planner.plan(model, INPUTS, profile, latency=0.94)
    chosen = {trim.name: trim.keep for trim in plan.trims if trim.keep < trim.dense}
    assert chosen == {f"{INNER} kernel": 1, f"{STREAM} channel": 4}
    budgets = {pool.name: (pool.structure, pool.budget) for pool in plan.pools}
    assert budgets == {f"{INNER} 1x1": ("kernel", 0.0), STREAM: ("channel", 4.0)}
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    dense = rebuild(plan, trained(plan, model), profile=profile)
    assert dense.get_parameter(INNER).shape == (8, 8, 1, 1)
    assert dense.get_parameter(STREAM).shape == (8, 4, 3, 3)
    posed = planner.problem(model, INPUTS, profile)
    choice = posed.graph.choice(plan.choice.keep, plan.choice.removed)
    parameters = resources.parameters(posed.graph, model).under(choice)
    assert parameters == sum(p.numel() for p in dense.parameters())
    macs = plan.predicted.macs
    assert macs == trace(model, INPUTS).macs(choice) == resources.operations(posed.graph).under(choice)
    assert plan.predicted.dense_macs - macs == 2 * (8 * 8 * 4 * 4) * (8 + 4 * 9 / 8)
    timed = network(model, trace(model, INPUTS), choice)
    assert {n: p.shape for n, p in timed.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}


def test_a_pattern_is_planned_trained_and_survives_the_rebuild() -> None:
    profile = knowing(nm_sparsity="yes", filters="no")
    model = looking_trained(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 4))).eval()
    plan = planner.plan(model, INPUTS, profile, latency=0.8)
    chosen = [trim.name for trim in plan.trims if trim.keep < trim.dense]
    assert chosen
    assert {(pool.name, pool.budget) for pool in plan.pools if pool.structure == "nm"} == {(n, 2.0) for n in chosen}
    dense = rebuild(plan, trained(plan, model), profile=profile)
    for name in chosen:
        weight = dense.get_parameter(name.split()[0])
        assert is_two_of_four(weight)
        assert weight.shape[1] == 8  # all inputs stay, or the fours would be other ones
    low, fraction, high = plan.predicted.low, plan.predicted.fraction, plan.predicted.high
    assert low < fraction < high  # how much of the peak is reached is not known


def test_what_needs_a_width_leaves_it_whole() -> None:
    model, profile = residual(), knowing(in_channels="yes", nm_sparsity="yes")
    for latency in (0.3, 0.5, 0.7):
        posed = planner.problem(model, INPUTS, profile)
        plan = posed.solve(latency)
        full = posed.graph.choice(plan.choice.keep, plan.choice.removed).keep
        for trim in posed.graph.trims:
            if full[trim.name] < trim.size:
                assert all(full[name] in {0, *counts} for name, counts in trim.needs.items())


def test_what_leaves_with_a_block_is_not_trimmed() -> None:
    model, profile = residual(), knowing(kernel_shape="yes")
    posed = planner.problem(model, INPUTS, profile)
    free = planner.magnitude(model, posed.graph, posed.options(thrifty=True))
    cheap = {trim.name: {1: 0.0, 9: 0.0} for trim in posed.graph.trims}
    nothing = {name: dict.fromkeys(losses, 1.0) for name, losses in free.widths.items()}
    free = replace(free, widths={**nothing, **cheap}, blocks=dict.fromkeys(free.blocks, 0.0), stages={})
    plan = posed.solve(0.3, importance=free)
    gone = {block.name for block in plan.blocks if block.removed}
    assert gone
    kept_whole = {trim.layer for trim in plan.trims if trim.keep == 9}
    assert {f"{block}.conv1" for block in gone} <= kept_whole


def test_trims_make_a_plan_lose_less() -> None:
    model = residual()
    lost = [
        planner.plan(model, INPUTS, knowing(**pays), latency=0.6).proof.objective
        for pays in ({}, {"kernel_shape": "yes"}, {"kernel_shape": "yes", "in_channels": "yes"})
    ]
    assert lost[0] > lost[1] >= lost[2]


def test_a_plan_says_why_a_layer_is_trimmed() -> None:
    model = residual()
    plan = planner.plan(model, INPUTS, knowing(kernel_shape="yes", depth="no"), latency=0.97)
    told = reasons(plan, INNER.removesuffix(".weight"))
    assert told[0].endswith("keeps 1 of 9 positions of its kernel")
    assert told[1].endswith("(magnitude) <- kept")
    assert f"latency {plan.predicted.fraction:.3f} of dense" in told[1]
    whole = planner.plan(model, INPUTS, knowing(kernel_shape="yes", depth="no"), latency=1.0)
    assert f"{INNER} kernel: 9 -> 1" in whole.diff(plan)
    with pytest.raises(PlanError, match=r"no width or block 'layer2\.1\.conv9'; near it: .*layer2\.1\.conv2"):
        reasons(plan, "layer2.1.conv9")


def test_a_forced_plan_says_that_it_is_not_known_to_pay() -> None:
    model = residual()
    scope = planner.Scope(force=True, op_names=(INNER.removesuffix(".weight"),))
    plan = planner.plan(model, INPUTS, profiles.load(ORT), latency=0.995, scope=scope)
    assert [(trim.name, trim.keep) for trim in plan.trims] == [(f"{INNER} kernel", 1)]
    assert plan.notes[0] == f"whether cutting kernel_shape pays on {ORT} is not known"
    planner.harden_(plan, model)
    layer = rebuild(plan, model).get_submodule(INNER.removesuffix(".weight"))
    assert isinstance(layer, nn.Conv2d | CroppedConv)
    assert math.prod(layer.weight.shape[2:]) == 1
