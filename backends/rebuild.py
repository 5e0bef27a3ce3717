"""The dense smaller module: cut where the weights are exactly zero, and proven to compute what the masked one does."""

import copy
import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from backends.channels import select, unread
from backends.equivalence import Proof, proven
from backends.layers import as_many
from backends.record import KEPT, PLAN, REMOVED, copied, records
from backends.regraph import regraph
from backends.shapes import crop_where_right, gather
from backends.surgery import surgery
from planner.graph import Graph
from planner.groups import group
from planner.pools import KIND, excess, flush_, input_channels, leaving, structures_of
from planner.spec import Plan
from planner.structures import Block, Channel, Depth, Filter, FilterShape, Structure
from profiles import Profile, load
from profiles.errors import BuildError, PlanError, ProfileError

log = logging.getLogger(__name__)
Kept = Mapping[str, Tensor]  # channels kept of each width, (kept,) int64
Make = Callable[[nn.Module, Graph, Collection[str]], nn.Module]


def rebuild(plan: Plan, model: nn.Module, *, cases: int = 2, profile: Profile | None = None) -> nn.Module:
    """Return the dense smaller model of a trained `model` whose planned groups are exactly zero.

    Kernels are cropped where zeros allow it. Planned input channels that nothing else reads are cut with what makes
    them; other layers select what they read, and planned kernels gather what is left of them, where that pays on the
    device of `profile`, by default the plan's, or the plan was forced: else the zeros stay, and a warning says so.

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
    removed = leaving(plan, model, graph)
    kept = {name: own for name, own in support(plan, model, graph).items() if graph.width[name].block not in removed}
    dense = cut(crop_where_right(model, graph), graph, kept, removed)
    dense = _shaped(plan, dense, graph, profile)
    flush_(dense)
    proven(graph, model, dense, cases=cases, exact=plan.lossless)
    vars(dense)[PLAN] = plan.sha256
    return dense


def support(plan: Plan, model: nn.Module, graph: Graph) -> Kept:
    """Return the channels that each planned width keeps: the `keep` strongest, or all that are not zero.

    Of runs of channels whole ones stay. Where input channels are planned, those that nothing reads leave too, one of
    each width excepted.
    """
    kept = _strongest(plan, model, graph)
    for pool in plan.pools:
        for structure in structures_of(pool, model, graph) if pool.structure == "block" else ():
            assert isinstance(structure, Block)
            kept[structure.width.name] = _runs(structure, model, int(pool.budget))
    read = unread(model, graph) if any(pool.structure == "channel" for pool in plan.pools) else {}
    for name, channels in read.items():
        own = kept.get(name, channels)
        both = own[torch.isin(own, channels)]
        kept[name] = both if len(both) else own[:1]
    return kept


def _runs(structure: Block, model: nn.Module, budget: int) -> Tensor:
    """Return the channels of the strongest runs."""
    norms = group([structure], model).norms(dict(model.named_parameters())).cpu()
    strongest = norms.topk(max(1, min(budget, int(norms.count_nonzero())))).indices
    return torch.isin(torch.arange(structure.width.size) // structure.quantum, strongest).nonzero().flatten()


def _strongest(plan: Plan, model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    widths = [graph.width[width.name] for width in plan.widths if width.keep]
    norms = group([Filter(width) for width in widths], model).norms(dict(model.named_parameters())).cpu()
    planned = {width.name: width.keep for width in plan.widths}
    per_width = {name for pool in plan.pools if len(pool.members) == 1 for name in pool.members}
    kept = {}
    for width, own in zip(widths, torch.split(norms, [width.size for width in widths]), strict=True):
        count = planned[width.name] if width.name in per_width else max(1, int(own.count_nonzero()))
        kept[width.name] = own.topk(count).indices.sort().values
    return kept


def _shaped(plan: Plan, dense: nn.Module, graph: Graph, profile: Profile | None) -> nn.Module:
    """Return `dense` whose planned layers gather or select, where they have zeros left and the profile says it pays."""
    makers: dict[type[FilterShape | Channel], Make] = {FilterShape: gather, Channel: select}
    for kind, make in makers.items():
        layers = _with_zeros(plan, dense, graph, kind)
        if layers and (reason := _unpaid(plan, profile, kind.profile_kind)):
            log.warning("%s: zeros stay in place: %s", ", ".join(layers), reason)
            continue
        dense = as_many(partial(_made, make, graph), dense, layers)
    return dense


def _made(make: Make, graph: Graph, dense: nn.Module, layers: Collection[str]) -> nn.Module:
    return make(dense, graph, layers)


def _with_zeros(plan: Plan, dense: nn.Module, graph: Graph, kind: type[FilterShape | Channel]) -> list[str]:
    """Return the layers whose planned groups are not all gone from their weights."""
    weights, found = dict(dense.named_parameters(remove_duplicate=False)), []
    for pool in plan.pools:
        for name in pool.members if pool.structure == KIND[kind] else ():
            weight = weights.get(name)
            if weight is None:  # it left with a block
                continue
            alive = weight.detach() != 0
            axis = input_channels(dense, graph, name).axis if kind is Channel else 1
            by_group = alive.any(0) if kind is FilterShape else alive.movedim(axis, 0).flatten(1).any(1)
            if not by_group.all():
                found.append(name.rpartition(".")[0])
    return list(dict.fromkeys(found))


def _unpaid(plan: Plan, profile: Profile | None, kind: str) -> str:
    """Return why it is not known to pay on the device; what it depends on is logged."""
    if plan.forced:
        return ""
    try:
        profile = profile or load(plan.profile)
    except ProfileError as error:
        return f"whether {kind} pays is not known: {error}"
    known = profile.pays(kind)
    if known is None:
        return f"{profile.id} does not say whether {kind} pays; Scope(force=True) does it anyway"
    if known.requires:
        log.warning("%s pays on %s if %s", kind, profile.id, "; ".join(known.requires))
    return f"{kind} does not pay on {profile.id}" if known.pays == "no" else ""


def cut(
    model: nn.Module,
    graph: Graph,
    kept: Kept,
    removed: frozenset[str] = frozenset(),
    *,
    program: Callable[[], ExportedProgram] | None = None,
    brief: bool = False,
) -> nn.Module:
    """Return a copy of `model` with only the channels `kept` of the named widths and without the blocks `removed`.

    It is of the user's own class where its forward computes, on random inputs, what `model` does with the other
    channels at zero; where sizes are written into the forward, the exported graph with these put right.
    Who cuts a model many times gives `program`, which returns what `backends.regraph.resizable` made of it; who only
    times what comes out has that shown `brief`ly, on one example.
    """
    kept = {name: channels for name, channels in kept.items() if len(channels) < graph.width[name].size}
    reasons = {name: graph.block[name].frozen for name in removed} | {name: graph.width[name].frozen for name in kept}
    for name, reason in reasons.items():
        if reason is not None:
            raise PlanError(f"{name} cannot be cut: {reason}")
    if not kept and not removed:
        return copied(model)
    dense = _smaller(model, graph, kept, removed, program, brief=brief)
    vars(dense).update({**records(model), KEPT: dict(kept), REMOVED: dict.fromkeys(sorted(removed), True)})
    return dense


def _smaller(
    model: nn.Module,
    graph: Graph,
    kept: Kept,
    removed: frozenset[str],
    program: Callable[[], ExportedProgram] | None,
    *,
    brief: bool,
) -> nn.Module:
    masks = masks_of(graph, kept)
    inputs = tuple(x.to(next(model.parameters()).device) for x in graph.example())
    blocks = [graph.block[name] for name in removed]
    arrays = {key: mask.numpy() for key, mask in masks.items()}
    as_graph = partial(regraph, model, inputs, arrays, blocks, program=program)
    lossy = any(graph.width[name].lossy for name in kept)
    # A lossy cut differs from the masked model, so that only the graph tells a wrong size in the user's own class.
    proof = Proof(graph, as_graph() if lossy else zeroed(model, graph, kept, removed), brief=brief)
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
