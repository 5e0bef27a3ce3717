"""The dense smaller module: cut where the weights are exactly zero, and proven to compute what the masked one does."""

import copy
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from backends.equivalence import equivalence
from planner.blocks import Block, bare_shortcut
from planner.graph import Graph, aliases
from planner.groups import group
from planner.pools import excess
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
    dense = _without(dense, [graph.block[name] for name in sorted(removed)])
    names = aliases(model)
    for (tensor, axis), keep in _masks(graph, kept).items():
        _select(_owners(dense, names[tensor]), axis, keep)
    return dense


def _without(dense: nn.Module, blocks: Sequence[Block]) -> nn.Module:
    """Return `dense` without the bodies of `blocks`; one that lies in the body of another goes with it."""
    by_module = defaultdict(list)
    for block in blocks:
        if not any(block.body < other.body for other in blocks):
            by_module[block.module].append(block)
    for module, own in sorted(by_module.items(), reverse=True):  # inner modules first
        shortcut = bare_shortcut(dense.get_submodule(module), own)
        if not module:
            return shortcut
        dense.set_submodule(module, shortcut)
    return dense


def _owners(dense: nn.Module, names: Sequence[str]) -> list[tuple[nn.Module, str]]:
    """Return every (module, attribute) that still holds the tensor of these names."""
    modules = dict(dense.named_modules(remove_duplicate=False))
    found = {}
    for path, _, attribute in (name.rpartition(".") for name in names):
        if isinstance(getattr(modules.get(path), attribute, None), Tensor):
            found[id(modules[path]), attribute] = modules[path], attribute
    return list(found.values())


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
    nn.PReLU: ("num_parameters",),
    nn.modules.batchnorm._BatchNorm: ("num_features",),
}


def _select(owners: Sequence[tuple[nn.Module, str]], axis: int, keep: Tensor) -> None:
    """Keep these elements of an axis of one tensor, wherever it is held."""
    if not owners:  # it left with a block
        return
    old = getattr(*owners[0])
    new = old.detach().index_select(axis, keep.nonzero().flatten().to(old.device)).contiguous()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module, attribute in owners:
        setattr(module, attribute, new)
        if attribute == "weight":
            _resize(module, axis, old.shape[axis], new.shape[axis])


def _resize(module: nn.Module, axis: int, before: int, after: int) -> None:
    names = next((sizes for kind, sizes in _SIZES.items() if isinstance(module, kind)), ())
    if axis < len(names):
        setattr(module, names[axis], after)
    groups = getattr(module, "groups", 1)
    if axis == 0 and groups > 1:  # depthwise: its inputs go with its outputs
        narrower = after // (before // groups)
        module.__dict__.update(groups=narrower, in_channels=narrower)
