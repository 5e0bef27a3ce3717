"""Compare ways to reach one plan, at equal epochs: WGSEF in both forms, group lasso, one cut, and random channels.

    python tools/bench_training.py [--seeds 5] [--epochs 8] [--json]
    python tools/bench_training.py --data FOLDER --weights resnet20.safetensors --keep 0.5 --epochs 6 --lr 0.04

Handwritten digits and a small residual network that is trained here first, or CIFAR-10 in its binary layout and
ResNet-20 with published weights; the same share of every inner width is kept, so that only training differs. All
methods start from the same dense weights of a seed, and end on the same budget: the support is fixed half way, and what
is left trains on. Printed are the mean and the standard deviation over seeds of the accuracy on test images of the
rebuilt model and of the accuracy right after the support is fixed, and how many groups had to be cut to fix it.

With `--log` every run is added to a file as it ends, and runs that the file holds already are not run again.
"""

import copy
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import planner
from backends import rebuild
from backends.weights import load_into_, read
from planner import Plan, Recipe, envelope
from planner.pools import Pools, pools
from planner.prox import Schedule
from profiles.errors import EspalierError
from tools.batches import Data
from tools.examples import cifar10, digits
from tools.examples.resnet import ResNet
from tools.given import given

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
    decays: bool = True  # weight decay on penalised weights; the convex envelope shrinks them already

    def select(self, cut: "Cutting", norms: Tensor) -> Tensor:
        """Return the groups to keep, (m,) bool."""
        generator = torch.Generator().manual_seed(cut.start.seed)
        return cut.state.select(torch.rand(len(norms), generator=generator) if self.random else norms)

    def before_step(self, cut: "Cutting") -> Callable[..., None] | None:
        """Return what is done to the gradients before each step of the optimizer, if anything."""
        return None


METHODS = (
    Method("WGSEF de-biased", debiased),
    Method("WGSEF convex", convex, decays=False),
    Method("group lasso, then cut", lasso),
    Method("top-k cut at the start", untouched, cut_at=0.0),
    Method("random cut at the start", untouched, cut_at=0.0, random=True),
)


@dataclass(frozen=True)
class Start:
    """What all methods of a seed share."""

    dense: nn.Module
    plan: Plan
    data: Data
    seed: int


@dataclass(frozen=True)
class Result:
    """One run."""

    method: str
    seed: int
    dense: float
    at_cut: float
    rebuilt: float
    cut_groups: int  # that were not zero when the support was fixed
    kept_groups: int


def uniform(model: nn.Module, inputs: tuple[Tensor, ...], *, keep: float) -> Plan:
    """Return the plan that keeps this share of every width inside blocks."""
    graph = planner.trace(model, inputs)
    inner = [width for width in graph.cuttable if not width.is_stream]
    return given(graph, {width.name: max(1, round(width.size * keep)) for width in inner})


def quarter(model: nn.Module, inputs: tuple[Tensor, ...]) -> Plan:
    """Return the plan that keeps a quarter of every width inside blocks."""
    return uniform(model, inputs, keep=0.25)


Watch = Callable[[nn.Module], None]


class Cutting:
    """What comes after every step of the optimizer: groups shrink until the support is fixed, and then hold it.

    `before` and `after` are called with the model right before and right after that.
    """

    def __init__(
        self, method: Method, start: Start, steps: int, *, before: Watch = lambda _: None, after: Watch = lambda _: None
    ) -> None:
        """Prepare to train a copy of the dense model for so many steps."""
        self.method, self.start, self.model = method, start, copy.deepcopy(start.dense)
        self.state = pools(start.plan, self.model, start.plan.graph(self.model))
        self.schedule = Schedule(max(1, round(steps * method.cut_at)))
        self.kept = torch.ones_like(self.state.pool, dtype=torch.bool)
        self.cut_groups = self.taken = 0  # that were not zero when the support was fixed
        self._parameters = dict(self.model.named_parameters())
        self._before, self._after = before, after

    @torch.no_grad()
    def __call__(self, *_: object) -> None:
        """Take the step."""
        self.taken += 1
        if self.taken <= self.schedule.steps:
            self._scale_(self.method.shrink(self._norms(), self.schedule.step_size(self.taken), self.state))
        if self.taken == self.schedule.steps:
            self._before(self.model)
            norms = self._norms()
            self.kept = self.method.select(self, norms)
            self.cut_groups = int(((norms > 0) & ~self.kept).sum())
        if self.taken >= self.schedule.steps:
            self._scale_(self.kept.to(torch.float32))
        if self.taken == self.schedule.steps:
            self._after(self.model)

    def _norms(self) -> Tensor:
        return self.state.groups.norms(self._parameters)

    def _scale_(self, factors: Tensor) -> None:
        self.state.groups.scale_(self._parameters, factors)

    def train(self, recipe: Recipe) -> nn.Module:
        """Train, and return the model with its zeros."""
        spared = {member.tensor for member in self.state.groups.members if not self.method.decays}
        before = self.method.before_step(self)
        loop(self.model, self.start.data, recipe, self, before_step=before, spared=spared)
        return self.model


def trained(method: Method, start: Start, recipe: Recipe) -> Result:
    """Train a copy of the dense model by `method` and rebuild it."""
    found: list[float] = []

    def look(model: nn.Module) -> None:
        found.append(planner.accuracy(model, start.data.test))

    cutting = Cutting(method, start, recipe.epochs * len(start.data.train), after=look)
    look(start.dense)
    look(rebuild(start.plan, cutting.train(recipe)))
    dense, at_cut, rebuilt = found
    return Result(method.name, start.seed, dense, at_cut, rebuilt, cutting.cut_groups, int(cutting.kept.sum()))


def loop(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    after_step: Callable[..., None] | None,
    *,
    before_step: Callable[..., None] | None = None,
    spared: Set[str] = frozenset(),
) -> None:
    """Train as planner.fit does, with other steps around the optimizer's, and no weight decay on `spared`."""
    named = dict(model.named_parameters())
    decayed = [{"params": [p for n, p in named.items() if n not in spared]}]
    plain = [{"params": [named[n] for n in sorted(spared)], "weight_decay": 0.0}] if spared else []
    optimizer = torch.optim.SGD(
        decayed + plain, lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True
    )
    if after_step is not None:
        optimizer.register_step_post_hook(after_step)
    if before_step is not None:
        optimizer.register_step_pre_hook(before_step)
    steps = recipe.epochs * len(data.train)
    for epoch in range(recipe.epochs):
        data.train.set_epoch(epoch)
        for index, (x, y) in enumerate(data.train):
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(epoch * len(data.train) + index, steps)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                value = nn.functional.cross_entropy(model(x), y)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


@dataclass(frozen=True)
class Setting:
    """What runs of one table have in common; with it they are told from others in a log."""

    data: str
    weights: str
    keep: float
    dense_epochs: int
    recipe: Recipe

    def start(self, seed: int, folder: Path | None, weights: Path | None) -> Start:
        """Return the dense model of a seed: with published weights, or trained here."""
        if folder is not None:
            os.environ[cifar10.FOLDER] = str(folder)
        data = digits.data() if folder is None else cifar10.data()
        data.train.seed = seed
        model = ResNet(1, (32, 64, 96), channels=1, seed=seed) if folder is None else cifar10.resnet20()
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
        if weights is None:
            loop(model, data, Recipe(self.dense_epochs, bfloat16=self.recipe.bfloat16), None)
        else:
            load_into_(model, read(weights), weights)
        shape = (1, *next(iter(data.test))[0].shape[1:])
        inputs = (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)
        return Start(model, uniform(model, inputs, keep=self.keep), data, seed)


def logged(path: Path | None, setting: Setting) -> list[Result]:
    """Return the runs of this setting in a log, which need not exist; raises EspalierError if it is no such file."""
    if path is None or not path.exists():
        return []
    results = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            entry = json.loads(line)
            result = Result(**entry["result"])
            if entry["setting"] == asdict(setting):
                results.append(result)
        except (ValueError, KeyError, TypeError) as error:
            raise EspalierError(
                f"{path}:{number} is not a run of this benchmark ({error!r}); remove the line"
            ) from error
    return results


def log_(path: Path | None, setting: Setting, result: Result) -> None:
    """Add a run to the log."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps({"setting": asdict(setting), "result": asdict(result)}) + "\n")


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    epochs: Annotated[int, typer.Option(min=2, help="of every method, after the dense ones")] = 8,
    dense_epochs: Annotated[int, typer.Option(min=1, help="without --weights")] = 6,
    lr: Annotated[float, typer.Option(min=0)] = 0.02,
    keep: Annotated[float, typer.Option(min=0, max=1, help="share of every inner width")] = 0.25,
    data: Annotated[Path | None, typer.Option(help="folder of CIFAR-10, else the digits")] = None,
    weights: Annotated[Path | None, typer.Option(help="safetensors to start from")] = None,
    bfloat16: Annotated[bool, typer.Option(help="autocast the forward pass")] = False,
    log: Annotated[Path | None, typer.Option(help="JSON lines, one per run; runs in it are kept")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Run every method on every seed and print the table."""
    about = ("digits" if data is None else "CIFAR-10", "trained here" if weights is None else weights.name)
    setting = Setting(*about, keep, dense_epochs if weights is None else 0, Recipe(epochs, lr=lr, bfloat16=bfloat16))
    results = [result for result in logged(log, setting) if result.seed < seeds]
    console = Console(stderr=True)
    for seed in range(seeds):
        missing = [m for m in METHODS if (m.name, seed) not in {(r.method, r.seed) for r in results}]
        start = setting.start(seed, data, weights) if missing else None
        for method in missing:
            assert start is not None
            results.append(trained(method, start, setting.recipe))
            log_(log, setting, results[-1])
            console.print(f"seed {seed}, {method.name}: {100 * results[-1].rebuilt:.2f} %")
    if as_json:
        sys.stdout.write(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    else:
        Console(width=100).print(table(results))


def table(results: Sequence[Result]) -> Table:
    """Return the table of all methods."""
    rows = Table("method", "rebuilt %", "right after the cut %", "groups cut", "kept", box=None)
    rows.add_row("dense", _spread([r.dense for r in results if r.method == METHODS[0].name]), "", "", "")
    for method in METHODS:
        own = [r for r in results if r.method == method.name]
        cut = f"{statistics.mean(r.cut_groups for r in own):.1f}"
        kept = " ".join(sorted({str(r.kept_groups) for r in own}))
        rows.add_row(method.name, _spread([r.rebuilt for r in own]), _spread([r.at_cut for r in own]), cut, kept)
    return rows


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * deviation:.2f}"


if __name__ == "__main__":
    typer.run(main)
