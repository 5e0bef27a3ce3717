"""Rivals prune as they say, all are judged alike, and a comparison is at an equal latency."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from planner import Graph
from planner.groups import group
from planner.latency import Probe
from planner.operations import Choice
from planner.resources import Term
from planner.structures import Filter
from tools import rivalry, rivals
from tools.examples.resnet import ResNet
from tools.rivalry import Contest, Kept, between
from tools.rivals import Judge

X86 = "x86_64_v4.onnxruntime.fp32"


def tiny() -> nn.Module:
    """Three stages of two blocks: widths of one to four steps, and blocks that may leave."""
    torch.manual_seed(0)
    return ResNet(2, (16, 32, 64))


@cache
def contest() -> Contest:
    pytest.importorskip("torch_pruning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rivalry.NETWORKS, "tiny", (tiny, (3, 16, 16)))
        return Contest.of("tiny", X86)


@dataclass(frozen=True)
class Place:
    """Stands for a bench."""

    graph: Graph | None


def half(graph: Graph, *, removed: frozenset[str] = frozenset()) -> Choice:
    inner = {w.name for w in graph.cuttable if w.block in removed}
    return graph.choice({w.name: 0 if w.name in inner else w.size // 2 for w in graph.cuttable}, removed)


@pytest.mark.parametrize("removed", [(), ("layer1.1",), ("layer1.0", "layer2.1")])
def test_importance_is_the_mean_share_of_the_norms_that_are_left(removed: Sequence[str]) -> None:
    own = contest()
    graph, model = own.problem.graph, own.problem.model
    choice = half(graph, removed=frozenset(removed))
    gone = {name for block in removed for name in graph.block[block].modules}
    shares = []
    for width in graph.cuttable:
        groups = group([Filter(width)], model)
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        before = groups.norms(parameters).square()
        for name, parameter in parameters.items():
            parameter.mul_(name.rpartition(".")[0] not in gone)
        left = groups.norms(parameters).square()
        shares.append(float(left[before.topk(choice.keep[width.name]).indices].sum() / before.sum()))
    assert own.judge.importance(choice) == pytest.approx(np.mean(shares), rel=1e-5)
    assert own.judge.importance(graph.dense) == pytest.approx(1.0)
    assert own.judge.latency(graph.dense) == pytest.approx(1.0)


def test_uniform_narrows_all_by_one_ratio() -> None:
    path = rivals.uniform(contest().judge)
    sizes = {w.name: w.size for w in contest().problem.graph.cuttable}
    assert path[-1] == sizes
    for keep in path:
        shares = [count / sizes[name] for name, count in keep.items() if count > 1]
        assert not shares or max(shares) - min(shares) <= 1 / min(sizes.values())


def with_reloads(judge: Judge) -> Judge:
    """Let the last layers cost thrice beyond a part of it: where that is much, it decides what a width frees."""
    (terms,) = judge.time.sums
    dear = [Term(t.extents, t.blocks, lambda *n, own=t: 3 * own.price(*n)) for t in terms[-4:]]
    kept = -1.3 * sum(t.under(judge.graph.dense) for t in terms[-4:])
    time = replace(judge.time, sums=(terms, (*terms[:-4], *dear, Term((), frozenset(), lambda: kept))))
    return replace(judge, time=time)


@pytest.mark.parametrize("reloads", [False, True])
def test_greedy_takes_the_step_that_loses_least_for_its_time(*, reloads: bool) -> None:
    own = contest()
    judge, options = with_reloads(own.judge) if reloads else own.judge, own.problem.options()
    path = rivals.greedy(judge, own.problem)
    decides = [np.argmax([sum(t.under(c) for t in s) for s in judge.time.sums]) for c in map(judge.graph.choice, path)]
    assert set(decides) == ({0, 1} if reloads else {0})
    at = [judge.graph.choice(keep) for keep in path]
    for now, then in pairwise(path):
        (changed,) = [name for name in now if now[name] != then[name]]
        assert then[changed] == max(count for count in options[changed] if count < now[changed])
        ratios = {}
        for name, count in now.items():
            if below := [other for other in options[name] if other < count]:
                trial = judge.graph.choice({**now, name: max(below)})
                freed = judge.latency(judge.graph.choice(now)) - judge.latency(trial)
                lost = judge.importance(judge.graph.choice(now)) - judge.importance(trial)
                ratios[name] = lost / freed if freed > 1e-9 else np.inf
        assert ratios[changed] == pytest.approx(min(ratios.values()), rel=1e-6)
    assert all(a >= b - 1e-12 for a, b in zip(map(judge.latency, at), map(judge.latency, at[1:]), strict=False))
    assert all(count == min(options[name]) for name, count in path[-1].items())


@pytest.mark.parametrize("round_to", [None, 8])
def test_group_norm_is_what_torch_pruning_leaves(round_to: int | None) -> None:
    own = contest()
    before = {name: p.detach().clone() for name, p in own.problem.model.named_parameters()}
    path = rivals.group_norm(own.judge, own.problem, round_to=round_to)
    assert len(path) == rivals.STEPS
    sizes = {w.name: w.size for w in own.problem.graph.cuttable}
    assert all(path[i][name] >= path[i + 1][name] for i in range(len(path) - 1) for name in sizes)
    assert 0 < sum(path[-1].values()) < 0.25 * sum(sizes.values())
    if round_to:
        assert all(count % round_to == 0 for keep in path for count in keep.values())
    else:  # ranked over all layers at once: they keep different shares
        shares = [count / sizes[name] for name, count in path[len(path) // 2].items()]
        assert max(shares) - min(shares) > 0.2
    assert all(torch.equal(before[name], p) for name, p in own.problem.model.named_parameters())


def test_the_best_network_of_a_path_is_within_the_budget() -> None:
    judge, path = contest().judge, contest().passed["uniform"]
    best = judge.best_within(path, 0.5)
    assert best is not None
    assert judge.latency(best) <= 0.5 * (1 + 1e-9)
    assert judge.importance(best) == max(judge.importance(c) for c in path if judge.latency(c) <= 0.5)
    assert judge.best_within(path, 1e-9) is None


def test_the_planner_keeps_at_least_what_others_keep() -> None:
    own = contest()
    rows = list(own.predicted())
    assert {row.rival for row in rows} == set(own.passed)
    assert {row.budget for row in rows} >= {0.5, 0.65, 0.8}
    for row in rows:
        ours = own.ours(row.budget)
        assert ours is not None
        assert own.judge.latency(ours) <= row.budget * (1 + 1e-6)
        assert (row.ours, row.removed) == (own.judge.importance(ours), len(ours.removed))
        assert row.gain >= -1e-9, row
    assert any(row.gain > 0.05 for row in rows)


def test_a_removed_block_is_paid_for_in_full() -> None:
    own = contest()
    graph = own.problem.graph
    for block in graph.blocks:
        inner = {w.name: 0 for w in graph.cuttable if w.block == block.name}
        choice = graph.choice(inner, frozenset({block.name}))
        lost = own.losses.blocks[block.name] / len(own.judge.kept)
        assert 1 - own.judge.importance(choice) == pytest.approx(lost)
        assert lost > len(inner) / len(own.judge.kept)  # what it adds to the stream is lost too


def test_between_two_networks_lies_a_line() -> None:
    points = [(0.6, 0.9), (0.4, 0.5), (0.5, 0.45)]  # the one at 0.5 is worse than the faster one
    assert between(points, 0.4) == 0.5
    assert between(points, 0.45) == pytest.approx(0.5)
    assert between(points, 0.55) == pytest.approx(0.7)
    assert between(points, 0.39) is None
    assert between(points, 0.61) is None


def test_measured_latencies_are_made_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    own, asked = contest(), list[Choice]()

    def measure_choices(place: Any, wanted: Sequence[Choice], **_: Any) -> list[Probe]:
        assert place.graph is own.problem.graph
        asked.extend(wanted)
        slower = [own.judge.latency(choice) ** 0.9 for choice in wanted]  # than predicted, the more the narrower
        return [
            Probe(keep=dict(c.keep), removed=tuple(c.removed), latency_s=s, relative=s, ci95_s=(s, s), runs=1)
            for c, s in zip(wanted, slower, strict=True)
        ]

    monkeypatch.setattr(rivalry, "measure_choices", measure_choices)
    monkeypatch.setattr(rivalry, "bench", lambda *_: Place(None))
    rows = list(own.measured(progress=lambda *_: None))
    assert {(row.budget, row.rival) for row in rows} == {(b, r) for b in rivalry.MEASURED_BUDGETS for r in own.passed}
    keys = [(tuple(sorted(c.keep.items())), c.removed) for c in asked]
    assert len(keys) == len(set(keys))  # nothing is built twice
    for row in rows:
        assert row.latency == row.budget
        plans = [own.ours(row.budget * share) for share in rivalry.AROUND]
        kept = [own.judge.importance(choice) for choice in plans if choice is not None]
        assert min(kept) <= row.ours <= max(kept)
        assert row.noise == 0  # as nothing was drawn
        if row.theirs is not None:
            fits = [
                own.judge.importance(c) for c in own.passed[row.rival] if own.judge.latency(c) ** 0.9 <= row.latency
            ]
            assert row.theirs <= max(fits) + 0.1


def test_noise_of_latencies_is_noise_of_what_is_kept() -> None:
    own = contest()
    plans = [choice for share in rivalry.AROUND if (choice := own.ours(0.5 * share)) is not None]

    def gain(noise: float) -> float:
        probes = {
            rivalry._key(c): Probe(
                keep=dict(c.keep),
                removed=tuple(c.removed),
                latency_s=s,
                relative=s,
                ci95_s=(s * (1 - 1.96 * noise), s * (1 + 1.96 * noise)),
                runs=1,
            )
            for c in plans
            if (s := own.judge.latency(c))
        }
        random = np.random.default_rng(0)
        drawn, again = own._drawn(plans, probes, random), own._drawn(plans, probes, random)
        assert (drawn == again) is (noise == 0)
        return rivalry._noise(drawn, [[(0.1, 0.5), (0.9, 0.5)]] * len(drawn), 0.5)

    assert gain(0.0) == 0
    assert 1.5 < gain(0.02) / gain(0.01) < 2.5


def test_the_table_says_whether_the_planner_is_better() -> None:
    def row(rival: str, budget: float, ours: float, theirs: float | None) -> Kept:
        return Kept("net", "device", budget, rival, ours, theirs)

    good = [row("a", 0.5, 0.8, 0.7), row("a", 0.8, 0.9, 0.9), row("b", 0.3, 0.8, None), row("b", 0.4, 0.7, 0.6)]
    table, better = rivalry.told(good, "predicted")
    assert better
    assert [list(column.cells) for column in table.columns][:4] == [
        ["a", "b"],
        ["2", "2"],
        ["0", "1"],
        ["+0.0%", "+16.7%"],
    ]
    assert "equal predicted latency: median gain at budgets <= 0.5 +15.5%" in str(table.caption)
    assert not rivalry.told([*good, row("a", 0.8, 0.89, 0.9)], "predicted")[1]  # once lower
    assert rivalry.told([*good, replace(row("a", 0.8, 0.89, 0.9), noise=0.02)], "measured")[1]  # within the noise
    assert not rivalry.told([row("a", 0.5, 0.75, 0.7)], "predicted")[1]  # too little
    assert not rivalry.told([row("a", 0.5, 0.8, None)], "predicted")[1]  # nothing to compare with
