"""Plans that differ in their mix of depth and width, told apart by the loss of the network that they leave.

Losses of single cuts do not add up, for depth least of all, so the program's objective ranks such plans badly. Here
each is cut, BatchNorm takes the statistics of each batch, and the loss is measured before any training.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from planner.evaluation import evaluating, normalising_by_batch
from planner.graph import Graph
from planner.groups import group
from planner.importance import Batch, Importance, Loss, mean_loss
from planner.pools import structures_of
from planner.spec import Plan
from planner.structures import Depth, Filter, kept


def loss_after(
    model: nn.Module, graph: Graph, plan: Plan, importance: Importance, batches: Sequence[Batch], *, loss: Loss
) -> float:
    """Return the mean loss of a copy of `model` cut as planned, BatchNorm by the statistics of each of `batches`."""
    cut = masked(model, graph, plan, importance)
    device = next(cut.parameters()).device
    batches = [(x.to(device), y.to(device)) for x, y in batches]
    with evaluating(cut), normalising_by_batch(cut):
        return mean_loss(cut, batches, loss)


def masked(model: nn.Module, graph: Graph, plan: Plan, importance: Importance) -> nn.Module:
    """Return a copy of `model` whose groups are zero as planned: of each width, those of the lowest scores."""
    found = copy.deepcopy(model)
    parameters = dict(found.named_parameters())
    for width in plan.widths:
        if 0 < width.keep < width.dense:
            groups = group([Filter(graph.width[width.name])], found)
            scores = importance.scores.get(width.name, groups.norms(parameters))
            stays = kept(groups.structures[0], scores, width.keep)
            groups.scale_(parameters, stays.to(groups.structure.device))
    for pool in plan.pools:
        if pool.structure in ("channel", "kernel", "nm"):
            (structure,) = structures_of(pool, found, graph)
            groups = group([structure], found)
            groups.scale_(parameters, kept(structure, groups.norms(parameters), int(pool.budget)))
    leaving = [Depth(graph.block[block.name]) for block in plan.blocks if block.removed]
    if leaving:
        groups = group(leaving, found)
        groups.scale_(parameters, torch.zeros_like(groups.structure, dtype=torch.float32))
    return found
