"""A plan for a device that rounds nothing, and a model that is exactly zero where the plan says."""

import torch
from torch import nn

import planner
from planner.graph import trace
from planner.importance import Importance
from planner.spec import Plan
from tools.examples.resnet import ResNet

from ..planner.nets import PIXELS, anywhere, looking_trained


def planned(model: nn.Module, latency: float, *, importance: Importance | None = None) -> Plan:
    """Plan for a device that rounds nothing."""
    return planner.plan(model, (torch.ones(PIXELS),), anywhere(), latency=latency, importance=importance)


def resnet_ready() -> tuple[Plan, nn.Module]:
    """Return a plan that narrows and removes, and a model that is exactly zero where it says."""
    model = looking_trained(ResNet(2, (8, 12, 16))).eval()
    graph = trace(model, (torch.ones(PIXELS),))
    widths = {w.name: {n: 1 - n / w.size for n in range(1, w.size + 1)} for w in graph.cuttable}
    blocks = {block.name: 10.0 * (block.name != "layer2.1") for block in graph.blocks}
    plan = planned(model, 0.5, importance=Importance("by hand", widths, blocks, {}))
    assert [block.name for block in plan.blocks if block.removed] == ["layer2.1"]
    assert any(1 < width.keep < width.dense for width in plan.widths)
    assert planner.harden_(plan, model) > 0
    return plan, model
