"""A scope keeps whole what it does not select, says why, and refuses names that the model does not have."""

from typing import Any

import pytest
import torch
from torch import nn

import planner
from planner.scope import Scope
from profiles.errors import PlanError
from profiles.schema import Structure
from tools.examples.resnet import ResNet

from . import nets
from .nets import example

INPUTS = (torch.ones(nets.PIXELS),)
KEEPS = {
    "by type": ({"op_types": ("Linear",)}, {"10"}),
    "by name": ({"op_names": ("3", "10")}, {"3", "10"}),
    "by pattern": ({"op_names_re": (r"^[36]$",)}, {"3", "6"}),
    "all but one": ({"exclude_op_names": ("3",)}, {"0", "6", "10"}),
    "ignored": ({"ignored_layers": ("0", "6")}, {"3", "10"}),
    "nothing said": ({}, {"0", "3", "6", "10"}),
}


@pytest.mark.parametrize("case", KEEPS)
def test_only_what_is_selected_is_cut(case: str) -> None:
    options, expected = KEEPS[case]
    model, graph = example("VGG")
    assert {width.name for width in Scope(**options).applied(graph, model).cuttable} == expected


def test_what_is_kept_says_why() -> None:
    model, graph = example("VGG")
    scoped = Scope(op_types=("Linear",), ignored_layers=(model.get_submodule("10"),)).applied(graph, model)
    assert scoped.width["0"].frozen == "0 is not selected"
    assert scoped.width["10"].frozen == "10 is ignored"


def test_a_width_tied_over_layers_needs_all_of_them() -> None:
    model, graph = example("residual, option B")
    scoped = Scope(exclude_op_names=("layer1.1.conv2",)).applied(graph, model)
    assert scoped.width["conv1"].frozen == "layer1.1.conv2 is not selected"
    assert scoped.block["layer1.1"].frozen == "its layer layer1.1.conv2 is not selected"
    assert scoped.block["layer1.0"].frozen is None


def test_blocks_stay_when_told_so() -> None:
    model, graph = example("residual, option B")
    assert {block.frozen for block in Scope(removes_blocks=False).applied(graph, model).blocks} == {"blocks are kept"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"op_names": ("conv9",)}, "no layer 'conv9'"),
        ({"ignored_layers": (nn.Linear(1, 1),)}, "an ignored layer, Linear, is not in the model"),
        ({"op_types": ("Conv7d",)}, "no layer of type 'Conv7d'; it has .*Conv2d"),
    ],
)
def test_names_that_are_no_layers_are_refused(options: dict[str, Any], told: str) -> None:
    model, graph = example("VGG")
    with pytest.raises(PlanError, match=told):
        Scope(**options).applied(graph, model)


def test_a_least_width_bounds_the_candidates() -> None:
    model = ResNet(1, (64, 64, 64))
    plan = planner.plan(
        model, INPUTS, nets.anywhere(), latency=0.7, scope=Scope(min_width={"layer1.0.conv1": 40}, removes_blocks=False)
    )
    by_name = {width.name: width for width in plan.widths}
    assert min(by_name["layer1.0.conv1"].considered) >= 40
    assert min(by_name["layer2.0.conv1"].considered) < 40


def test_a_structure_that_does_not_pay_is_refused_unless_forced() -> None:
    model, inputs = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), (torch.ones(2, 32),)
    never = Structure.model_construct(kind="hidden", pays="no")
    no_hidden = nets.anywhere().model_copy(update={"structure": (never,)})
    with pytest.raises(PlanError, match=r"cutting hidden does not pay on any.*Scope\(force=True\)"):
        planner.plan(model, inputs, no_hidden, latency=0.6)
    plan = planner.plan(model, inputs, no_hidden, latency=0.6, scope=Scope(force=True))
    assert [(width.structure, width.keep < width.dense) for width in plan.widths] == [("hidden", True)]
    tail = [nn.Flatten(), nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, 4)]
    mixed = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), *tail)
    plan = planner.plan(mixed, INPUTS, no_hidden, latency=0.7)
    assert [width.structure for width in plan.widths] == ["filter"]
    assert plan.notes == ("cutting hidden does not pay on " + no_hidden.id,)
