"""Importance: what cutting each candidate alone costs, in one currency for widths and depth."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from planner.blocks import Block
from planner.evaluation import evaluating
from planner.graph import Graph, Width
from planner.groups import Groups, group
from planner.structures import Depth, Filter, Structure

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Candidates = Mapping[str, Sequence[int]]  # widths to consider for each named width, the dense one included
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Importance:
    """The rise of the loss when only one thing is cut; `stages` holds γ of the super-additive γ·(blocks removed)²."""

    name: str
    widths: Mapping[str, Mapping[int, float]]
    blocks: Mapping[str, float]
    stages: Mapping[str, float]


def magnitude(model: nn.Module, graph: Graph, candidates: Candidates) -> Importance:
    """Rank by weights alone: the share of a width's squared norm that is cut; a block costs 1, more of a stage more."""
    parameters = dict(model.named_parameters())
    widths = {}
    for name, counts in candidates.items():
        squares = group([Filter(graph.width[name])], model).norms(parameters).square().sort(descending=True).values
        share = squares.cumsum(0) / squares.sum().clamp_min(1e-30)
        widths[name] = {count: max(0.0, 1 - float(share[count - 1])) for count in counts}
    blocks = {block.name: 1.0 for block in graph.blocks if not block.frozen}
    return Importance("magnitude", widths, blocks, {block.stage: 0.5 for block in graph.blocks if not block.frozen})


def measured(
    model: nn.Module, graph: Graph, candidates: Candidates, batches: Sequence[Batch], *, loss: Loss, progress: Progress
) -> Importance:
    """Measure the loss with each candidate cut alone, channels ranked by first-order Taylor on their group.

    The model evaluates meanwhile and is left as it was; the loss is a mean over the batch.

    γ of a stage is such that removing all its blocks costs what it was measured to cost: the sum of single removals
    misses that a residual stage can spare any one of its blocks, not all of them.
    """
    device = next(model.parameters()).device
    batches = [(x.to(device), y.to(device)) for x, y in batches]
    with evaluating(model):
        return _measured(model, graph, candidates, batches, loss=loss, progress=progress)


def _measured(
    model: nn.Module, graph: Graph, candidates: Candidates, batches: Sequence[Batch], *, loss: Loss, progress: Progress
) -> Importance:
    free = [block for block in graph.blocks if not block.frozen]
    of_stage: dict[str, list[Block]] = defaultdict(list)
    for block in free:
        of_stage[block.stage].append(block)
    narrowings = sum(count < graph.width[name].size for name, counts in candidates.items() for count in counts)
    total, done = narrowings + len(free) + len(of_stage), 0

    def rise(structures: Sequence[Structure], kept: Tensor) -> float:
        nonlocal done
        done += 1
        progress(done, total)
        with _masked(model, group(structures, model), kept):
            return max(0.0, _mean_loss(model, batches, loss) - base)

    base = _mean_loss(model, batches, loss)
    scores = _taylor(model, [graph.width[name] for name in candidates], batches, loss)
    widths = {}
    for name, counts in candidates.items():
        worst, rises = 0.0, {}
        for count in sorted(counts, reverse=True):
            kept = torch.zeros_like(scores[name])
            kept[scores[name].topk(count).indices] = 1
            worst = max(worst, rise([Filter(graph.width[name])], kept) if count < graph.width[name].size else 0.0)
            rises[count] = worst  # cutting more never costs less: what looks so is noise
        widths[name] = rises
    blocks = {block.name: rise([Depth(block)], torch.zeros(1)) for block in free}
    stages = {}
    for stage, members in of_stage.items():
        together = rise([Depth(block) for block in members], torch.zeros(len(members)))
        stages[stage] = max(0.0, together - sum(blocks[b.name] for b in members)) / len(members) ** 2
    return Importance("measured", widths, blocks, stages)


@contextmanager
def _masked(model: nn.Module, groups: Groups, kept: Tensor) -> Iterator[None]:
    """Within the block, the groups that are 0 in `kept`, (m,), are zero in the model."""
    parameters = dict(model.named_parameters())
    saved = {member.tensor: parameters[member.tensor].detach().clone() for member in groups.members}
    try:
        groups.scale_(parameters, kept.to(groups.structure.device))
        yield
    finally:
        with torch.no_grad():
            for name, tensor in saved.items():
                parameters[name].copy_(tensor)


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Sequence[Batch], loss: Loss) -> float:
    losses = [loss(model(x), y).float() * len(y) for x, y in batches]
    return float(torch.stack(losses).sum()) / sum(len(y) for _, y in batches)


def _taylor(model: nn.Module, widths: Sequence[Width], batches: Sequence[Batch], loss: Loss) -> dict[str, Tensor]:
    """Return for each width |Σ w·∂L/∂w| of its channels: what the loss loses to first order when they go."""
    groups = group([Filter(width) for width in widths], model)
    parameters = dict(model.named_parameters())
    members = list(dict.fromkeys(member.tensor for member in groups.members))
    scores = torch.zeros(groups.count, device=groups.structure.device)
    for x, y in batches if members else ():
        gradients = torch.autograd.grad(loss(model(x), y), [parameters[name] for name in members])
        products = {n: parameters[n].detach() * g for n, g in zip(members, gradients, strict=True)}
        scores += groups.sums(products).abs()
    sizes = [width.size for width in widths]
    return dict(zip([width.name for width in widths], torch.split(scores, sizes), strict=True))
