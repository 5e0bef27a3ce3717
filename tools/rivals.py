"""What people prune with today, given the planner's own latency table and importance: widths within a budget.

Each rival returns numbers of channels, and is scored as if it had kept the best channels of each width; residual blocks
stay. *Uniform* narrows every width by one ratio. *GroupNorm* is torch-pruning's global ranking of group norms, with and
without rounding. *Greedy* is a latency-saliency knapsack in the way of HALP (Shen et al. 2022): again and again the run
of channels, down to the device's next step, that loses the least saliency for the latency that it frees.
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
from planner.resources import Resource, Term, widths_of
from planner.structures import Filter

STEPS = 48  # of torch-pruning's iterative pruning: each is a network that it passes on its way
Keep = Mapping[str, int]


@dataclass(frozen=True)
class Judge:
    """The importance and the latency of any widths, from what the planner itself goes by."""

    graph: Graph
    time: Resource
    kept: Mapping[str, NDArray[np.float64]]  # of each width, the importance that its best n channels keep, n from 0

    @classmethod
    def of(cls, posed: Problem) -> "Judge":
        """Return the judge of a problem: kept is the share of the squared norm of a width's channels."""
        parameters, kept = dict(posed.model.named_parameters()), {}
        for width in posed.graph.cuttable:
            squares = group([Filter(width)], posed.model).norms(parameters).double().square()
            share = squares.sort(descending=True).values.cumsum(0) / squares.sum().clamp_min(1e-30)
            kept[width.name] = np.concatenate([[0.0], share.numpy()])
        return cls(posed.graph, posed.times[posed.profile.id], kept)

    @property
    def dense_s(self) -> float:
        """The latency of the dense network."""
        return self.time.under(self.graph.dense)

    def latency(self, keep: Keep) -> float:
        """Return the latency as a fraction of the dense one."""
        return self.time.under(self.graph.choice(keep)) / self.dense_s

    def importance(self, keep: Keep) -> float:
        """Return the mean share of importance that the widths keep."""
        return float(np.mean([self.kept[name][count] for name, count in keep.items()]))

    def measured(self, options: Mapping[str, Sequence[int]]) -> Importance:
        """Return the same for the planner: what cutting each candidate alone costs."""
        losses = {n: {c: max(0.0, 1 - float(self.kept[n][c])) for c in counts} for n, counts in options.items()}
        return Importance("magnitude", losses, {}, {})

    def best_within(self, path: Sequence[Keep], budget: float) -> Keep | None:
        """Return, of the networks on a path, the one within the budget that keeps most."""
        fitting = [keep for keep in path if self.latency(keep) <= budget * (1 + 1e-9)]
        return max(fitting, key=self.importance, default=None)


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
    import torch_pruning  # a test extra

    logging.getLogger("torch_pruning").setLevel(logging.ERROR)
    model = copy.deepcopy(posed.model)
    inputs = posed.graph.example()
    heads = {m: posed.graph.width[n].size for n, m in model.named_modules() if _makes_heads(posed.graph, n)}
    path: list[Keep] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.MetaPruner(
            model,
            inputs,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),  # GroupNorm's name in 1.6
            global_pruning=True,
            pruning_ratio=0.98,
            iterative_steps=STEPS,
            ignored_layers=_outputs(model, inputs),
            round_to=round_to,
            num_heads=heads,
            prune_num_heads=bool(heads),
            prune_head_dims=not heads,
        )
        for _ in range(STEPS):
            pruner.step()
            path.append(_read(posed.graph, model))
    return path


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


def _read(graph: Graph, model: nn.Module) -> Keep:
    """Return how many channels each width has in a pruned model: from a tensor axis that is of that width alone."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    keep = {}
    for width in graph.cuttable:
        whole = [s for s in width.slices if s.penalised and s.tensor in shapes and (s.units >= 0).all()]
        piece = whole[0]
        keep[width.name] = max(1, round(shapes[piece.tensor][piece.axis] * width.size / len(piece.units)))
    return keep


def paths(judge: Judge, posed: Problem) -> Iterator[tuple[str, Callable[[], list[Keep]]]]:
    """Return the rivals by name, each to be asked once for the networks that it passes."""
    yield "uniform", partial(uniform, judge)
    yield "greedy, latency-saliency", partial(greedy, judge, posed)
    for round_to in (None, 8, 16):
        name = "GroupNorm" + (f", round_to {round_to}" if round_to else "")
        yield name, partial(group_norm, judge, posed, round_to=round_to)
