"""What people prune with today, given the planner's own latency table and importance: widths within a budget.

Each rival returns numbers of channels, and is scored as if it had kept the best channels of each width; none of them
removes residual blocks, as the planner may: a block that leaves keeps nothing of the weights inside it. *Uniform*
narrows every width by one ratio. *GroupNorm* is torch-pruning's global ranking of group norms, with and without
rounding. *Greedy* is a latency-saliency knapsack in the way of HALP (Shen et al. 2022): again and again the run of
channels, down to the device's next step, that loses the least saliency for the latency that it frees.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from planner import Graph, Importance, Problem
from planner.groups import group
from planner.operations import Choice
from planner.resources import Resource, Term, widths_of
from planner.structures import Filter

STEPS = 48  # of torch-pruning's iterative pruning: each is a network that it passes on its way
Keep = Mapping[str, int]


@dataclass(frozen=True)
class Judge:
    """The importance and the latency of any network, from what the planner itself goes by.

    Importance is the mean over widths of the share of the squared norm that is kept: of the best n
    channels, and of those what lies in blocks that stay. It is the same for all who are judged.
    """

    graph: Graph
    time: Resource
    kept: Mapping[str, NDArray[np.float64]]  # of each width, the share that its best n channels keep, n from 0
    inside: Mapping[str, Mapping[str, NDArray[np.float64]]]  # the part of that which lies in a block, by block

    @classmethod
    def of(cls, posed: Problem) -> "Judge":
        """Return the judge of a problem."""
        parameters = dict(posed.model.named_parameters())
        squares = {name: parameter.detach().square() for name, parameter in parameters.items()}
        kept: dict[str, NDArray[np.float64]] = {}
        inside: dict[str, dict[str, NDArray[np.float64]]] = {block.name: {} for block in posed.graph.blocks}
        for width in posed.graph.cuttable:
            groups = group([Filter(width)], posed.model)
            whole = groups.sums(squares).double()
            order, total = whole.argsort(descending=True), whole.sum().clamp_min(1e-30)
            kept[width.name] = _shares(whole[order] / total)
            tensors = {member.tensor: member.tensor.rpartition(".")[0] for member in groups.members}
            for block in posed.graph.blocks:
                if not block.modules.isdisjoint(tensors.values()):
                    own = {name: squares[name] * (module in block.modules) for name, module in tensors.items()}
                    inside[block.name][width.name] = _shares(groups.sums(own).double()[order] / total)
        return cls(posed.graph, posed.times[posed.profile.id], kept, inside)

    @property
    def dense_s(self) -> float:
        """The latency of the dense network."""
        return self.time.under(self.graph.dense)

    def latency(self, choice: Choice) -> float:
        """Return the latency as a fraction of the dense one."""
        return self.time.under(self.graph.choice(choice.keep, choice.removed)) / self.dense_s

    def importance(self, choice: Choice) -> float:
        """Return the mean share of importance that a network keeps."""
        found = [float(own[choice.keep[name]]) for name, own in self.kept.items()]
        modules = {block.name: block.modules for block in self.graph.blocks}
        outermost = [b for b in choice.removed if not any(modules[b] < modules[other] for other in choice.removed)]
        lost = [float(own[choice.keep[name]]) for b in outermost for name, own in self.inside[b].items()]
        return (sum(found) - sum(lost)) / len(found)

    def measured(self, options: Mapping[str, Sequence[int]]) -> Importance:
        """Return the same for the planner: what cutting each candidate, and each block, alone costs."""
        losses = {
            n: {c: max(0.0, 1 - float(self.kept[n][c])) for c in counts}
            for n, counts in options.items()
            if n in self.kept
        }
        whole = 1.0 + len(losses)  # the price of trimming a layer: nobody else does, and the judge does not know of it
        losses |= {n: {c: whole * (c < max(own)) for c in own} for n, own in options.items() if n not in self.kept}
        blocks = {name: sum(float(own[-1]) for own in found.values()) for name, found in self.inside.items()}
        return Importance("magnitude", losses, blocks, {})

    def best_within(self, path: Sequence[Choice], budget: float) -> Choice | None:
        """Return, of the networks on a path, the one within the budget that keeps most."""
        fitting = [choice for choice in path if self.latency(choice) <= budget * (1 + 1e-9)]
        return max(fitting, key=self.importance, default=None)


def _shares(shares: Tensor) -> NDArray[np.float64]:
    return np.concatenate([[0.0], shares.cumsum(0).numpy()])


def uniform(judge: Judge) -> list[Keep]:
    """Return the networks that one ratio for all widths gives."""
    shares = [i / 256 for i in range(1, 257)]
    return [{w.name: max(1, round(w.size * share)) for w in judge.graph.cuttable} for share in shares]


def greedy(judge: Judge, posed: Problem) -> list[Keep]:
    """Return the networks that a greedy knapsack passes, from the dense one down."""
    keep = {w.name: w.size for w in judge.graph.cuttable}
    options = posed.options()
    terms = {
        name: [t for t in judge.time.sums[0] if name in widths_of(t.extents)] for name in keep
    }  # whose cost a width changes
    path: list[Keep] = [dict(keep)]
    gains = {name: _gain(judge, terms[name], keep, name, _below(keep[name], options[name])) for name in keep}
    while True:
        open_ = {name: ratio for name, ratio in gains.items() if ratio is not None}
        if not open_:
            return path
        worst = min(open_, key=lambda name: open_[name])
        keep[worst] = _below(keep[worst], options[worst])
        path.append(dict(keep))
        beside = {name for term in terms[worst] for name in widths_of(term.extents) if name in keep}
        for name in {worst, *beside}:
            gains[name] = _gain(judge, terms[name], keep, name, _below(keep[name], options[name]))


def _below(count: int, options: Sequence[int]) -> int:
    return max((option for option in options if option < count), default=0)


def _gain(judge: Judge, terms: Sequence[Term], keep: Keep, name: str, below: int) -> float | None:
    """Return the saliency that a narrower width loses per second that it frees; None if there is none narrower."""
    if not below:
        return None
    now, then = judge.graph.choice(keep), judge.graph.choice({**keep, name: below})
    freed = sum(term.under(now) - term.under(then) for term in terms)
    lost = float(judge.kept[name][keep[name]] - judge.kept[name][below])
    return lost / freed if freed > 1e-12 else float("inf")


def group_norm(judge: Judge, posed: Problem, *, round_to: int | None) -> list[Keep]:
    """Return the networks that torch-pruning passes: global GroupNorm importance, without the output layer."""
    wanted = Ranking("norm", everywhere=True, round_to=round_to)
    return [kept_of(posed.graph, model) for model in torch_pruned(posed.model, posed.graph, wanted)]


@dataclass(frozen=True)
class Ranking:
    """How torch-pruning ranks channels, over the whole network or in each layer, and what counts are multiples of."""

    by: str  # "norm": GroupNorm's; "L1": of filters alone; "random"
    everywhere: bool  # otherwise every layer loses the same share
    round_to: int | None = None


def torch_pruned(
    model: nn.Module, graph: Graph, ranking: Ranking, *, steps: int = STEPS, share: float = 0.98
) -> Iterator[nn.Module]:
    """Yield a copy of `model` that torch-pruning narrows until `share` is gone; it is the same object each time."""
    import torch_pruning  # a test extra

    logging.getLogger("torch_pruning").setLevel(logging.ERROR)
    model, inputs = copy.deepcopy(model), graph.example()
    heads = {m: graph.width[n].size for n, m in model.named_modules() if _makes_heads(graph, n)}
    importances = {
        "norm": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2),  # GroupNorm's name in 1.6
        "L1": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=1, group_reduction="first", normalizer=None),
        "random": lambda: torch_pruning.importance.RandomImportance(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.MetaPruner(
            model,
            inputs,
            importance=importances[ranking.by](),
            global_pruning=ranking.everywhere,
            pruning_ratio=share,
            iterative_steps=steps,
            ignored_layers=_outputs(model, inputs),
            round_to=ranking.round_to,
            num_heads=heads,
            prune_num_heads=bool(heads),
            prune_head_dims=not heads,
        )
        for _ in range(steps):
            pruner.step()
            yield model


def _makes_heads(graph: Graph, name: str) -> bool:
    return name in graph.width and graph.width[name].structure == "head"


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[nn.Module]:
    """Return the layers that make the output: the last linear or convolution that runs."""
    order: list[nn.Module] = []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    hooks = [layer.register_forward_hook(lambda m, *_: order.append(m)) for layer in layers]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return order[-1:]


def kept_of(graph: Graph, model: nn.Module) -> Keep:
    """Return how many channels each width has in a pruned model: from a tensor axis that is of that width alone."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    keep = {}
    for width in graph.cuttable:
        whole = [s for s in width.slices if s.penalised and s.tensor in shapes and (s.units >= 0).all()]
        piece = whole[0]
        keep[width.name] = max(1, round(shapes[piece.tensor][piece.axis] * width.size / len(piece.units)))
    return keep


def paths(judge: Judge, posed: Problem) -> Iterator[tuple[str, list[Choice]]]:
    """Yield the rivals by name, each with the networks that it passes."""
    for name, keeps in _named(judge, posed):
        yield name, [judge.graph.choice(keep) for keep in keeps()]


def _named(judge: Judge, posed: Problem) -> Iterator[tuple[str, Callable[[], list[Keep]]]]:
    yield "uniform", partial(uniform, judge)
    yield "greedy, latency-saliency", partial(greedy, judge, posed)
    for round_to in (None, 8, 16):
        name = "GroupNorm" + (f", round_to {round_to}" if round_to else "")
        yield name, partial(group_norm, judge, posed, round_to=round_to)
