"""How long plans take, how they compare with what people prune with, and whether networks are as fast as planned.

    python tools/bench_planner.py [--only times,rivals] [--json FILE]
    python tools/bench_planner.py --only rivals --networks ResNet-56 --table table.json [--evidence]
    python tools/bench_planner.py --truth FILE [--networks resnet20] [--runtimes onnxruntime] [--plans 1]

*Times*: tables at hand, one thread. Costs come from the documented rules of a profile and losses are drawn at random,
as the solver does not know the difference; each network is traced once before. *Rivals*: the importance that is kept
at an equal predicted latency, or measured with --table; see tools/rivalry.py and tools/rivals.py. Norms of weights are
drawn with a spread as training leaves it.
*Truth*: see tools/truth.py; every network is rebuilt, compiled and timed, the file is a log that a later call goes on
with. Exit 1 if a limit is missed.
"""

import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import planner
import profiles
from planner import Importance, LatencyTable, Limits, Problem, Scope
from planner.search import devices_of
from profiles import atomic
from tools import rivalry
from tools.console import Stage
from tools.evidence.record import add
from tools.examples import imagenet
from tools.rivalry import Kept, Make
from tools.threads import one_thread

PROFILE = "x86_64_v4.onnxruntime.fp32"
OTHERS = ("x86_64_v3.openvino.fp32", "aarch64.xnnpack.fp32")
BUDGETS = (0.3, 0.5, 0.8)
SWEEP = (0.35, 0.45, 0.55, 0.65, 0.75)
EXACT: dict[str, Make] = {
    "ResNet-50": imagenet.resnet50,
    "MobileNetV2": imagenet.mobilenet_v2,
    "ViT-B/16": imagenet.vit_b16,
}
LARGE: dict[str, Make] = {"ResNet-152": imagenet.resnet152, "DenseNet-201": imagenet.densenet201}
EXACT_S, LARGE_S, LARGE_GAP, DEVICES, POINT_S = 10.0, 60.0, 0.005, 3.0, 2.0
TURNS = 5  # of plans for one device and for three, of which the middle ones count: they take tenths of a second
COMMAND = "python tools/bench_planner.py --only rivals --networks N --table T"
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
        turns = [[own.fresh().time("", budget, limit_s=None) for own in (clock, several)] for _ in range(TURNS)]
        alone, together = (sorted(own, key=lambda row: row.seconds)[TURNS // 2] for own in zip(*turns, strict=True))
        what = f"three devices, latency {budget:g} each; one takes {alone.seconds:.2f} s"
        yield replace(together, what=what, limit_s=DEVICES * alone.seconds)
    for name, make in LARGE.items():
        clock = Clock.of(name, make, gap=LARGE_GAP)
        for budget in BUDGETS:
            yield clock.fresh().time(f"latency {budget:g}", budget, limit_s=LARGE_S)


def _time_table(rows: Sequence[Timed]) -> Table:
    table = Table("network", "plan", "seconds", "limit", "gap", "solver", box=None)
    table.title = f"rules of {PROFILE}, losses drawn at random, one thread"
    for row in rows:
        limit = "" if row.limit_s is None else f"{row.limit_s:.1f}"
        mark = "" if row.holds else " missed"
        table.add_row(row.network, row.what, f"{row.seconds:.2f}", limit + mark, f"{row.gap:.4f}", row.status)
    return table


def _rivals(networks: str, table: Path | None) -> list[Kept]:
    """Compare on networks at predicted latencies, or on one at measured ones, with its latency table."""
    names = networks.split(",") if networks else list(rivalry.NETWORKS)
    if table is not None:
        known = LatencyTable.load(table)
        with Stage(console).phase(f"{names[0]}: build and time") as phase, one_thread():
            return list(rivalry.Contest.of(names[0], known.profile, known).measured(progress=phase.step))
    kept = []
    for network in names:
        for profile in (PROFILE, OTHERS[1]):
            kept += list(rivalry.Contest.of(network, profile).predicted())
            console.print(f"{network} on {profile}: {len(kept)} rows", highlight=False)
    return kept


def main(
    only: Annotated[str, typer.Option(help="times, rivals, or both joined by a comma")] = "times,rivals",
    truth: Annotated[
        Path | None, typer.Option(help="rebuild and measure plans; the log to write and go on with")
    ] = None,
    networks: Annotated[str, typer.Option(help="of --truth or the rivals, joined by commas")] = "",
    table: Annotated[
        Path | None, typer.Option(help="the rivals at measured latency, on one network: its table from calibrate")
    ] = None,
    runtimes: Annotated[str, typer.Option(help="of --truth, joined by commas")] = "onnxruntime,openvino,executorch",
    plans: Annotated[int, typer.Option(min=1, help="how many plans more --truth measures in this call")] = 40,
    json_: Annotated[Path | None, typer.Option("--json", help="write all rows here")] = None,
    evidence: Annotated[bool, typer.Option("--evidence", help="add --table's rows to evidence/rivals.json")] = False,
) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    if evidence and (table is None or "rivals" not in only):
        raise typer.BadParameter("--evidence is for the rivals at measured latency; give --only rivals --table FILE")
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
        kept = _rivals(networks, table)
        shown, better = rivalry.told(kept, "predicted" if table is None else "measured")
        out.print(shown, highlight=False)
        good, rows["rivals"] = good and better, [asdict(row) for row in kept]
        if evidence:
            key = ("network", "profile", "budget", "rival")
            add("rivals", rows["rivals"], command=f"{COMMAND} --evidence", key=key)
    if json_ is not None:
        atomic.write_text(json_, json.dumps(rows, indent=1) + "\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    typer.run(main)
