"""The plan is the best one within its budgets, by brute force; its file is whole or refused."""

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import planner
import profiles
from planner import Importance, Plan, resources, solver
from planner.candidates import candidates, useful
from planner.document import with_global_budget
from planner.graph import Graph, trace
from planner.latency import Reload, Rules, keys
from planner.limits import Limits, amount
from planner.offers import trimmable
from planner.operations import Choice
from planner.program import Budget, Program
from planner.resources import Resource, Term
from profiles.errors import PlanError
from tools.examples.imagenet import VisionTransformer
from tools.examples.resnet import ResNet

from . import nets
from .nets import PIXELS, Sum, conv, example, table_of

INPUTS = (torch.ones(PIXELS),)
PROFILES = ["x86_64_v4.onnxruntime.fp32", "x86_64_v3.openvino.fp32", "aarch64.xnnpack.fp32", "nvidia-a100.cublas.fp16"]
LONG = bool(os.environ.get("ESPALIER_LONG"))


# --- the integer program against brute force ----------------------------------------------------------------------


def _chain_of_blocks() -> nn.Module:
    """Three blocks of one stage with a width each, and two ordinary widths."""
    blocks = [Sum(conv(6, 5), nn.ReLU(), conv(5, 6), nn.BatchNorm2d(6)) for _ in range(3)]
    return nn.Sequential(conv(3, 7), nn.ReLU(), conv(7, 6), *blocks, conv(6, 8), nn.ReLU(), conv(8, 4))


PROBLEMS: dict[str, Callable[[], nn.Module]] = {
    "pairs of widths": lambda: nn.Sequential(conv(3, 9), nn.ReLU(), conv(9, 9), conv(9, 9), conv(9, 9), conv(9, 2)),
    "blocks of one stage": _chain_of_blocks,
    "nested blocks": nets.nested,
    "joined widths": nets.densely_connected,
    "residual": lambda: ResNet(1, (6, 6, 6)),
    "strided shortcuts": lambda: ResNet(2, (4, 4, 4)),
    "bottleneck": nets.bottleneck,
    "MobileNet": nets.mobilenet,
    "transformer": lambda: VisionTransformer(8, heads=4, depth=2, image=8, patch=4),
}
SEEDS = 400 if LONG else 65  # of each problem: 520 instances


@cache
def built(name: str) -> tuple[nn.Module, Graph]:
    """Return the model of a problem and its graph with all trims, streams of transformers included."""
    model = PROBLEMS[name]()
    profile = nets.knowing(in_channels="yes", kernel_shape="yes", nm_sparsity="yes")
    return model, trimmable(trace(model, INPUTS, lossy=True), model, profile, planner.Scope())


class Posed:
    """A random problem: some widths with a few candidates each, some blocks, random costs on two devices and losses.

    Every second one has trims too, such as inputs and patterns that need a width that is cut.
    """

    def __init__(self, name: str, seed: int) -> None:
        """Draw it."""
        self.dice = dice = random.Random(f"{name}{seed}")
        model, graph = built(name)
        stay = set(dice.sample([b.name for b in graph.blocks], max(0, len(graph.blocks) - 2)))
        blocks = tuple(replace(b, frozen="stays" if b.name in stay else b.frozen) for b in graph.blocks)
        self.graph = replace(graph, blocks=blocks)
        chosen = dice.sample(graph.cuttable, min(3 + (seed + 1) % 2, len(graph.cuttable)))
        self.options = {w.name: self._candidates(w.size) for w in graph.cuttable if w in chosen}
        near = [trim for trim in graph.trims if not trim.needs.keys().isdisjoint(self.options)]
        other = [trim for trim in graph.trims if not trim.needs]
        for trim in (*dice.sample(near, min(seed % 2 * 2, len(near))), *dice.sample(other, min(seed % 2, len(other)))):
            self.options[trim.name] = (dice.choice(trim.counts[:-1]), trim.size)
        free = [block for block in blocks if not block.frozen]
        self.importance = Importance(
            "random",
            {n: self._losses(0.2 if " " in n else 1.0, counts) for n, counts in self.options.items()},
            {block.name: dice.uniform(0, 0.5) for block in free},
            {block.stage: dice.uniform(0, 0.5) for block in free},
        )
        wanted = trimmed_keys(self.graph, self.options)
        costs = [{key: self._cost_s(key[0]) for key in wanted} for _ in range(2)]
        tables = [
            table_of(graph, cost, moves_strides=moves) for cost, moves in zip(costs, (seed % 3 > 0, False), strict=True)
        ]
        self.resources = [
            *(resources.time(self.graph, table, f"device {i}") for i, table in enumerate(tables)),
            resources.parameters(self.graph, model),
            resources.activation_bytes(self.graph, nets.anywhere()),
            resources.operations(self.graph),
        ]

    def _losses(self, most: float, counts: Sequence[int]) -> dict[int, float]:
        return {count: self.dice.uniform(0, most) * (count < max(counts)) for count in counts}

    def _cost_s(self, operation: str) -> float:
        """Return a time, a shorter one for an operation that is trimmed, so that trims are worth it."""
        whole = any(operation == own.signature for own in self.graph.operations)
        return 1e-3 * (self.dice.uniform(0.2, 1) if whole else self.dice.uniform(0.05, 0.3))

    def _candidates(self, size: int) -> tuple[int, ...]:
        fewer = self.dice.sample(range(1, size), min(self.dice.choice((1, 2)), size - 1))
        return tuple(sorted({*fewer, size}))

    def choices(self) -> list[Choice]:
        """Return everything that can be chosen."""
        found = []
        for removed in subsets([block.name for block in self.graph.blocks if not block.frozen]):
            gone = {name for name in self.options if self.graph.part[name].block in removed}
            for counts in product(*(self.options[n] if n not in gone else (0,) for n in self.options)):
                found.append(Choice(dict(zip(self.options, counts, strict=True)), removed))
        return [own for own in found if self._allowed(own)]

    def _allowed(self, choice: Choice) -> bool:
        """Say whether what the trims need is there."""
        full = self.graph.choice(choice.keep, choice.removed).keep
        trims = [trim for trim in self.graph.trims if full[trim.name] < trim.size]
        return all(full[name] in {0, *counts} for trim in trims for name, counts in trim.needs.items())

    def loss(self, choice: Choice) -> float:
        """Return the loss of a choice, computed without the program."""
        loss = sum(self.importance.widths[name][count] for name, count in choice.keep.items() if count)
        loss += sum(self.importance.blocks[name] for name in choice.removed)
        stages = [block.stage for block in self.graph.blocks if block.name in choice.removed]
        return loss + sum(gamma * stages.count(stage) ** 2 for stage, gamma in self.importance.stages.items())

    def needs(self, resource: Resource, choices: Sequence[Choice]) -> NDArray[np.float64]:
        """Return what each choice needs of a resource, computed without the program."""
        return np.array([resource.under(self.graph.choice(own.keep, own.removed)) for own in choices])


def trimmed_keys(graph: Graph, options: Mapping[str, Sequence[int]]) -> list[tuple[str, int, int]]:
    """Return every (operation, inputs, outputs) that the options can make of a graph."""
    found = {}
    for operation in (*graph.operations, *(made for own in graph.operations for _, made in own.strided)):
        parts = [*operation.inputs.parts, *operation.outputs.parts]
        parts += [(trim.name, 1) for trim in graph.trims_of.get(operation.weight, ())]
        names = [name for name, _ in dict(parts).items() if name in options]
        for counts in product(*(options[name] for name in names)):
            made, *widths = operation.under(graph.choice(dict(zip(names, counts, strict=True))))
            found[made.signature, widths[0], widths[1]] = None
    return list(found)


def subsets(names: Sequence[str]) -> list[frozenset[str]]:
    return [frozenset(chosen) for chosen in chain(*(combinations(names, n) for n in range(len(names) + 1)))]


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_program_finds_the_optimum_of_brute_force(name: str) -> None:
    trimmed = 0
    for seed in range(SEEDS):
        posed = Posed(name, seed)
        choices = posed.choices()
        losses = np.array([posed.loss(own) for own in choices])
        limited = posed.dice.sample(posed.resources, posed.dice.choice((1, 2, 3)))
        needs = [posed.needs(resource, choices) for resource in limited]
        budgets = [own.min() + posed.dice.uniform(0.2, 1) * (own.max() - own.min()) for own in needs]
        fits = np.all([own <= most * (1 + 1e-9) for own, most in zip(needs, budgets, strict=True)], axis=0)
        program = Program(posed.graph, posed.options)
        objective = program.losses(posed.importance)
        rows = [
            Budget(cost, most * (1 + 1e-9) - constant)
            for resource, most in zip(limited, budgets, strict=True)
            for cost, constant in program.costs(resource)
        ]
        found = program.solve(objective, rows)
        if not fits.any():
            assert found is None, (name, seed)
            continue
        assert found is not None, (name, seed)
        choice, proof = found
        best = losses[fits].min()
        assert posed.loss(choice) == pytest.approx(best, abs=1e-6), (name, seed)
        assert proof.objective == pytest.approx(best, abs=1e-6)
        assert proof.bound == pytest.approx(best, abs=1e-6)
        assert (proof.status, round(proof.gap, 6)) == ("optimal", 0)
        for resource, most in zip(limited, budgets, strict=True):
            assert posed.needs(resource, [choice])[0] <= most * (1 + 1e-6), (name, seed)
        trimmed += any(choice.keep[trim.name] < trim.size for trim in posed.graph.trims if trim.name in posed.options)
    assert trimmed >= SEEDS // 16, "too few of the best plans trim anything"


def test_one_problem_finds_the_optimum_for_any_budgets_and_losses() -> None:
    blocks = [Sum(conv(4, 3), nn.ReLU(), conv(3, 4)) for _ in range(2)]
    model = nn.Sequential(conv(3, 4), *blocks, nn.ReLU(), conv(4, 3), nn.Flatten(), nn.Linear(3 * 64, 2))
    graph, dice, other = trace(model, INPUTS), random.Random(0), PROFILES[0]
    wanted = trimmed_keys(graph, {w.name: range(1, w.size + 1) for w in graph.cuttable})
    tables = {own: table_of(graph, {key: dice.uniform(1e-4, 1e-3) for key in wanted}) for own in ("any", other)}
    posed = planner.Problem(
        model, graph, nets.anywhere(), planner.Scope(), {"any.pytorch.fp32": tables["any"], other: tables[other]}
    )
    options = posed.options(thrifty=True)
    choices = []
    for removed in subsets([block.name for block in graph.blocks if not block.frozen]):
        gone = {name for name in options if graph.part[name].block in removed}
        for counts in product(*(options[name] if name not in gone else (0,) for name in options)):
            choices.append(Choice(dict(zip(options, counts, strict=True)), removed))
    held = {**posed.times, **{name: posed.resource(name) for name in ("macs", "parameters")}}
    shares = {
        n: np.array([r.under(graph.choice(c.keep, c.removed)) for c in choices]) / r.under(graph.dense)
        for n, r in held.items()
    }
    several = 0
    for seed in range(SEEDS):
        widths = {
            n: {count: dice.uniform(0, 1) * (count < max(counts)) for count in counts} for n, counts in options.items()
        }
        free = [block for block in graph.blocks if not block.frozen]
        importance = Importance(
            "random",
            widths,
            {b.name: dice.uniform(0, 1) for b in free},
            {b.stage: dice.choice((0.0, 0.4)) for b in free},
        )
        losses = np.array(
            [
                sum(widths[n][k] for n, k in c.keep.items() if k)
                + sum(importance.blocks[b] for b in c.removed)
                + sum(g * len(c.removed) ** 2 for g in importance.stages.values())
                for c in choices
            ]
        )
        budgets = {name: dice.uniform(max(0.3, share.min()), 1) for name, share in shares.items()}
        fits = {name: share <= budgets[name] * (1 + 1e-9) for name, share in shares.items()}
        limits = Limits(macs=budgets["macs"], parameters=budgets["parameters"])
        latency = {own: budgets[own] for own in posed.times}
        every = np.all(list(fits.values()), axis=0)
        if not every.any():
            with pytest.raises(PlanError, match="budget"):
                posed.solve(latency, limits, importance=importance)
            continue
        plan = posed.solve(latency, limits, importance=importance)
        best = losses[every].min()
        assert plan.proof.objective == pytest.approx(best, abs=1e-6), seed
        assert (plan.proof.status, plan.proof.bound) == ("optimal", pytest.approx(best, abs=1e-6))
        assert all(own.planned <= own.budget * (1 + 1e-6) for own in plan.limits)
        several += all(losses[own].min() < best - 1e-6 for own in fits.values())
    assert several >= SEEDS // 8, "too few of the plans were held by more than one budget"


@pytest.mark.parametrize("name", PROBLEMS)
def test_large_problems_are_solved_through_their_relaxation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(SEEDS // 16):
        posed = Posed(name, seed)
        program = Program(posed.graph, posed.options)
        objective = program.losses(posed.importance)
        ((cost, constant),) = program.costs(posed.resources[0])
        needs = posed.needs(posed.resources[0], posed.choices())
        for share in (0.0, 0.3, 0.6):
            most = needs.min() + share * (needs.max() - needs.min()) - constant
            for gap in (0.0, 0.1):
                monkeypatch.setattr(solver, "_LARGE", 10**6)
                whole = program.solve(objective, [Budget(cost, most * (1 + 1e-9))])
                monkeypatch.setattr(solver, "_LARGE", 0)
                staged = program.solve(objective, [Budget(cost, most * (1 + 1e-9))], gap=gap)
                assert whole is not None
                assert staged is not None
                best, found = whole[1].objective, staged[1]
                assert best - 1e-6 <= found.objective <= best / (1 - gap) + 1e-6, (name, seed)
                assert found.bound <= best + 1e-6
                assert found.gap <= gap + 1e-9


@pytest.mark.parametrize("name", PROBLEMS)
def test_costs_are_exact_at_every_integer_point(name: str) -> None:
    posed = Posed(name, 0)
    choices = posed.choices()
    for resource in posed.resources:
        program = Program(posed.graph, posed.options)
        (cost, constant), *_ = program.costs(replace(resource, sums=resource.sums[:1]))
        exact = posed.needs(replace(resource, sums=resource.sums[:1]), choices)
        unit = 1 / exact.max()
        for index in posed.dice.sample(range(len(choices)), min(6, len(choices))):
            choice = choices[index]
            objective = {variable: price * unit for variable, price in cost.items()}
            for (own, count), variable in program.keeps.items():
                objective[variable] = objective.get(variable, 0.0) + (-100.0 if choice.keep[own] == count else 100.0)
            for own, variable in program.leaves.items():
                objective[variable] = objective.get(variable, 0.0) + (-1000.0 if own in choice.removed else 1000.0)
            found = program.solve(objective)
            assert found is not None
            assert found[0] == choice
            kept = sum(1 for count in choice.keep.values() if count)
            value = found[1].objective + 100.0 * kept + 1000.0 * len(choice.removed)
            assert value == pytest.approx((exact[index] - constant) * unit, abs=1e-5)


def test_many_widths_on_one_axis_are_priced_by_its_length() -> None:
    parts = [conv(3, 16) for _ in range(6)]
    net = nets.Lambda(
        lambda net, x: net.last(torch.cat([getattr(net, f"part{i}")(x) for i in range(6)], 1)),
        **{f"part{i}": part for i, part in enumerate(parts)},
        last=nn.Sequential(conv(96, 16), conv(16, 2)),
    )
    graph = trace(net, INPUTS)
    options = {width.name: (4, 8, 12, 16) for width in graph.cuttable}
    assert len(options) == 7
    stairs = _Stairs()
    time = Resource("stairs", "s", (tuple(Term((o.inputs, o.outputs), o.blocks, stairs) for o in graph.operations),))
    dice = random.Random(0)
    losses = {name: {c: dice.uniform(0.5, 1) * (16 - c) for c in counts} for name, counts in options.items()}
    importance = Importance("random", losses, {}, {})
    program = Program(graph, options)
    objective = program.losses(importance)
    ((cost, constant),) = program.costs(time)
    every = [Choice(dict(zip(options, counts, strict=True)), frozenset()) for counts in product(*options.values())]
    needs = np.array([time.under(graph.choice(own.keep)) for own in every])
    lost = np.array([sum(losses[name][count] for name, count in own.keep.items()) for own in every])
    for share in (0.2, 0.5, 0.8):
        most = needs.min() + share * (needs.max() - needs.min())
        found = program.solve(objective, [Budget(cost, most - constant)])
        assert found is not None
        assert found[1].objective == pytest.approx(lost[needs <= most].min(), rel=1e-6)
        assert time.under(graph.choice(found[0].keep)) <= most * (1 + 1e-6)


class _Stairs:
    """A cost that rises in steps of 32 input channels: bent, so that mixtures of far lengths would be too cheap."""

    def __call__(self, inputs: int, outputs: int) -> float:
        return 1e-3 * -(-inputs // 32) * (8 + outputs)


@pytest.mark.parametrize("name", ["residual", "bottleneck", "transformer", "MobileNet", "joined widths"])
def test_parameters_are_those_of_the_rebuilt_model(name: str) -> None:
    from backends.rebuild import cut

    model, graph = built(name)
    resource = resources.parameters(graph, model)
    assert resource.under(graph.dense) == sum(p.numel() for p in model.parameters())
    dice = random.Random(name)
    keep = {w.name: dice.randint(1, w.size) for w in graph.cuttable}
    removed = frozenset(dice.sample([b.name for b in graph.blocks if not b.frozen], min(1, len(graph.blocks))))
    kept = {n: torch.arange(c) for n, c in keep.items() if graph.width[n].block not in removed}
    small = cut(model, graph, kept, removed)
    assert resource.under(graph.choice(keep, removed)) == sum(p.numel() for p in small.parameters())


def test_activations_that_are_alive_at_once() -> None:
    """By hand: 3x8x8 inputs of two images; conv to 8 channels, then a block of 4 channels beside the shortcut."""
    net = nn.Sequential(conv(3, 8), nn.ReLU(), Sum(conv(8, 4), nn.ReLU(), conv(4, 8), nn.BatchNorm2d(8)))
    graph = trace(net, INPUTS)
    resource = resources.activation_bytes(graph, nets.anywhere())
    pixels = 2 * 64 * 4
    assert resource.under(graph.dense) == pixels * (8 + 4 + 8)  # the shortcut, and both sides of the last convolution
    name = graph.blocks[0].name
    inner = next(w.name for w in graph.cuttable if w.block == name)
    assert resource.under(graph.choice({inner: 1})) == pixels * (8 + 1 + 8)
    assert resource.under(graph.choice({inner: 0}, frozenset({name}))) == pixels * (3 + 8)


# --- budgets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (0.5, 2e-3), ("0.5", 2e-3), (1, 4e-3), ("50 %", 2e-3), ("50%", 2e-3), ("100 %", 4e-3), (" 25 % ", 1e-3),
        ("3 ms", 3e-3), ("3ms", 3e-3), ("3000 us", 3e-3), ("3000 µs", 3e-3), ("0.003 s", 3e-3), ("3e-3 s", 3e-3),
        ("1e-3", 4e-6), ("9 ms", 9e-3), (np.float64(0.5), 2e-3),
    ],
)  # fmt: skip
def test_budgets_are_read(given: float | str, seconds: float) -> None:
    assert amount(given, 4e-3, "s")[0] == pytest.approx(seconds)


NO_BUDGETS = [
    *("", "fast", "-1", 0, -0.5, "0 %", "150 %", 1.5, "1.5"),
    *("3 m", "ms", "1 2 ms", "nan", "inf", "1e999 ms", True),
]


@pytest.mark.parametrize("given", NO_BUDGETS)
def test_what_is_no_budget_is_refused(given: float | str) -> None:
    with pytest.raises(PlanError, match="is not a fraction of the dense latency"):
        amount(given, 4e-3, "s")


def test_seconds_need_a_table() -> None:
    model, _ = example("VGG")
    with pytest.raises(
        PlanError, match=r"'3 ms' needs a table measured on any\.pytorch\.fp32; run `espalier calibrate`"
    ):
        planner.plan(model, INPUTS, nets.anywhere(), latency="3 ms")


def test_a_budget_below_the_floor_names_the_floor() -> None:
    model, graph = example("residual, option B")
    whole = planner.Scope(op_names_re=(r"conv1$",), exclude_op_names=("conv1",))
    with pytest.raises(PlanError, match=r"budget 0\.01 of dense is below the floor 0\.\d+ of dense that .*--latency"):
        planner.plan(model, INPUTS, nets.anywhere(), latency=0.01, scope=whole)
    options = candidates(graph, nets.anywhere())
    table = table_of(graph, dict.fromkeys(keys(graph, options), 1e-3))
    with pytest.raises(PlanError, match=r"0\.125 of dense \(2 ms\) is below the floor 0\.25 of dense \(4\.01 ms\)"):
        planner.plan(model, INPUTS, nets.anywhere(), latency="2 ms", table=table)


@pytest.mark.parametrize("name", ["residual, option B", "VGG", "MobileNet", "bottleneck", "densely connected"])
def test_the_floor_can_be_planned(name: str) -> None:
    model, _ = example(name)
    with pytest.raises(PlanError) as refused:
        planner.plan(model, INPUTS, nets.anywhere(), latency=1e-6)
    floor = float(str(refused.value).split("floor ")[1].split(" ")[0])
    plan = planner.plan(model, INPUTS, nets.anywhere(), latency=floor * 1.01)
    assert plan.predicted.fraction == pytest.approx(floor, rel=0.01)


# --- candidates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile_id", PROFILES)
def test_candidates_are_multiples_of_the_quantum(profile_id: str) -> None:
    profile, graph = profiles.load(profile_id), trace(ResNet(1, (64, 96, 200)), INPUTS)
    quantum = max(profile.quantum("conv2d", "out_channels"), profile.quantum("conv2d", "in_channels"))
    assert quantum > 1
    found = candidates(graph, profile)
    assert list(found) == [
        *("conv1", "layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2")
    ]
    for name, counts in found.items():
        dense = graph.width[name].size
        assert counts[-1] == dense
        assert list(counts) == sorted(set(counts))
        assert {count % quantum for count in counts if count not in (dense, quantum // 2)} <= {0}
        assert len(counts) <= 14


def test_half_a_quantum_is_a_candidate_as_padding_may_reward_it() -> None:
    profile = profiles.load("x86_64_v4.onnxruntime.fp32")
    graph = trace(nn.Sequential(conv(16, 64), nn.ReLU(), nn.Conv2d(64, 16, 1)), (torch.ones(1, 16, 8, 8),))
    assert candidates(graph, profile) == {"0": (8, 16, 32, 48, 64)}


def test_streams_are_planned_beside_inner_widths() -> None:
    _, graph = example("residual, option B")
    inner = {f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in (0, 1)}
    assert set(candidates(graph, nets.anywhere())) == inner | {"conv1", "layer2.0.conv2", "layer3.0.conv2"}


def test_useful_drops_widths_that_cost_as_much_as_a_wider_one() -> None:
    graph = trace(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 2)), INPUTS)
    stairs = {8: 8.0, 7: 8.0, 6: 6.0, 5: 7.0, 4: 5.0, 3: 5.0, 2: 1.0, 1: 2.0}
    cost = {key: stairs[key[2]] if key[1] == 3 else 0.0 for key in keys(graph, {"0": range(1, 9)})}
    plain, slow = (table_of(graph, cost, reloads=own) for own in ((), (Reload(beyond=100, each_s=1e-3),)))
    assert useful(graph, [resources.time(graph, plain, "t")], {"0": range(1, 9)}) == {"0": (2, 4, 6, 8)}
    assert useful(graph, [resources.time(graph, slow, "t")], {"0": range(1, 9)}) == {"0": (2, 4, 6, 7, 8)}


def test_useful_knows_the_staircase_of_a_profile() -> None:
    graph = trace(nn.Sequential(conv(16, 64), nn.ReLU(), conv(64, 16)), (torch.ones(1, 16, 8, 8),))
    rules = Rules(profiles.load("x86_64_v4.onnxruntime.fp32"))
    assert useful(graph, [resources.time(graph, rules, "t")], {"0": range(16, 65)}) == {"0": (16, 32, 48, 64)}


# --- plans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latency", [1.0, 0.6, "30 %"])
@pytest.mark.parametrize("name", ["residual, option B", "MobileNet", "VGG", "functional"])
def test_a_plan_survives_its_file(name: str, latency: float | str, tmp_path: Path) -> None:
    model, graph = example(name)
    plan = planner.plan(model, INPUTS, nets.anywhere(), latency=latency)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.sha256 == plan.sha256
    assert plan.predicted.fraction <= plan.target_fraction * (1 + 1e-6)
    full = graph.choice(plan.choice.keep, plan.choice.removed)
    assert plan.predicted.macs == graph.macs(full) <= plan.predicted.dense_macs
    assert plan.graph(model).fingerprint == graph.fingerprint


def test_rules_alone_predict_ratios_and_never_seconds() -> None:
    plan = planner.plan(ResNet(1, (64, 64, 64)), INPUTS, profiles.load("x86_64_v4.onnxruntime.fp32"), latency=0.5)
    predicted = plan.predicted
    assert (predicted.basis, predicted.dense_s, predicted.latency_s) == ("documented", None, None)
    assert 0 < predicted.low <= predicted.fraction <= min(0.5, predicted.high)
    assert {width.keep % 16 for width in plan.widths if width.keep not in (0, 8, width.dense)} <= {0}
    assert {pool.name: pool.budget for pool in plan.pools} == {
        **{width.name: width.keep for width in plan.widths if 0 < width.keep < width.dense},
        **{block.name: 0 for block in plan.blocks if block.removed},
    }


def test_a_plan_with_a_table_from_elsewhere_says_so_and_why() -> None:
    plan = planner.plan(ResNet(1, (16, 16, 16)), INPUTS, nets.anywhere(), latency=0.5)
    noted = plan.from_elsewhere(("it was measured at batch 8",))
    assert noted.predicted.basis == "measured elsewhere"
    assert noted.notes == (*plan.notes, "it was measured at batch 8")


def test_everything_may_stay() -> None:
    model, _ = example("VGG")
    scope = planner.Scope(op_names=("0",), exclude_op_names=("0",))  # nothing is a candidate
    plan = planner.plan(model, INPUTS, nets.anywhere(), latency=1, scope=scope)
    assert (plan.widths, plan.blocks, plan.pools, plan.predicted.fraction) == ((), (), (), 1)
    with pytest.raises(PlanError, match="below the floor 1 "):
        planner.plan(model, INPUTS, nets.anywhere(), latency=0.9, scope=scope)


def test_a_model_without_layers_cannot_be_planned() -> None:
    with pytest.raises(PlanError, match="no convolution or linear layer"):
        planner.plan(nn.ReLU(), INPUTS, nets.anywhere(), latency=0.5)


def _cut_off(text: str) -> str:
    return text[:-20]


def _edited(text: str) -> str:
    return text.replace('"target_fraction": 0.6', '"target_fraction": 0.7')


def _newer(text: str) -> str:
    return text.replace('"schema_version": 1', '"schema_version": 2')


def _with_a_stranger(text: str) -> str:
    return text.replace('"schema_version": 1', '"schema_version": 1, "speed": "fast"')


def _too_wide(text: str) -> str:
    return text.replace('"dense": 8', '"dense": 1')


def _unsigned(text: str) -> str:
    return json.dumps({key: value for key, value in json.loads(text).items() if key != "sha256"})


SPOILT: dict[str, tuple[Callable[[str], str], str]] = {
    "truncated": (_cut_off, "is truncated or not JSON"),
    "empty": (lambda _: "", "is truncated or not JSON"),
    "a list": (lambda _: "[]", "document: Input should be a valid dictionary"),
    "edited": (_edited, "was edited after it was written"),
    "unsigned": (_unsigned, "was edited after it was written"),
    "of another version": (_newer, "schema_version: Input should be 1"),
    "with an unknown key": (_with_a_stranger, "speed: Extra inputs are not permitted"),
    "that keeps more than there is": (_too_wide, r"widths\.\d+: .* keeps \d+ of 1 channels"),
    "without blocks": (lambda text: text.replace('"blocks"', '"clocks"'), "blocks: Field required"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_plan_is_refused(case: str, tmp_path: Path) -> None:
    spoil, said = SPOILT[case]
    path = tmp_path / "plan.json"
    planner.plan(example("residual, option B")[0], INPUTS, nets.anywhere(), latency=0.6).save(path)
    before = path.read_text()
    path.write_text(spoil(before))
    assert path.read_text() != before
    with pytest.raises(PlanError, match=f"plan.json:? {said}.*make it again with `espalier plan`"):
        Plan.load(path)


def test_an_absent_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan.json cannot be read: No such file.*make it with `espalier plan`"):
        Plan.load(tmp_path / "plan.json")


def test_importance_must_cover_the_candidates() -> None:
    model, graph = example("VGG")
    short = Importance("measured", {"0": {8: 0.0}}, {}, {})
    with pytest.raises(PlanError, match=r"'measured' does not say what cutting 0 at \d costs"):
        planner.plan(model, INPUTS, nets.anywhere(), latency=0.5, importance=short)
    assert graph.blocks == ()


def test_a_global_budget_pools_what_costs_time(tmp_path: Path) -> None:
    model, graph = example("residual, option B")
    plan = planner.plan(model, INPUTS, nets.anywhere(), latency=0.5)
    shared = with_global_budget(plan, model)
    pool = shared.pools[0]
    shares = [width for width in plan.widths if width.keep]  # those that the plan keeps whole too
    narrowed = [width for width in shares if width.keep < width.dense]
    assert pool.members == tuple(width.name for width in shares)
    assert pool.budget == pytest.approx(sum(width.keep * width.cost_s for width in shares))
    dense_s = Rules(nets.anywhere()).latency(graph, graph.dense)
    for width in shares:  # a channel costs its share of the step above, or of the last one
        at = min(width.considered.index(width.keep), len(width.considered) - 2)
        step = (width.fractions[at + 1] - width.fractions[at]) / (width.considered[at + 1] - width.considered[at])
        assert width.cost_s == pytest.approx(step * dense_s)
    assert max(pool.weights) == 1
    assert list(shared.pools[1:]) == [other for other in plan.pools if other.structure == "depth"]
    shared.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == shared
    free = plan.model_copy(
        update={"widths": tuple(w.model_copy(update={"cost_s": 0.0}) if w == narrowed[0] else w for w in plan.widths)}
    )
    kept = with_global_budget(free, model).pools
    assert [own.budget for own in kept if own.members == (narrowed[0].name,)] == [narrowed[0].keep]
    with pytest.raises(PlanError, match="nothing to share"):
        with_global_budget(planner.plan(model, INPUTS, nets.anywhere(), latency=1.0), model)
