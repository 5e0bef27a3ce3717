"""Every method of the table of accuracies takes as many steps, ends on its network, and is tuned to one latency."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import planner
import profiles
from planner import Recipe, Scope
from planner.latency import Probe
from planner.operations import Choice
from tools.batches import Batches, Data
from tools.distil import Distillation, Taught
from tools.evidence import nets
from tools.evidence.accuracy import Arena, held_out
from tools.evidence.methods import DECAYED, ONE_BUDGET, OURS, Contest, Course
from tools.evidence.nets import SIBLING, Net, aim, near, shallower
from tools.examples.resnet import ResNet

X86 = "x86_64_v4.onnxruntime.fp32"


def images(count: int, *, seed: int, shuffle: bool) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, (count,), generator=generator)
    x = torch.randn(count, 3, 16, 16, generator=generator) + y[:, None, None, None] / 5
    return Batches(x, y, batch=16, shuffle=shuffle)


@pytest.fixture
def data() -> Data:
    return Data(images(48, seed=0, shuffle=True), images(32, seed=1, shuffle=False))


@pytest.fixture
def contest(data: Data) -> Contest:
    dense = ResNet(2, (16, 32, 64), seed=1).eval()
    planner.recalibrate_(dense, data.train)
    inputs = (next(iter(data.test))[0][:1],)
    posed = planner.problem(dense, inputs, profiles.load(X86), scope=Scope())
    importance = planner.taylor(dense, posed.graph, posed.options(), list(data.train), loss=cross_entropy)
    plan = posed.solve(0.5, importance=importance)
    return Contest(dense, posed, plan, importance, lambda seed: ResNet(2, (16, 32, 64), seed=seed).eval(), 0.5)


@pytest.mark.parametrize("method", [*OURS, DECAYED, SIBLING])
def test_a_method_trains_its_network_for_all_steps(contest: Contest, data: Data, method: str) -> None:
    taken = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        taken.append(len(target))
        return cross_entropy(output, target)

    course = Course(data, data.train, Recipe(3, lr=0.01), loss)
    graph = contest.posed.graph
    if method == ONE_BUDGET:  # between widths, of which the plan has to narrow some
        dear = replace(contest.importance, blocks=dict.fromkeys(contest.importance.blocks, 1e6))
        contest = replace(contest, plan=contest.posed.solve(0.5, importance=dear))
    whole = graph.choice(contest.plan.choice.keep, contest.plan.choice.removed)
    net = Net(method, shallower(contest.posed)[1] if method == SIBLING else whole, 0.5, None)
    if method == DECAYED:
        pytest.importorskip("torch_pruning")
    before = {name: tensor.clone() for name, tensor in contest.dense.state_dict().items()}
    found = contest.run(method, net, course, seed=0)
    assert taken == [16] * course.steps == [16] * 9
    assert all(torch.equal(before[name], tensor) for name, tensor in contest.dense.state_dict().items())
    assert (found.keep is not None) == (method in (ONE_BUDGET, DECAYED))
    if found.keep is not None:
        net = Net(method, graph.choice(found.keep, frozenset(found.removed)), 0.5, None)
        assert contest.share(net.choice) == pytest.approx(contest.share(whole), abs=0.05)
    small = net.model(contest.dense, contest.posed)
    assert (
        found.params == sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in contest.dense.parameters())
    )
    assert (found.zeroed is None) == (method in ("one cut", "random channels of our plan", SIBLING))
    if method.startswith("WGSEF"):
        assert found.at_cut == found.before  # the rebuild changes nothing
    if found.zeroed is None and method != SIBLING:
        assert found.before == planner.accuracy(contest.dense, data.test)


def test_a_course_that_is_split_within_an_epoch_serves_each_batch_once(data: Data) -> None:
    seen: list[int] = []

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * 16 * 16, 10)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(hash(tuple(x.flatten()[:5].tolist())))
            return self.layer(x.flatten(1))  # type: ignore[no-any-return]

    course = Course(data, data.train, Recipe(2, lr=0.01), cross_entropy)
    course.train_(Seen(), 0, 6)
    whole = list(seen)
    seen.clear()
    course.train_(Seen(), 0, 2)
    course.train_(Seen(), 2, 6)
    assert seen == whole
    assert len(set(whole[:3])) == 3


def test_a_network_is_kept_and_read_with_its_weights(contest: Contest, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    ranking, graph = nets.RIVALS["GroupNorm"], contest.posed.graph
    for pruned in nets.torch_pruned(contest.dense, graph, ranking, steps=4):
        state = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
        x = torch.randn(4, 3, 16, 16)
        wanted = pruned(x)
        break
    nets.save_file(state, tmp_path / "net.safetensors")
    net = Net("GroupNorm", graph.choice(nets.kept_of(graph, pruned)), 0.4, tmp_path / "net.safetensors")
    net.save(tmp_path / "net.json")
    again = Net.load(tmp_path / "net.json")
    assert (again, again.key) == (net, net.key)
    torch.testing.assert_close(again.model(contest.dense, contest.posed).eval()(x), wanted)


def test_what_is_measured_next_is_corrected_by_what_was_seen() -> None:
    predicted = [1.0, 0.8, 0.6, 0.5, 0.4, 0.2]
    assert aim(predicted, {}, 0.5) == 3
    assert aim(predicted, {3: 0.7}, 0.5) == 4  # all take 1.4 times as long as predicted
    assert aim(predicted, {3: 0.7, 4: 0.49}, 0.5) == 4
    assert near({4: 0.49}, 0.5)
    assert not near({4: 0.48, 3: 0.7}, 0.5)


def test_rivals_end_at_our_measured_latency(
    contest: Contest, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_pruning")
    time = contest.posed.times[X86]
    dense, asked = time.under(contest.posed.graph.dense), []

    def measured(bench: object, choices: Sequence[Choice], **_: object) -> list[Probe]:
        asked.append(len(choices))
        found = [min(1.0, 1.2 * time.under(choice) / dense) for choice in choices]  # predicted too fast by a fifth
        return [_probe(choice, share) for choice, share in zip(choices, found, strict=True)]

    monkeypatch.setattr(nets, "measure_choices", measured)
    monkeypatch.setattr(nets, "STEPS", 24)
    field = _field(contest, data, tmp_path)
    monkeypatch.setattr(nets.Field, "ours", lambda self: (contest.plan, Net("ours", contest.plan.choice, 0.6, None)))
    found = {net.method: net for net in field.rivals()}
    assert list(found) == [*nets.RIVALS, SIBLING, *nets.ABLATIONS]
    assert not found[nets.BY_WIDTH].choice.removed
    assert any(kept % 8 for kept in found[nets.ANY_WIDTH].choice.keep.values())
    cuttable = {width.name for width in contest.posed.graph.cuttable}
    aligned = [kept for name, kept in found[nets.BY_MACS].choice.keep.items() if name in cuttable]
    assert all(kept % 8 == 0 for kept in aligned)
    assert found["uniform"].fraction == pytest.approx(0.6, rel=0.1)
    assert found["random, uniform"].weights is not None
    assert found[SIBLING].weights is None
    assert len(asked) > 1
    asked.clear()
    assert {net.method: net for net in field.rivals()} == found
    assert not asked  # kept


def test_held_out_images_are_not_trained_on(monkeypatch: pytest.MonkeyPatch, data: Data) -> None:
    monkeypatch.setattr("tools.evidence.accuracy.HELD_OUT", 16)
    found = held_out(data)
    assert torch.equal(torch.cat([found.train.x, found.test.x]), data.train.x)
    assert (len(found.test.x), found.test.shuffle, found.train.shuffle) == (16, False, True)


def test_distillation_is_the_mixture_of_the_label_and_the_teacher(data: Data) -> None:
    teacher = ResNet(1, (16, 32, 64), seed=2)
    x, target = next(iter(Taught(data.train, teacher)))
    plain, labels = next(iter(data.train))
    assert torch.equal(x, plain)
    assert torch.equal(target[:, 0].long(), labels)
    assert not target.requires_grad
    torch.testing.assert_close(target[:, 1:], teacher.eval()(x).detach())
    output = torch.randn(16, 10)
    t = 4.0
    p, q = (target[:, 1:] / t).softmax(1), (output / t).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean() * t * t
    expected = 0.3 * cross_entropy(output, labels) + 0.7 * divergence
    torch.testing.assert_close(Distillation(0.7, t)(output, target), expected)
    torch.testing.assert_close(Distillation(1.0)(target[:, 1:], target), torch.tensor(0.0), atol=1e-5, rtol=0)


def _probe(choice: Choice, share: float) -> Probe:
    where = {"keep": dict(choice.keep), "removed": tuple(sorted(choice.removed))}
    return Probe(**where, latency_s=share, relative=share, ci95_s=(share, share), runs=3)


def _field(contest: Contest, data: Data, folder: Path) -> nets.Field:
    from rich.console import Console

    from tools.console import Stage
    from tools.planning import Brief

    brief = Brief(contest.dense, contest.posed.graph.example(), contest.posed.profile, 0.5, data.train)
    field = nets.Field(brief, None, Stage(Console(quiet=True)), folder)  # type: ignore[arg-type]
    options = contest.posed.options(thrifty=True)
    about = {"posed": contest.posed, "importance": planner.magnitude(contest.dense, contest.posed.graph, options)}
    vars(field).update(about)
    return field


def test_a_row_says_what_its_network_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net("one cut", Choice({"width": 3}, frozenset({"block"})), 0.5, None)
    shown = {"macs": 7, "measured": {}, "speedup": {}, "efficiency": {}}
    runs = [
        {"method": net.method, "seed": 1, "setting": {"held_out": held}, "trained": {"after": 0.9, "keep": None}}
        for held in (False, True)
    ]
    arena = SimpleNamespace(
        network="net",
        budget=0.5,
        dense=None,
        data=SimpleNamespace(test=None),
        field=SimpleNamespace(bench=SimpleNamespace(profile=profiles.load(X86))),
        runs=lambda: runs,
        net_of=lambda run: net,
        measured=lambda nets, seconds: {net.key: shown},
    )
    monkeypatch.setattr(planner, "accuracy", lambda *_: 0.95)
    (row,) = Arena.table(cast(Any, arena), 1.0)
    assert (row["keep"], row["removed"]) == ({"width": 3}, ["block"])
    assert (row["runtime"], row["dense"], row["after"], row["macs"]) == ("onnxruntime", 0.95, 0.9, 7)
