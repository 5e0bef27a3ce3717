"""No rebuild changes the class of an image, what fixing the support changes is counted, torch-pruning cuts alone."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch

import planner
from backends.rebuild import zeroed
from planner import Recipe
from tools.bench_training import METHODS, Cutting, Start, uniform
from tools.evidence import lossless, record, render
from tools.evidence.lossless import ALL, TorchPruning, chosen, torch_pruned

from . import tiny

pytest.importorskip("torch_pruning")


def call(cifar: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[record.Row]:
    """Run the command on random images; return its rows."""
    folder = cifar["data"] / "evidence"
    monkeypatch.setattr(lossless, "add", partial(record.add, folder=folder))
    with pytest.raises(SystemExit) as exit_:
        lossless.main(seeds=1, epochs=2, keep=0.5, lr=0.01, **cifar)
    assert exit_.value.code == 0
    return record.read("lossless", folder).rows


def test_every_method_is_cut_to_one_budget_and_no_rebuild_changes_a_class(
    cifar: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = call(cifar, monkeypatch)
    assert [row["method"] for row in rows] == [method.name for method in ALL]
    assert {row["kept_groups"] for row in rows} == {4 + 4 + 8}
    assert {row["images"] for row in rows} == {40}
    assert {row["groups_cut"] for row in rows if "start" in row["method"]} == {16}
    for row in rows:
        assert row["changed_by_rebuild"] == row["changed_in_the_end"] == 0
        assert row["accuracy"]["fixed"] == row["accuracy"]["rebuilt"]
        assert row["accuracy"]["trained"] == row["accuracy"]["final"]
    text = render.rendered("<!-- evidence: lossless -->\n<!-- end of evidence -->", cifar["data"] / "evidence")
    assert all(f"| CIFAR-10, {method.name} | 40 | " in text for method in ALL)
    monkeypatch.setattr(Cutting, "train", None)  # nothing is trained again
    assert call(cifar, monkeypatch) == rows


GOOD = {"groups_cut": 3, "changed_by_fixing": 9, "changed_by_rebuild": 0, "changed_in_the_end": 0}


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),  # what was not zero may matter
        ({"groups_cut": 0, "changed_by_fixing": 0}, True),
        ({"groups_cut": 0, "changed_by_fixing": 1}, False),
        ({"changed_by_rebuild": 1}, False),
        ({"changed_in_the_end": 1}, False),
    ],
)
def test_the_promise(change: dict[str, int], good: bool) -> None:
    assert lossless.lossless({**GOOD, **change}) is good


def start(keep: float = 0.3) -> Start:
    model = tiny.model()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, generator=generator)
    return Start(model, uniform(model, (torch.ones(1, 1, 8, 8),), keep=keep), tiny.data(), 0)


def test_torch_pruning_keeps_as_many_as_planned_and_cuts_what_is_zero() -> None:
    own = start()
    dense, graph, x = own.dense.eval(), own.plan.graph(own.dense), torch.randn(4, 1, 8, 8)
    kept = chosen(own.plan, dense)
    planned = {width.name: width.keep for width in own.plan.widths}
    assert {name: int(channels.sum()) for name, channels in kept.items()} == planned
    masked = zeroed(dense, graph, {name: channels.nonzero().flatten() for name, channels in kept.items()})
    small = torch_pruned(own.plan, masked).eval()
    assert not torch.allclose(dense(x), masked(x), atol=1e-3)
    assert torch.allclose(small(x), masked(x), atol=1e-5)
    left = planner.trace(small, (x,)).width
    assert {name: left[name].size for name in planned} == planned


def test_the_regulariser_pulls_on_planned_layers_until_the_cut() -> None:
    own = start()
    cutting = Cutting(next(m for m in ALL if isinstance(m, TorchPruning) and m.reg), own, 4)
    regularise = cutting.method.before_step(cutting)
    assert regularise is not None
    before = {name: p.grad for name, p in cutting.model.named_parameters()}
    for parameter in cutting.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    regularise()
    pulled = {name for name, p in cutting.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert before.keys() >= pulled >= {f"{width.name}.weight" for width in own.plan.widths}
    assert "conv1.weight" not in pulled
    cutting.taken = cutting.schedule.steps
    grads = copy.deepcopy([p.grad for p in cutting.model.parameters()])
    regularise()
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, cutting.model.parameters(), strict=True) if a is not None)
    assert all(method.before_step(cutting) is None for method in METHODS)


def test_a_budget_that_is_reached_before_changes_nothing_when_it_is_fixed() -> None:
    """WGSEF long enough that all groups beyond the budget are zero when the support is fixed."""
    own = start(0.5)
    row = lossless.run(METHODS[0], own, Recipe(10))
    assert row["groups_cut"] == 0
    assert row["kept_groups"] == sum(width.keep for width in own.plan.widths)
    assert row["changed_by_fixing"] == 0
    assert row["accuracy"]["before"] == row["accuracy"]["rebuilt"]
