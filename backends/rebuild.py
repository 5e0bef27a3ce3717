"""The dense smaller module: cut where the weights are exactly zero, and proven to compute what the masked one does."""

import copy
import logging
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from backends.equivalence import Proof, proven
from backends.regraph import regraph
from backends.surgery import surgery
from planner.graph import Graph
from planner.groups import group
from planner.pools import excess, flush_
from planner.spec import Plan
from planner.structures import Depth, Filter, Structure
from profiles.errors import BuildError, PlanError

log = logging.getLogger(__name__)
Kept = Mapping[str, Tensor]  # channels kept of each width, (kept,) int64
KEPT = "espalier_kept"  # the attribute of a rebuilt model that holds them


def rebuild(plan: Plan, model: nn.Module, *, cases: int = 2) -> nn.Module:
    """Return the dense smaller model of a trained `model` whose planned groups are exactly zero.

    No weight or buffer of it is subnormal. Raises BuildError if the budget is missed, or if on fresh random inputs
    max|dense - masked| / max|masked| is above 1e-9 in float64 or above 1e-4 in the model's own precision.
    """
    graph = plan.graph(model)
    if over := excess(plan, model, graph):
        pool, found, budget = over[0]
        raise BuildError(
            f"the weights do not meet the plan: {pool} has cost {found:g}, its budget is {budget:g} ({len(over)} such "
            "pools); train for as many steps as the schedule has, or call planner.harden_(plan, model)"
        )
    dense = cut(model, graph, support(plan, model, graph), plan.choice.removed)
    flush_(dense)
    proven(graph, model, dense, cases=cases, exact=plan.lossless)
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
    """Return a copy of `model` with only the channels `kept` of the named widths and without the blocks `removed`.

    It is of the user's own class where its forward computes, on random inputs, what `model` does with the other
    channels at zero; where sizes are written into the forward, the exported graph with these put right.
    """
    kept = {name: channels for name, channels in kept.items() if len(channels) < graph.width[name].size}
    reasons = {name: graph.block[name].frozen for name in removed} | {name: graph.width[name].frozen for name in kept}
    for name, reason in reasons.items():
        if reason is not None:
            raise PlanError(f"{name} cannot be cut: {reason}")
    if not kept and not removed:
        return copy.deepcopy(model)
    dense = _smaller(model, graph, kept, removed)
    dense.__dict__[KEPT] = dict(kept)
    return dense


def _smaller(model: nn.Module, graph: Graph, kept: Kept, removed: frozenset[str]) -> nn.Module:
    masks = masks_of(graph, kept)
    inputs = tuple(x.to(next(model.parameters()).device) for x in graph.example())
    as_graph = partial(regraph, model, inputs, {key: mask.numpy() for key, mask in masks.items()}, removed)
    lossy = any(graph.width[name].lossy for name in kept)
    # A lossy cut differs from the masked model, so that only the graph tells a wrong size in the user's own class.
    proof = Proof(graph, as_graph() if lossy else zeroed(model, graph, kept, removed))
    choice = graph.choice({name: len(channels) for name, channels in kept.items()}, removed)
    try:
        return surgery(model, graph, masks, choice, proof)
    except (PlanError, BuildError) as error:
        log.info("rebuilt as a graph, since the model's own forward does not follow: %s", error)
    dense = as_graph()
    proof.check(dense)
    return dense


def zeroed(model: nn.Module, graph: Graph, kept: Kept, removed: frozenset[str] = frozenset()) -> nn.Module:
    """Return a copy of `model` in which the weights of all channels but `kept`, and the blocks `removed`, are zero."""
    masked = copy.deepcopy(model)
    structures: list[Structure] = [Depth(graph.block[name]) for name in sorted(removed)]
    stay = [torch.zeros(len(structures), dtype=torch.bool)]
    for name, channels in kept.items():
        structures.append(Filter(graph.width[name]))
        stay.append(torch.zeros(graph.width[name].size, dtype=torch.bool).index_fill_(0, channels, True))
    groups = group(structures, masked)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        groups.scale_(parameters, torch.cat(stay).to(next(masked.parameters()).device, torch.float32))
    return masked


def masks_of(graph: Graph, kept: Kept) -> dict[tuple[str, int], Tensor]:
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
