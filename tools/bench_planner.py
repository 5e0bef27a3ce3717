"""How long plans take, how they compare with what people prune with, and whether networks are as fast as planned.

    python tools/bench_planner.py [--only times,rivals] [--json FILE]
    python tools/bench_planner.py --truth FILE [--networks resnet20] [--runtimes onnxruntime] [--plans 1]

*Times*: tables at hand, one thread. Costs come from the documented rules of a profile and losses are drawn at random,
as the solver does not know the difference; each network is traced once before. *Rivals*: the importance that is kept
at an equal predicted latency, see tools/rivals.py; norms of weights are drawn with a spread as training leaves it.
*Truth*: see tools/truth.py; every network is rebuilt, compiled and timed, the file is a log that a later call goes on
with. Exit 1 if a limit is missed.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import planner
import profiles
from planner import Importance, Limits, Problem, Scope
from planner.search import devices_of
from profiles import atomic
from profiles.errors import PlanError
from tools import rivals
from tools.examples import cifar10, imagenet

PROFILE = "x86_64_v4.onnxruntime.fp32"
OTHERS = ("x86_64_v3.openvino.fp32", "aarch64.xnnpack.fp32")
BUDGETS = (0.3, 0.5, 0.8)
SWEEP = (0.35, 0.45, 0.55, 0.65, 0.75)
Make = Callable[[], nn.Module]
EXACT: dict[str, Make] = {
    "ResNet-50": imagenet.resnet50,
    "MobileNetV2": imagenet.mobilenet_v2,
    "ViT-B/16": imagenet.vit_b16,
}
LARGE: dict[str, Make] = {"ResNet-152": imagenet.resnet152, "DenseNet-201": imagenet.densenet201}
EXACT_S, LARGE_S, LARGE_GAP, DEVICES, POINT_S = 10.0, 60.0, 0.005, 3.0, 2.0
RIVALRY: dict[str, tuple[Make, tuple[int, int, int]]] = {
    "ResNet-20": (cifar10.resnet20, (3, 32, 32)),
    "ResNet-56": (cifar10.resnet56, (3, 32, 32)),
    "ResNet-18": (imagenet.resnet18, (3, 224, 224)),
    "MobileNetV2": (imagenet.mobilenet_v2, (3, 224, 224)),
}
RIVAL_BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
console = Console(stderr=True)


@dataclass(frozen=True)
class Timed:
    """One plan."""

    network: str
    what: str
    seconds: float
    gap: float
    status: str
    limit_s: float | None  # None: only an ingredient of another row
    limit_gap: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the limits are kept."""
        return self.limit_s is None or (self.seconds <= self.limit_s and self.gap <= self.limit_gap + 1e-9)


def posed(make: Make, *, devices: Sequence[str] = (PROFILE,)) -> Problem:
    """Return the problem of a network of 224x224 images, on the meta device: only shapes matter."""
    with torch.device("meta"):
        model, inputs = make().eval(), (torch.ones(1, 3, 224, 224),)
    wanted = devices_of(dict.fromkeys(devices, 0.5), profiles.load(PROFILE))
    return planner.problem(model, inputs, wanted[0], devices=wanted, scope=Scope(lossy=True))


def drawn(problem: Problem, *, seed: int = 0) -> Importance:
    """Return losses that rise ever faster as a width shrinks, of another size and curvature for every width."""
    dice, graph, widths = random.Random(seed), problem.graph, {}
    for name, counts in problem.options().items():
        scale, power = dice.lognormvariate(-2, 1), dice.uniform(1.2, 3)
        widths[name] = {count: scale * (1 - count / graph.width[name].size) ** power for count in counts}
    free = [block for block in graph.blocks if not block.frozen]
    blocks = {block.name: dice.lognormvariate(-2, 1) for block in free}
    return Importance("drawn", widths, blocks, {block.stage: dice.lognormvariate(-3, 1) for block in free})


@dataclass(frozen=True)
class Clock:
    """Times plans of one problem under its importance."""

    network: str
    problem: Problem
    importance: Importance
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def of(cls, network: str, make: Make, *, gap: float = 0.0, devices: Sequence[str] = (PROFILE,)) -> "Clock":
        """Pose the problem of a network."""
        problem = posed(make, devices=devices)
        return cls(network, problem, drawn(problem), Limits(gap=gap))

    def fresh(self) -> "Clock":
        """Return the same without what earlier plans left."""
        own = self.problem
        return replace(self, problem=Problem(own.model, own.graph, own.profile, own.scope, own.costs))

    def time(self, what: str, budget: float, *, limit_s: float | None) -> Timed:
        """Plan for one budget, the same on every device."""
        start = time.process_time()
        latency = dict.fromkeys(self.problem.costs, budget)
        proof = self.problem.solve(latency, self.limits, importance=self.importance).proof
        seconds = time.process_time() - start
        return Timed(self.network, what, seconds, proof.gap, proof.status, limit_s, self.limits.gap)


def times() -> Iterator[Timed]:
    """Time plans of every network, along a sweep, and for several devices at once."""
    for name, make in EXACT.items():
        clock = Clock.of(name, make)
        for budget in BUDGETS:
            yield clock.fresh().time(f"latency {budget:g}", budget, limit_s=EXACT_S)
    clock = Clock.of("ResNet-50", imagenet.resnet50)
    clock.time("", BUDGETS[0], limit_s=None)
    for budget in SWEEP:
        yield clock.time(f"a sweep's point, {budget:g}", budget, limit_s=POINT_S)
    several = Clock.of("ResNet-50", imagenet.resnet50, devices=(PROFILE, *OTHERS))
    for budget in BUDGETS:
        alone = clock.fresh().time("", budget, limit_s=None).seconds
        what = f"three devices, latency {budget:g} each; one takes {alone:.2f} s"
        yield several.fresh().time(what, budget, limit_s=DEVICES * alone)
    for name, make in LARGE.items():
        clock = Clock.of(name, make, gap=LARGE_GAP)
        for budget in BUDGETS:
            yield clock.fresh().time(f"latency {budget:g}", budget, limit_s=LARGE_S)


@dataclass(frozen=True)
class Kept:
    """The importance that a rival and the planner keep at one budget."""

    network: str
    profile: str
    budget: float
    rival: str
    ours: float
    theirs: float | None  # None: it cannot reach the budget

    @property
    def gain(self) -> float:
        """Return how much more the planner keeps, relative."""
        return self.ours / self.theirs - 1 if self.theirs else float("inf")


def spread(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Draw how strong each output channel of each layer is: of random weights all are alike, of trained ones not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
                for parameter in module.parameters(recurse=False):
                    wide = torch.rand((), generator=generator)  # of this layer
                    factor = (torch.randn(len(parameter), generator=generator) * wide).exp()
                    parameter.mul_(factor.view(-1, *[1] * (parameter.dim() - 1)))
    return model


def compared(network: str, profile: str) -> Iterator[Kept]:
    """Compare the planner with each rival on one network and device."""
    make, shape = RIVALRY[network]
    scope = Scope(removes_blocks=False, lossy=True)
    problem = planner.problem(spread(make()).eval(), (torch.ones(1, *shape),), profiles.load(profile), scope=scope)
    judge = rivals.Judge.of(problem)
    importance = judge.measured(problem.options())
    found = {}
    for budget in RIVAL_BUDGETS:
        try:
            found[budget] = judge.importance(problem.solve(budget, importance=importance).choice.keep)
        except PlanError:
            continue
    for name, path in rivals.paths(judge, problem):
        passed = path()
        for budget, ours in found.items():
            keep = judge.best_within(passed, budget)
            yield Kept(network, profile, budget, name, ours, None if keep is None else judge.importance(keep))


def _rival_table(rows: Sequence[Kept]) -> tuple[Table, bool]:
    table = Table("rival", "plans", "not reached", "lowest gain", "median gain", "median, budgets <= 0.5", box=None)
    good = True
    tight = [row.gain for row in rows if row.budget <= 0.5 and row.theirs is not None]
    for name in dict.fromkeys(row.rival for row in rows):
        own = [row for row in rows if row.rival == name and row.theirs is not None]
        missing = sum(row.theirs is None for row in rows if row.rival == name)
        half = [row.gain for row in own if row.budget <= 0.5]
        gains = [row.gain for row in own]
        good &= min(gains, default=0.0) >= -1e-9
        shown = [f"{value:+.1%}" for value in (min(gains), median(gains), median(half))] if half else ["", "", ""]
        table.add_row(name, str(len(own) + missing), str(missing), *shown)
    good &= bool(tight) and median(tight) >= 0.1
    table.caption = f"importance kept at equal predicted latency: median gain at budgets <= 0.5 {median(tight):+.1%}"
    return table, good


def _time_table(rows: Sequence[Timed]) -> Table:
    table = Table("network", "plan", "seconds", "limit", "gap", "solver", box=None)
    table.title = f"rules of {PROFILE}, losses drawn at random, one thread"
    for row in rows:
        limit = "" if row.limit_s is None else f"{row.limit_s:.1f}"
        mark = "" if row.holds else " missed"
        table.add_row(row.network, row.what, f"{row.seconds:.2f}", limit + mark, f"{row.gap:.4f}", row.status)
    return table


def main(
    only: Annotated[str, typer.Option(help="times, rivals, or both joined by a comma")] = "times,rivals",
    truth: Annotated[
        Path | None, typer.Option(help="rebuild and measure plans; the log to write and go on with")
    ] = None,
    networks: Annotated[str, typer.Option(help="of --truth or the rivals, joined by commas")] = "",
    runtimes: Annotated[str, typer.Option(help="of --truth, joined by commas")] = "onnxruntime,openvino,executorch",
    plans: Annotated[int, typer.Option(min=1, help="how many plans more --truth measures in this call")] = 40,
    json_: Annotated[Path | None, typer.Option("--json", help="write all rows here")] = None,
) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    if truth is not None:
        from tools.truth import run

        sys.exit(0 if run(truth, networks=networks, runtimes=runtimes, plans=plans, console=console) else 1)
    out, good, rows = Console(), True, dict[str, list[Mapping[str, object]]]()
    if "times" in only:
        found = []
        for row in times():
            console.print(f"{row.network}, {row.what}: {row.seconds:.2f} s, gap {row.gap:.4f}", highlight=False)
            found.append(row)
        out.print(_time_table(found), highlight=False)
        good, rows["times"] = all(row.holds for row in found), [asdict(row) for row in found]
    if "rivals" in only:
        kept = []
        for network in networks.split(",") if networks else RIVALRY:
            for profile in (PROFILE, OTHERS[1]):
                kept += list(compared(network, profile))
                console.print(f"{network} on {profile}: {len(kept)} rows", highlight=False)
        table, better = _rival_table(kept)
        out.print(table, highlight=False)
        good, rows["rivals"] = good and better, [asdict(row) for row in kept]
    if json_ is not None:
        atomic.write_text(json_, json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    typer.run(main)
