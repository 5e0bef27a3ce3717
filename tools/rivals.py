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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    knapsack, options = _Knapsack.of(judge, keep), posed.options()
    path: list[Keep] = [dict(keep)]
    gains = {name: knapsack.gain(keep, name, _below(keep[name], options[name])) for name in keep}
    while True:
        open_ = {name: ratio for name, ratio in gains.items() if ratio is not None}
        if not open_:
            return path
        worst = min(open_, key=lambda name: open_[name])
        below = _below(keep[worst], options[worst])
        knapsack.totals -= knapsack.freed(keep, worst, below)
        keep[worst] = below
        path.append(dict(keep))
        stale = keep if len(knapsack.totals) > 1 else knapsack.beside[worst]  # which sum is largest concerns all
        for name in stale:
            gains[name] = knapsack.gain(keep, name, _below(keep[name], options[name]))


def _below(count: int, options: Sequence[int]) -> int:
    return max((option for option in options if option < count), default=0)


@dataclass
class _Knapsack:
    """What every sum of the latency is, the largest of which counts, and whose terms a width changes."""

    judge: Judge
    totals: NDArray[np.float64]
    terms: Mapping[str, Sequence[Sequence[Term]]]  # by width, of each sum
    beside: Mapping[str, Collection[str]]  # widths that a width has terms in common with

    @classmethod
    def of(cls, judge: Judge, keep: Keep) -> "_Knapsack":
        """Begin with these widths."""
        sums, choice = judge.time.sums, judge.graph.choice(keep)
        totals = np.array([sum(term.under(choice) for term in own) for own in sums])
        terms = {n: [[term for term in own if n in widths_of(term.extents)] for own in sums] for n in keep}
        beside = {n: {m for t in own[0] for m in widths_of(t.extents) if m in keep} | {n} for n, own in terms.items()}
        return cls(judge, totals, terms, beside)

    def freed(self, keep: Keep, name: str, below: int) -> NDArray[np.float64]:
        """Return by how much each sum falls with a width."""
        now, then = self.judge.graph.choice(keep), self.judge.graph.choice({**keep, name: below})
        return np.array([sum(t.under(now) - t.under(then) for t in own) for own in self.terms[name]])

    def gain(self, keep: Keep, name: str, below: int) -> float | None:
        """Return the saliency that a narrower width loses per second that it frees; None if there is none narrower."""
        if not below:
            return None
        freed = float(self.totals.max() - (self.totals - self.freed(keep, name, below)).max())
        lost = float(self.judge.kept[name][keep[name]] - self.judge.kept[name][below])
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
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = _pruner("MetaPruner", model, graph, ranking, pruning_ratio=share, iterative_steps=steps)
        for _ in range(steps):
            pruner.step()
            yield model


def sparse_pruner(model: nn.Module, graph: Graph, ranking: Ranking) -> Any:
    """Return what adds torch-pruning's decay of weak groups to the gradients of `model`, by `regularize(model)`.

    It has the coefficient of torch-pruning's own recipe for ResNet-56 on CIFAR-10: --reg 5e-4 of
    https://github.com/VainF/Torch-Pruning, benchmarks/scripts/prune/cifar/group_pruner.sh.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _pruner("GroupNormPruner", model, graph, ranking, reg=5e-4)


def _pruner(kind: str, model: nn.Module, graph: Graph, ranking: Ranking, **options: object) -> Any:
    import torch_pruning  # a test extra

    logging.getLogger("torch_pruning").setLevel(logging.ERROR)
    inputs = graph.example()
    heads = {m: graph.width[n].size for n, m in model.named_modules() if _makes_heads(graph, n)}
    importances = {
        "norm": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2),  # GroupNorm's name in 1.6
        "L1": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=1, group_reduction="first", normalizer=None),
        "random": lambda: torch_pruning.importance.RandomImportance(),
    }
    return getattr(torch_pruning.pruner, kind)(
        model,
        inputs,
        importance=importances[ranking.by](),
        global_pruning=ranking.everywhere,
        ignored_layers=_outputs(model, inputs),
        round_to=ranking.round_to,
        num_heads=heads,
        prune_num_heads=bool(heads),
        prune_head_dims=not heads,
        **options,
    )


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
