"""One model, many targets: what a plan for one runtime gains there, and what it gains on the others.

    python -m tools.evidence.targets [--networks mobilenet_v2,vit_tiny] [--runtimes onnxruntime,openvino]
    python -m tools.evidence.targets --networks resnet56 --data FOLDER --weights resnet56.safetensors --epochs 3

For every runtime, half of the dense latency is planned from a table measured here; the planned network is measured, and
the plan made again where that is off, as `espalier run` does. The model is trained with WGSEF where data are given,
else cut by norms alone, since speed does not depend on the weights, and rebuilt. Each of these models and the dense one
is compiled for every target, shown to compute what PyTorch does, and timed in turns. For an Ethos-U the compiler
estimates. Rows go into evidence/targets.json; files are kept in --out, and a later call goes on from there.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import planner
import profiles
from backends import Samples, rebuild
from backends.artifact import Artifact
from backends.weights import load_into_, read, save
from planner import Plan, Recipe
from profiles import Profile
from tools.batches import Data
from tools.bench_latency_model import NETWORKS, profile_for
from tools.calibrate import bench, calibrate
from tools.console import Stage
from tools.evidence.record import add
from tools.examples import cifar10
from tools.networks import random_samples
from tools.planning import Brief, Settling
from tools.targets import DENSE, Row, Target, Variant, Work, gains, table
from tools.threads import fastest, one_thread

RUNTIMES = "onnxruntime,openvino,executorch,pytorch"
NPUS = ("ethos-u55-128.vela.int8", "ethos-u85-256.vela.int8")
INT8 = ("x86_64_v3.onnxruntime.int8", "x86_64_v4.openvino.int8-vnni", "x86_64_v4.xnnpack.int8-vnni")


@dataclass(frozen=True)
class Case:
    """One network with what it is pruned with."""

    network: str
    budget: float
    folder: Path
    data: Data | None
    weights: Path | None
    recipe: Recipe

    def dense(self) -> nn.Module:
        """Return the dense model, in evaluation mode."""
        torch.manual_seed(0)
        model = NETWORKS[self.network][0]()
        if self.weights is not None:
            load_into_(model, read(self.weights), self.weights)
        return model.eval()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """One example."""
        if self.data is not None:
            return (next(iter(self.data.test))[0][:1],)
        return (torch.randn(1, *NETWORKS[self.network][1], generator=torch.Generator().manual_seed(0)),)

    def samples(self, profile: Profile) -> Samples:
        """Return what is quantised and compared with: images, else random numbers."""
        if self.data is None:
            return random_samples(self.inputs, profile)
        return Samples.of(self.data.train, self.data.test, like=self.inputs)


def variant(case: Case, runtime: str, profile: Profile, stage: Stage) -> Variant:
    """Return the model as planned for one runtime: made now, or kept from an earlier call."""
    model, folder = case.dense(), case.folder / case.network / runtime
    planned, weights = folder / "plan.json", folder / "sparse.safetensors"
    if not planned.exists():
        place = bench(model, case.inputs, profile)
        with stage.phase(f"{case.network}: table of {runtime}") as phase, one_thread():
            measured = calibrate(place, progress=phase.step)
        folder.mkdir(parents=True, exist_ok=True)
        brief = Brief(model, case.inputs, profile, case.budget, None)
        settling = Settling(brief, place, measured, stage, folder)
        settling.plan(_importance(case, settling.posed)).save(planned)
    plan = Plan.load(planned)
    if weights.exists():
        load_into_(model, read(weights), weights)
    else:
        _trained(case, model, plan, stage)
        save(model, weights)
    small = rebuild(plan, model.eval())
    graph = planner.trace(small, case.inputs)
    return Variant(runtime, small, graph.macs(graph.dense), plan.sha256)


def _importance(case: Case, posed: planner.Problem) -> planner.Importance:
    if case.data is None:
        return planner.magnitude(posed.model, posed.graph, posed.options(thrifty=True))
    batches = [batch for batch, _ in zip(case.data.train, range(4), strict=False)]
    return planner.taylor(
        posed.model, posed.graph, posed.options(thrifty=True), batches, loss=nn.functional.cross_entropy
    )


def _trained(case: Case, model: nn.Module, plan: Plan, stage: Stage) -> None:
    """Train with WGSEF, or cut by norms where there is nothing to train on."""
    if case.data is None:
        planner.harden_(plan, model)
        return
    with stage.phase(f"{case.network}: train") as phase, fastest(model, next(iter(case.data.train))[0]):
        planner.fit(
            model,
            case.data.train,
            case.recipe,
            plan=plan,
            checkpoint=case.folder / case.network / f"{plan.sha256[:12]}.training.safetensors",
            watch=lambda m: phase.step(f"loss {m.loss:.3f}", m.step, m.steps),
        )


def rows(
    case: Case, targets: Sequence[Target], models: Sequence[Variant], *, seconds: float, stage: Stage
) -> list[Row]:
    """Compile every model for every target and measure; return the table's rows."""
    found: list[Row] = []
    for target in targets:
        samples = case.samples(target.profile) if target.profile else Samples()
        folder = case.folder / case.network / target.name
        work = Work(models, case.inputs, samples, folder, seconds, fresh=False)
        with stage.phase(f"{case.network} for {target.name}") as phase, one_thread():
            made = work.compiled([target], phase.step)
        with stage.phase(f"{case.network} on {target.name}") as phase:
            gained = gains(work, [target], made, phase.step)
        for name, reason in {**work.refused, **work.absent}.items():
            stage.say(f"{name}: {reason}")
        found += gained.rows
        Console().print(table(gained))
    return found


def entry(case: Case, row: Row) -> dict[str, Any]:
    """Return a row as it is kept, with the parity of its file."""
    artifact = Artifact.load(case.folder / case.network / row.target / row.record)
    kept = row.model_dump(mode="json", exclude={"record"})
    return {"network": case.network, **kept, "parity": artifact.parity.max_rel, "size_bytes": artifact.size_bytes}


def _planned(runtimes: str, own: Mapping[str, Profile]) -> dict[str, Profile]:
    """Return the profiles to plan for: of the runtimes that are here, and those that are named by their ids."""
    names = [name for name in runtimes.split(",") if name in own or "." in name]
    return {name: own[name] if name in own else profiles.load(name) for name in names}


def main(
    networks: Annotated[str, typer.Option(help="comma-separated")] = "resnet56,mobilenet_v2,vit_tiny",
    runtimes: Annotated[str, typer.Option(help="to plan for, comma-separated; also ids of profiles")] = RUNTIMES,
    budget: Annotated[float, typer.Option(min=0.05, max=1, help="share of the dense latency")] = 0.5,
    data: Annotated[Path | None, typer.Option(help="folder of CIFAR-10, for the networks that take it")] = None,
    weights: Annotated[Path | None, typer.Option(help="safetensors of the network, with --data")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="of training, with --data")] = 3,
    seconds: Annotated[float, typer.Option(min=0.01, help="of measuring per model and target")] = 2.0,
    npus: Annotated[bool, typer.Option(help="compile for Ethos-U too, where the network is convolutional")] = True,
    only: Annotated[str, typer.Option(help="of the targets, these ids, comma-separated [default: all]")] = "",
    out: Annotated[Path, typer.Option(help="where plans, weights and files are kept")] = Path("evidence-targets"),
) -> None:
    """Plan for every runtime, compile every plan for every target, measure, and keep the rows."""
    stage = Stage(Console(stderr=True))
    if data is not None:
        os.environ[cifar10.FOLDER] = str(data)
    own = {name: profile for name in RUNTIMES.split(",") if (profile := profile_for(name))}
    for network in networks.split(","):
        source = cifar10.data() if data is not None and network in ("resnet20", "resnet56") else None
        recipe = Recipe(epochs, lr=0.04, bfloat16=True)
        case = Case(network, budget, out, source, weights if source else None, recipe)
        dense = case.dense()
        graph = planner.trace(dense, case.inputs)
        models = [Variant(DENSE, dense, graph.macs(graph.dense), None)]
        models += [variant(case, name, profile, stage) for name, profile in _planned(runtimes, own).items()]
        wanted = [
            *(profile.id for profile in own.values()),
            *INT8,
            *(NPUS if npus and network != "vit_tiny" else ()),
        ]
        wanted = [name for name in wanted if not only or name in only.split(",")]
        found = rows(case, [Target.of(name) for name in wanted], models, seconds=seconds, stage=stage)
        add(
            "targets",
            [entry(case, row) for row in found],
            command="python -m tools.evidence.targets",
            key=("network", "plan", "target"),
        )


if __name__ == "__main__":
    typer.run(main)
