"""Accuracy against measured latency: every method's network at one measured latency, trained for equally long.

    python -m tools.evidence.accuracy --data FOLDER --weights resnet20.safetensors [--network resnet20] [--budgets 0.5]
        [--methods "one cut;WGSEF de-biased"] [--epochs 5] [--seeds 3] [--distil] [--until nets|runs|rows]

Three parts, each kept in --out and gone on with by a later call. *nets*: our plan and every other method's network are
tuned to one measured latency, see tools/evidence/nets.py (leave the machine alone meanwhile). *runs*: they are trained,
see tools/evidence/methods.py (several calls may run side by side, with other --methods). *rows*: all networks are built
for every runtime that is installed, each checked against PyTorch, and timed in turns with the dense one; rows go into
evidence/accuracy.json. With --held-out nothing is read of the test images: settings are chosen on the last 5,000
training images, which are then not trained on, and no rows are written.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy

import planner
from backends import installed
from backends.weights import load_into_, read
from planner import Recipe
from planner.spec import Strength
from profiles import atomic
from profiles.errors import EspalierError
from tools.batches import Data
from tools.bench_latency_model import NETWORKS, profile_for
from tools.calibrate import bench
from tools.console import Stage
from tools.contenders import Contender, built, rows, timed
from tools.distil import Distillation, Taught
from tools.evidence.methods import DECAYED, OURS, RANKED, Contest, Course, Trained
from tools.evidence.nets import ABLATIONS, RIVALS, SIBLING, Field, Net
from tools.evidence.record import add
from tools.examples import cifar10
from tools.examples.resnet import draw_weights_
from tools.planning import Brief
from tools.threads import one_thread

ALL = (*OURS, *RIVALS, DECAYED, SIBLING, *ABLATIONS)
HELD_OUT = 5000


class Until(StrEnum):
    """How far to go."""

    NETS = "nets"
    RUNS = "runs"
    ROWS = "rows"


@dataclass(frozen=True)
class Setting:
    """What the runs of one table have in common."""

    epochs: int
    lr: float
    sparse: float  # share of the steps in which groups shrink
    total: float  # the sum of the proximal step sizes
    anneal: float  # share of those steps in which budgets fall to the plan's
    distil: bool
    held_out: bool

    @property
    def recipe(self) -> Recipe:
        """How everything is trained."""
        return Recipe(self.epochs, lr=self.lr, sparse_fraction=self.sparse, bfloat16=True)


@dataclass(frozen=True)
class Arena:
    """One network on one runtime at one latency."""

    network: str
    budget: float
    dense: nn.Module
    data: Data
    field: Field

    @classmethod
    def of(cls, network: str, runtime: str, budget: float, weights: Path, out: Path) -> "Arena":
        """Open it; raises EspalierError if the runtime is not installed."""
        data, profile = cifar10.data(), profile_for(runtime)
        if profile is None:
            raise EspalierError(f"{runtime} is not installed; choose one of {', '.join(sorted(installed()))}")
        dense = drawn(network, 0)
        load_into_(dense, read(weights), weights)
        folder = out / network / runtime / f"{budget:g}"
        folder.mkdir(parents=True, exist_ok=True)
        inputs = (next(iter(data.train))[0][:1].contiguous(),)
        brief = Brief(dense, inputs, profile, budget, data.train)
        field = Field(brief, bench(dense, inputs, profile), Stage(Console(stderr=True)), folder)
        return cls(network, budget, dense, data, field)

    @cached_property
    def nets(self) -> dict[str, Net]:
        """The network of every method, or what it begins with if it finds its own in training."""
        _, ours = self.field.ours()
        rivals = {net.method: net for net in self.field.rivals()}
        return dict.fromkeys(OURS, ours) | rivals | {DECAYED: rivals[RANKED]}

    def net_of(self, run: Mapping[str, Any]) -> Net:
        """Return the network that a run ended on."""
        net, trained = self.nets[run["method"]], run["trained"]
        if trained.get("keep") is None:
            return net
        choice = self.field.posed.graph.choice(trained["keep"], frozenset(trained["removed"]))
        return Net(net.method, choice, net.fraction, None)

    def runs(self) -> Iterator[dict[str, Any]]:
        """Yield what is known of runs."""
        for path in sorted((self.field.folder / "runs").glob("*.json")):
            yield json.loads(path.read_text())

    def train(self, method: str, setting: Setting, seed: int) -> Trained:
        """Train a method's network; what became of it is kept."""
        data = held_out(self.data) if setting.held_out else self.data
        data.train.seed = seed
        train = Taught(data.train, self.dense, bfloat16=True) if setting.distil else data.train
        course = Course(data, train, setting.recipe, Distillation() if setting.distil else cross_entropy)
        draw = partial(drawn, self.network)
        strength = Strength(total=setting.total, shrinking=setting.sparse, anneal=setting.anneal)
        plan = self.field.ours()[0].model_copy(update={"strength": strength})
        ours = self.nets[OURS[0]].fraction
        contest = Contest(self.dense, self.field.posed, plan, self.field.importance, draw, ours)
        found = contest.run(method, self.nets[method], course, seed)
        content = {"method": method, "seed": seed, "setting": asdict(setting), "trained": asdict(found)}
        folder = self.field.folder / "runs"
        folder.mkdir(exist_ok=True)
        digest = hashlib.sha256(json.dumps([method, seed, asdict(setting)]).encode()).hexdigest()[:12]
        atomic.write_text(folder / f"{digest}.json", json.dumps(content, indent=1) + "\n")
        return found

    def measured(self, nets: Iterable[Net], seconds: float) -> dict[str, dict[str, Any]]:
        """Time the networks that were not timed before in turns, in every runtime; return rows by their keys."""
        path = self.field.folder / "measured.json"
        known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        if new := {net.key: net for net in nets if net.key not in known}:
            graph = self.field.posed.graph
            contenders = [Contender("dense", self.dense, graph.dense, None, None, "dense")]
            for index, (key, net) in enumerate(new.items()):
                small = net.model(self.dense, self.field.posed).eval()
                contenders.append(Contender(key, small, net.choice, None, None, f"net{index}"))
            with self.field.stage.phase("build") as phase, one_thread():
                files = self.field.folder / "files"
                files.mkdir(exist_ok=True)
                artifacts = built(contenders, sorted(installed()), self.field.brief.inputs, files, progress=phase.step)
            with self.field.stage.phase("measure") as phase:
                found = timed(contenders, artifacts, self.field.brief.inputs, seconds=seconds, progress=phase.step)
            known |= {row.label: row.model_dump(mode="json") for row in rows(contenders, graph, found)}
            atomic.write_text(path, json.dumps(known, indent=1) + "\n")
        return known

    def table(self, seconds: float) -> list[dict[str, Any]]:
        """Return the rows of all runs that read the test images."""
        shown = [run for run in self.runs() if not run["setting"]["held_out"]]
        nets = [self.net_of(run) for run in shown]
        measured, runtime = self.measured(nets, seconds), self.field.bench.profile.runtime.name
        dense = planner.accuracy(self.dense, self.data.test)
        found = []
        for run, net in zip(shown, nets, strict=True):
            row = {"network": self.network, "runtime": runtime, "budget": self.budget, "method": run["method"]}
            trained = {name: value for name, value in run["trained"].items() if name not in ("keep", "removed")}
            row |= {"seed": run["seed"], **run["setting"], "dense": dense, **trained}
            own = measured[net.key]
            row |= {name: own[name] for name in ("macs", "measured", "speedup", "efficiency")}
            found.append(row | {"keep": dict(net.choice.keep), "removed": sorted(net.choice.removed)})
        return found


def drawn(network: str, seed: int) -> nn.Module:
    """Return a dense network with weights drawn by a seed."""
    model = NETWORKS[network][0]()
    draw_weights_(model, torch.Generator().manual_seed(seed))
    return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload,no-any-return]


def held_out(data: Data) -> Data:
    """Return the data with the last training images to test on."""
    train = data.train
    rest = replace(train, x=train.x[:-HELD_OUT], y=train.y[:-HELD_OUT])
    return Data(rest, replace(data.test, x=train.x[-HELD_OUT:], y=train.y[-HELD_OUT:]))


def main(
    data: Annotated[Path, typer.Option(help="folder of CIFAR-10")],
    weights: Annotated[Path, typer.Option(help="safetensors of the dense network")],
    network: Annotated[str, typer.Option(help="resnet20 or resnet56")] = "resnet20",
    runtime: Annotated[str, typer.Option(help="to be fast in")] = "onnxruntime",
    budgets: Annotated[str, typer.Option(help="fractions of the dense latency")] = "0.5",
    methods: Annotated[str, typer.Option(help="names, separated by semicolons [default: all]")] = "",
    epochs: Annotated[int, typer.Option(min=1, help="in all, of every method")] = 5,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    lr: Annotated[float, typer.Option(min=0)] = 0.04,
    sparse: Annotated[float, typer.Option(help="share of the steps in which groups shrink")] = 0.5,
    total: Annotated[float, typer.Option(min=0.01, help="of all proximal step sizes: the strength")] = 6.0,
    anneal: Annotated[float, typer.Option(min=0, max=1, help="share of them in which budgets fall")] = 0.0,
    distil: Annotated[bool, typer.Option("--distil", help="learn from the dense network too")] = False,
    held: Annotated[bool, typer.Option("--held-out", help="test on training images that are set aside")] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="of timing per network and runtime")] = 1.0,
    until: Annotated[Until, typer.Option(help="how far to go")] = Until.ROWS,
    out: Annotated[Path, typer.Option(help="where everything is kept")] = Path("evidence-accuracy"),
) -> None:
    """Make rows of the table."""
    os.environ[cifar10.FOLDER] = str(data)
    setting, say = Setting(epochs, lr, sparse, total, anneal, distil, held), Console(stderr=True).print
    torch.set_num_threads(1)
    for budget in map(float, budgets.split(",")):
        arena = Arena.of(network, runtime, budget, weights, out)
        for name, net in arena.nets.items():
            say(f"{name}: {net.fraction:.3f} of the dense latency")
        known = {(run["method"], run["seed"]) for run in arena.runs() if run["setting"] == asdict(setting)}
        wanted = methods.split(";") if methods else list(ALL)
        for seed in range(seeds) if until is not Until.NETS else ():
            for method in wanted:
                if (method, seed) not in known:
                    say(f"{budget:g}, seed {seed}, {method}: {arena.train(method, setting, seed)}")
        if until is Until.ROWS and not held:
            key = ("network", "runtime", "budget", "method", "seed", *(part.name for part in fields(Setting)))
            add("accuracy", arena.table(seconds), command="python -m tools.evidence.accuracy", key=key)


if __name__ == "__main__":
    typer.run(main)
