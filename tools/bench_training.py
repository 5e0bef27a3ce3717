"""Compare ways to reach one plan, at equal epochs: WGSEF in both forms, group lasso, one cut, and random channels.

    python tools/bench_training.py [--seeds 5] [--epochs 8] [--json]

Handwritten digits, a small residual network, a quarter of every inner width (uniform, so that only training differs).
All methods start from the same dense weights of a seed, and end on the same budget: the support is fixed half way, and
what is left trains on. Printed are the mean and the standard deviation over seeds of the accuracy on test images of the
rebuilt model, of the accuracy right after the support is fixed, and the share of runs whose support met the budget
by itself, before it was made exact.
"""

import copy
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import planner
from backends import rebuild
from planner import Plan, Recipe, envelope
from planner.pools import Pools, pools
from planner.prox import Schedule
from planner.search import per_width_pools
from planner.spec import BlockPlan, InputSpec, Prediction, Proof, WidthPlan
from tools.batches import Data
from tools.examples import digits
from tools.examples.resnet import ResNet

Shrink = Callable[[Tensor, float, Pools], Tensor]  # norms (m,), step size, pools -> factors (m,)


def convex(norms: Tensor, step: float, state: Pools) -> Tensor:
    """Return the factors of the prox of WGSEF."""
    return envelope.scale(norms, step, state.a, state.d, state.k, pool=state.pool)


def debiased(norms: Tensor, step: float, state: Pools) -> Tensor:
    """Return the factors of the prox of the de-biased WGSEF."""
    return envelope.scale(norms, step, state.a, state.d, state.k, pool=state.pool, debiased=True)


def lasso(norms: Tensor, step: float, state: Pools) -> Tensor:
    """Return the factors of the group lasso's prox, its strength relative to the mean norm of the pool."""
    means = torch.zeros(len(state.k)).scatter_reduce_(0, state.pool, norms, "mean", include_self=False)
    return (1 - step * means[state.pool] / norms.clamp_min(1e-30)).clamp_min(0)


def untouched(norms: Tensor, step: float, state: Pools) -> Tensor:
    """Return ones: nothing shrinks before the cut."""
    return torch.ones_like(norms)


@dataclass(frozen=True)
class Method:
    """How groups are shrunk, by what they are ranked at the cut, and when that is."""

    name: str
    shrink: Shrink
    cut_at: float = 0.5  # of all steps
    random: bool = False


METHODS = (
    Method("WGSEF de-biased", debiased),
    Method("WGSEF convex", convex),
    Method("group lasso, then cut", lasso),
    Method("top-k cut at the start", untouched, cut_at=0.0),
    Method("random cut at the start", untouched, cut_at=0.0, random=True),
)


@dataclass(frozen=True)
class Result:
    """One run."""

    method: str
    seed: int
    dense: float
    at_cut: float
    rebuilt: float
    met_budget: bool  # before the support was made exact


def quarter(model: nn.Module, inputs: tuple[Tensor, ...]) -> Plan:
    """Return the plan that keeps a quarter of every width inside blocks."""
    graph = planner.trace(model, inputs)
    widths = tuple(
        WidthPlan(name=w.name, dense=w.size, keep=w.size // 4, considered=(w.size // 4, w.size), cost_s=0.0)
        for w in graph.cuttable
        if not w.is_stream
    )
    blocks = tuple(BlockPlan(name=b.name, removed=False) for b in graph.blocks)
    choice = graph.choice({w.name: w.keep for w in widths})
    macs, dense_macs = graph.macs(choice), graph.macs(graph.dense)
    share = macs / dense_macs
    return Plan(
        profile="none",
        fingerprint=graph.fingerprint,
        inputs=tuple(InputSpec(shape=shape, dtype=dtype) for shape, dtype in graph.inputs),
        target_fraction=share,
        widths=widths,
        blocks=blocks,
        pools=per_width_pools(widths, blocks),
        importance="none",
        predicted=Prediction(
            basis="rules", dense_s=None, latency_s=None, fraction=share, macs=macs, dense_macs=dense_macs
        ),
        proof=Proof(status="given", objective=0.0, bound=0.0, gap=0.0),
    )


def trained(method: Method, dense: nn.Module, plan: Plan, data: Data, recipe: Recipe, seed: int) -> Result:
    """Train a copy of `dense` by `method` and rebuild it."""
    model = copy.deepcopy(dense)
    state = pools(plan, model, plan.graph(model))
    parameters = dict(model.named_parameters())
    steps = recipe.epochs * len(data.train)
    shrinking = max(1, round(steps * method.cut_at))
    schedule, kept = Schedule(shrinking), torch.ones_like(state.pool, dtype=torch.bool)
    at_cut, met, taken = 0.0, False, 0

    def after_step(*_: object) -> None:
        nonlocal taken, kept, at_cut, met
        taken += 1
        with torch.no_grad():
            norms = state.groups.norms(parameters)
            if taken < shrinking:
                state.groups.scale_(parameters, method.shrink(norms, schedule.step_size(taken), state))
                return
            if taken == shrinking:
                met = bool((state.costs(norms > 0) <= state.k).all())
                generator = torch.Generator().manual_seed(seed)
                kept = state.select(torch.rand(len(norms), generator=generator) if method.random else norms)
            state.groups.scale_(parameters, kept.to(norms.dtype))
        if taken == shrinking:
            at_cut = planner.accuracy(model, data.test)

    loop(model, data, recipe, after_step)
    rebuilt = planner.accuracy(rebuild(plan, model), data.test)
    return Result(method.name, seed, planner.accuracy(dense, data.test), at_cut, rebuilt, met)


def loop(model: nn.Module, data: Data, recipe: Recipe, after_step: Callable[..., None] | None) -> None:
    """Train as planner.fit does, with another step after the optimizer's."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True
    )
    if after_step is not None:
        optimizer.register_step_post_hook(after_step)
    steps = recipe.epochs * len(data.train)
    for epoch in range(recipe.epochs):
        data.train.set_epoch(epoch)
        for index, (x, y) in enumerate(data.train):
            model.train()
            optimizer.param_groups[0]["lr"] = recipe.rate(epoch * len(data.train) + index, steps)
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    epochs: Annotated[int, typer.Option(min=2, help="of every method, after the dense ones")] = 8,
    dense_epochs: Annotated[int, typer.Option(min=1)] = 6,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Run every method on every seed and print the table."""
    results: list[Result] = []
    inputs = (torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)),)
    for seed in track(range(seeds), "seeds", console=Console(stderr=True)):
        data = digits.data()
        data.train.seed = seed
        dense = ResNet(1, (32, 64, 96), channels=1, seed=seed).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        loop(dense, data, Recipe(dense_epochs), None)
        plan = quarter(dense, inputs)
        results += [trained(method, dense, plan, data, Recipe(epochs, lr=0.02), seed) for method in METHODS]
    if as_json:
        sys.stdout.write(json.dumps([vars(result) for result in results], indent=1) + "\n")
        return
    table = Table("method", "rebuilt %", "right after the cut %", "budget met by itself", box=None)
    table.add_row("dense", _spread([r.dense for r in results if r.method == METHODS[0].name]), "", "")
    for method in METHODS:
        own = [r for r in results if r.method == method.name]
        met = f"{sum(r.met_budget for r in own)} of {len(own)}"
        table.add_row(method.name, _spread([r.rebuilt for r in own]), _spread([r.at_cut for r in own]), met)
    Console(width=100).print(table)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * deviation:.2f}"


if __name__ == "__main__":
    typer.run(main)
