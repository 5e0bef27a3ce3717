"""The dense smaller module: cut where the weights are exactly zero, and proven to compute what the masked one does."""

import copy
import logging
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from backends.equivalence import equivalence
from planner.blocks import bare_shortcut
from planner.graph import Graph
from planner.groups import group
from planner.prox import excess
from planner.spec import Plan
from planner.structures import Filter
from profiles.errors import BuildError, PlanError

log = logging.getLogger(__name__)
Kept = Mapping[str, Tensor]  # channels kept of each width, (kept,) int64


def rebuild(plan: Plan, model: nn.Module, *, cases: int = 2) -> nn.Module:
    """Return the dense smaller model of a trained `model` whose planned groups are exactly zero.

    Raises BuildError if the budget is missed, or if on fresh random inputs max|dense - masked| / max|masked| > 1e-4.
    """
    graph = plan.graph(model)
    if over := excess(plan, model, graph):
        pool, found, budget = over[0]
        raise BuildError(
            f"the weights do not meet the plan: {pool} has cost {found:g}, its budget is {budget:g} ({len(over)} such "
            "pools); train for as many steps as the schedule has, or call planner.harden_(plan, model)"
        )
    dense = cut(model, graph, support(plan, model, graph), plan.choice.removed)
    equivalence(graph, model, dense, [plan.inputs_like(seed=seed) for seed in range(cases)])
    return dense


def support(plan: Plan, model: nn.Module, graph: Graph) -> Kept:
    """Return the channels that each planned width keeps: the `keep` strongest, or all that are not zero."""
    widths = [graph.width[width.name] for width in plan.widths if width.keep]
    norms = group([Filter(width) for width in widths], model).norms(dict(model.named_parameters())).cpu()
    planned = {width.name: width.keep for width in plan.widths}
    per_width = {name for pool in plan.pools if len(pool.members) == 1 for name in pool.members}
    kept = {}
    for width, own in zip(widths, torch.split(norms, [width.size for width in widths]), strict=True):
        count = planned[width.name] if width.name in per_width else max(1, int(own.count_nonzero()))
        kept[width.name] = own.topk(count).indices.sort().values
    return kept


def cut(model: nn.Module, graph: Graph, kept: Kept, removed: frozenset[str] = frozenset()) -> nn.Module:
    """Return a copy of `model` with only the channels `kept` of the named widths and without the blocks `removed`."""
    frozen = [graph.block[name] for name in removed if graph.block[name].frozen] + [
        graph.width[name] for name in kept if graph.width[name].frozen
    ]
    if frozen:
        raise PlanError(f"{frozen[0].name} cannot be cut: {frozen[0].frozen}")
    dense = copy.deepcopy(model)
    _drop_blocks(dense, graph, removed)
    present = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    for (tensor, axis), keep in _masks(graph, kept).items():
        if tensor in present:
            _select(dense, tensor, axis, keep)
    return dense


def _drop_blocks(dense: nn.Module, graph: Graph, removed: frozenset[str]) -> None:
    by_module = defaultdict(list)
    for name in removed:
        by_module[graph.block[name].module].append(graph.block[name])
    for module, blocks in sorted(by_module.items(), reverse=True):  # inner modules first
        if not module:
            raise PlanError(f"{blocks[0].name} lies in the model's own forward; put it into a module of its own")
        shortcut = bare_shortcut(dense.get_submodule(module), blocks)
        dense.set_submodule(module, shortcut.train(dense.training))


def _masks(graph: Graph, kept: Kept) -> dict[tuple[str, int], Tensor]:
    """Return for each cut axis of each tensor which elements stay."""
    masks: dict[tuple[str, int], Tensor] = {}
    for name, channels in kept.items():
        width = graph.width[name]
        stays = torch.zeros(width.size + 1, dtype=torch.bool)
        stays[channels] = True
        stays[-1] = True  # serves elements of other widths, whose unit is -1
        for piece in width.slices:
            mask = stays[torch.from_numpy(piece.units)]
            key = (piece.tensor, piece.axis)
            masks[key] = masks[key] & mask if key in masks else mask
    return masks


# What a module says about its own sizes, by the axis of its weight that they follow.
_SIZES = {
    nn.Conv1d: ("out_channels", "in_channels"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Linear: ("out_features", "in_features"),
    nn.BatchNorm1d: ("num_features",),
    nn.BatchNorm2d: ("num_features",),
}


def _select(dense: nn.Module, tensor: str, axis: int, keep: Tensor) -> None:
    path, _, name = tensor.rpartition(".")
    module = dense.get_submodule(path)
    old = getattr(module, name)
    new = old.detach().index_select(axis, keep.nonzero().flatten().to(old.device))
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(new.contiguous(), requires_grad=old.requires_grad))
    else:
        setattr(module, name, new.contiguous())
    if name != "weight":
        return
    size = int(keep.sum())
    names = next((sizes for kind, sizes in _SIZES.items() if isinstance(module, kind)), ())
    if axis < len(names):
        setattr(module, names[axis], size)
    groups = getattr(module, "groups", 1)
    if axis == 0 and groups > 1:  # depthwise: its inputs go with its outputs
        narrower = size // (old.shape[0] // groups)
        module.__dict__.update(groups=narrower, in_channels=narrower)
