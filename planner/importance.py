"""Importance: what cutting each candidate alone costs, in one currency for widths and depth."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from planner.blocks import Block
from planner.evaluation import evaluating, normalising_by_batch
from planner.graph import Graph
from planner.groups import Groups, group
from planner.structures import Depth, Structure, kept, ranked
from planner.trims import Trim, structure_of
from planner.widths import Width
from profiles.errors import PlanError

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Candidates = Mapping[str, Sequence[int]]  # numbers to consider for each width or trim, the dense one included
_TEMPERATURES = 64


@dataclass(frozen=True)
class Importance:
    """The rise of the loss when only one thing is cut; `stages` holds γ of the super-additive γ·(blocks removed)²."""

    name: str
    widths: Mapping[str, Mapping[int, float]]
    blocks: Mapping[str, float]
    stages: Mapping[str, float]
    scores: Mapping[str, Tensor] = field(default_factory=dict)  # of each width's or trim's groups; else their norms

    def with_depth_priced(self, factor: float) -> "Importance":
        """Return the importance with γ multiplied by `factor`: at 0 blocks leave as if each were alone."""
        return replace(self, stages={stage: gamma * factor for stage, gamma in self.stages.items()})

    def raised(self, power: float, graph: Graph) -> "Importance":
        """Return the importance with every loss to a power: above 1 it shuns large cuts, below 1 many small ones.

        The cheaper half of a stage's blocks together costs the power of what it did, which sets γ.
        """
        widths = {name: {n: loss**power for n, loss in losses.items()} for name, losses in self.widths.items()}
        blocks = {name: loss**power for name, loss in self.blocks.items()}
        stages = {}
        for stage, own in graph.stages.items():
            cheap = [block.name for block in _cheaper(own, self.blocks)]
            together = sum(self.blocks[name] for name in cheap) + self.stages.get(stage, 0.0) * len(cheap) ** 2
            stages[stage] = max(0.0, together**power - sum(blocks[name] for name in cheap)) / len(cheap) ** 2
        name = self.name if power == 1 else f"{self.name}^{power:g}"
        return replace(self, name=name, widths=widths, blocks=blocks, stages=stages)


def magnitude(model: nn.Module, graph: Graph, candidates: Candidates) -> Importance:
    """Rank by weights alone: the share of a width's squared norm that is cut; a block costs 1, more of a stage more.

    What is trimmed off a layer loses its share of the squared norm of that layer's weights.
    """
    parameters = dict(model.named_parameters())
    squares = {name: _squares(graph.part[name], model, parameters) for name in candidates}
    return replace(supplied("magnitude", squares, graph, candidates), scores={})  # norms, anew as they change


def supplied(name: str, scores: Mapping[str, Tensor], graph: Graph, candidates: Candidates) -> Importance:
    """Rank by scores, one of each channel of each width: what is lost is the share of a width's score that is cut.

    Trims have one score a group too: an input, a position of the kernel from its centre outwards, a weight. A block
    costs 1, more blocks of a stage more. Raises PlanError if a width has no scores, or not one a channel.
    """
    widths = {}
    for width, counts in candidates.items():
        own, structure = scores.get(width), structure_of(graph.part[width])
        if own is None or len(own) not in (structure.count, graph.part[width].size) or not bool((own >= 0).all()):
            raise PlanError(f"{name!r} needs {structure.count} scores of 0 or more for {width}")
        worth = ranked(structure, own).cumsum(0)
        share = worth / worth[-1].clamp_min(1e-30)
        widths[width] = {count: max(0.0, 1 - float(share[count - 1])) for count in counts}
    free = [block for block in graph.blocks if not block.frozen]
    return Importance(name, widths, dict.fromkeys((b.name for b in free), 1.0), {b.stage: 0.5 for b in free}, scores)


def batchnorm_scale(model: nn.Module, graph: Graph, candidates: Candidates) -> Importance:
    """Rank by the absolute scale of the normalisations on the way (Liu et al. 2017); trims by their squared norms.

    Raises PlanError if a width has none.
    """
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
    scales = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, kinds) and m.weight is not None}
    parameters, scores = dict(model.named_parameters()), {}
    for name in candidates:
        if name not in graph.width:
            scores[name] = _squares(graph.part[name], model, parameters)
            continue
        width = graph.width[name]
        found = torch.zeros(width.size)
        pieces = [piece for piece in width.slices if piece.tensor in scales]
        if not pieces:
            raise PlanError(
                f"{name} has no normalisation with a scale; rank by magnitude, or leave it out of the scope"
            )
        for piece in pieces:
            units = torch.from_numpy(piece.units)
            found.index_add_(0, units[units >= 0], parameters[piece.tensor].detach().cpu().abs()[units >= 0])
        scores[name] = found
    return supplied("batchnorm_scale", scores, graph, candidates)


def at_random(graph: Graph, candidates: Candidates, *, seed: int = 0) -> Importance:
    """Rank at random: the control that says what any other importance is worth."""
    dice = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(structure_of(graph.part[name]).count, generator=dice) for name in candidates}
    return supplied(f"random {seed}", scores, graph, candidates)


def taylor(
    model: nn.Module, graph: Graph, candidates: Candidates, batches: Sequence[Batch], *, loss: Loss
) -> Importance:
    """Rank by the first-order change of the loss (Molchanov et al. 2019), of channels and of blocks alike.

    A width loses the sum over the channels that go; blocks of a stage cost half of their mean more for each pair.
    """
    device = next(model.parameters()).device
    batches = [(x.to(device), y.to(device)) for x, y in batches]
    free = [block for block in graph.blocks if not block.frozen]
    with evaluating(model):
        parts = {name: structure_of(graph.part[name]) for name in candidates}
        found = _taylor(model, parts, batches, loss)
        removals = _taylor(model, {block.name: Depth(block) for block in free}, batches, loss)
        blocks = {name: float(own) for name, own in removals.items()}
    widths = {}
    for name, counts in candidates.items():
        worth = torch.cat([torch.zeros(1), ranked(parts[name], found[name].cpu()).cumsum(0)])
        widths[name] = {count: max(0.0, float(worth[-1] - worth[count])) for count in counts}
    stages = {stage: 0.5 * sum(blocks[b.name] for b in own) / len(own) for stage, own in graph.stages.items()}
    return Importance("taylor", widths, blocks, stages, found)


def _squares(part: Width | Trim, model: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return the squared norm of each group; ones where the model has no weights, on the meta device."""
    if next(iter(parameters.values())).is_meta:
        return torch.ones(part.size)
    return group([structure_of(part)], model).norms(parameters).square()


def questions(graph: Graph, candidates: Candidates) -> int:
    """Return how many losses `measured` measures."""
    free = [block for block in graph.blocks if not block.frozen]
    narrowings = sum(count < graph.part[name].size for name, counts in candidates.items() for count in counts)
    return narrowings + len(free) + len({block.stage for block in free})


def measured(
    model: nn.Module,
    graph: Graph,
    candidates: Candidates,
    batches: Sequence[Batch],
    *,
    loss: Loss,
    answers: MutableMapping[str, float] | None = None,
) -> Importance:
    """Measure the loss with each candidate cut alone, channels ranked by first-order Taylor on their group.

    The model evaluates meanwhile, but BatchNorm takes the statistics of each batch, as after a cut it must have new
    ones; it is left as it was. The loss is a mean over the batch; for classes calibrated_cross_entropy tells damage
    best. `answers` takes each measured rise as it is known, and what it holds already is not measured again.

    γ of a stage is such that removing its cheaper half of blocks costs what it was measured to cost: the sum of single
    removals misses that a residual stage can spare any one of its blocks, not many of them.
    """
    device = next(model.parameters()).device
    batches = [(x.to(device), y.to(device)) for x, y in batches]
    with evaluating(model):
        scores = _taylor(model, {name: structure_of(graph.part[name]) for name in candidates}, batches, loss)
    with evaluating(model), normalising_by_batch(model):
        asked = _Rises(model, batches, loss, {} if answers is None else answers)
        widths = {name: asked.of_part(graph.part[name], counts, scores[name]) for name, counts in candidates.items()}
        blocks = {b.name: asked.of_blocks(f"block {b.name}", [b]) for own in graph.stages.values() for b in own}
        stages = {stage: asked.of_stage(stage, own, blocks) for stage, own in graph.stages.items()}
    return Importance("measured", widths, blocks, stages, scores)


@dataclass
class _Rises:
    """The rise of the loss by what is cut."""

    model: nn.Module
    batches: Sequence[Batch]
    loss: Loss
    answers: MutableMapping[str, float]
    base: float | None = None

    def of_part(self, part: Width | Trim, counts: Sequence[int], scores: Tensor) -> dict[int, float]:
        """Return the rise for each number of channels kept; cutting more never costs less: what looks so is noise."""
        worst, rises, structure = 0.0, {}, structure_of(part)
        for count in sorted(counts, reverse=True):
            if count < part.size:
                stays = kept(structure, scores, count)
                worst = max(worst, self._rise(f"{part.name} {count}", [structure], stays))
            rises[count] = worst
        return rises

    def of_blocks(self, name: str, blocks: Sequence[Block]) -> float:
        """Return the rise when these blocks leave."""
        return self._rise(name, [Depth(block) for block in blocks], torch.zeros(len(blocks)))

    def of_stage(self, stage: str, blocks: Sequence[Block], alone: Mapping[str, float]) -> float:
        """Return γ: what the cheaper half of the blocks of a stage costs beyond the sum of each, by their number²."""
        cheap = _cheaper(blocks, alone)
        together = self.of_blocks(f"stage {stage}", cheap)
        return max(0.0, together - sum(alone[block.name] for block in cheap)) / len(cheap) ** 2

    def _rise(self, name: str, structures: Sequence[Structure], kept: Tensor) -> float:
        if name not in self.answers:
            if self.base is None:
                self.base = mean_loss(self.model, self.batches, self.loss)
            with _masked(self.model, group(structures, self.model), kept):
                self.answers[name] = max(0.0, mean_loss(self.model, self.batches, self.loss) - self.base)
        return self.answers[name]


def _cheaper(blocks: Sequence[Block], alone: Mapping[str, float]) -> list[Block]:
    """Return the half of the blocks of a stage whose loss is lowest alone, and two of them at least."""
    return sorted(blocks, key=lambda block: alone[block.name])[: max(2, -(-len(blocks) // 2))]


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


def calibrated_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return min over t of the cross entropy of softmax(outputs / t), the best temperature for a batch.

    A network that was cut errs with more certainty than it has reason to, so that its cross entropy may be above that
    of guessing, log(classes), which this never is; the scale is what training mends first. Outputs (batch, classes),
    targets (batch,) of classes. Guo et al. 2017, arXiv 1706.04599, section 4.2.
    """
    scales = torch.cat([torch.zeros(1), torch.logspace(-3, 0.5, _TEMPERATURES)]).to(outputs.device)  # 1 / t
    return torch.stack([cross_entropy(outputs.float() * scale, targets) for scale in scales]).min()


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch], loss: Loss) -> float:
    """Return the mean of `loss` over all examples, in the mode that the model is in."""
    losses = [loss(model(x), y).float() * len(y) for x, y in batches]
    return float(torch.stack(losses).sum()) / sum(len(y) for _, y in batches)


def _taylor(
    model: nn.Module, structures: Mapping[str, Structure], batches: Sequence[Batch], loss: Loss
) -> dict[str, Tensor]:
    """Return for each structure |Σ w·∂L/∂w| of its groups: what the loss loses to first order when they go."""
    groups = group(list(structures.values()), model)
    parameters = dict(model.named_parameters())
    members = list(dict.fromkeys(member.tensor for member in groups.members))
    scores = torch.zeros(groups.count, device=groups.structure.device)
    for x, y in batches if members else ():
        gradients = torch.autograd.grad(loss(model(x), y), [parameters[name] for name in members])
        products = {n: parameters[n].detach() * g for n, g in zip(members, gradients, strict=True)}
        scores += groups.sums(products).abs()
    sizes = [structure.count for structure in structures.values()]
    return dict(zip(structures, torch.split(scores, sizes), strict=True))
