"""MACs are not latency: published recipes, their measured speed-up, and ours at the same MACs and the same latency.

    python -m tools.evidence.macs [--networks resnet56] [--runtimes onnxruntime,openvino] [--recipes "global 2.11x"]

torch-pruning narrows ResNet-56 until it has 2.11 and 2.55 times fewer multiply-accumulates (MACs), as in its paper,
ranking group norms over all layers or keeping one share of each, and MobileNetV2 by shares of its channels; each
without rounding and with `round_to`. Beside every such network two of ours are planned with the table of the runtime:
the fastest within its MACs, and the one that has its measured latency, planned again with another budget while it is
off by more than 3 %. All are compiled and timed in turns with the dense network; what is measured is kept in --log as
soon as it exists, and a later call goes on from there. Norms are drawn as in tools/rivalry.py, unless --weights are
given; what a network keeps of them is its importance, see tools/rivals.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.console import Console

import planner
from backends.weights import load_into_, read
from planner import LatencyTable, Limits, Problem
from planner.operations import Choice
from profiles import Profile
from tools import outcome
from tools.bench_latency_model import NETWORKS, available
from tools.calibrate import Bench, Progress, bench, calibrate
from tools.console import Stage
from tools.contenders import Contender, built, narrowed, rows, timed
from tools.design import off_the_grid
from tools.evidence.record import Log, Row, add
from tools.rivalry import Contest, spread
from tools.rivals import Ranking, kept_of, torch_pruned
from tools.threads import one_thread
from tools.truth import measured

RUNTIMES = "onnxruntime,openvino,executorch,pytorch"
FINE, WHOLE = 200, 0.98  # steps of torch-pruning towards a speed-up in MACs, and the share of channels at their end
NEAR, TRIES = 0.03, 3  # of a measured latency
SAME, HALVINGS, GAP = 0.02, 5, 1e-3  # of MACs; of the search for the latency at them; of the solver


@dataclass(frozen=True)
class Recipe:
    """What torch-pruning is asked for: above 1 a speed-up in MACs, in small steps; below, a share of channels, in one.

    Channels are ranked over all layers at once, or, unless `across`, in each layer, which then all lose one share.
    """

    asked: float
    across: bool = False
    round_to: int | None = None

    @property
    def name(self) -> str:
        """It in words."""
        asked = f"{self.asked:g}x" if self.asked > 1 else f"{self.asked:.0%}"
        rounded = f", round_to {self.round_to}" if self.round_to else ""
        return f"{'global' if self.across else 'uniform'} {asked}{rounded}"

    def made(self, posed: Problem) -> Choice | None:
        """Return the network that torch-pruning leaves; None if it ends before it is as small."""
        graph, steps, share = posed.graph, FINE, WHOLE
        if self.asked < 1:
            steps, share = 1, self.asked
        ranking, dense = Ranking("norm", self.across, self.round_to), graph.macs(graph.dense)
        for model in torch_pruned(posed.model, graph, ranking, steps=steps, share=share):
            choice = graph.choice(kept_of(graph, model))
            if self.asked < 1 or dense / graph.macs(choice) >= self.asked:
                return choice
        return None


def _each(asked: Sequence[float], *, across: Sequence[bool]) -> tuple[Recipe, ...]:
    return tuple(Recipe(own, ranked, by) for ranked in across for by in (None, 8, 16) for own in asked)


RECIPES: dict[str, tuple[Recipe, ...]] = {
    "resnet56": _each((2.11, 2.55), across=(True, False)),
    "mobilenet_v2": _each((0.1, 0.25, 0.5), across=(False,)),
}


@dataclass(frozen=True)
class Subject:
    """One network with its weights."""

    network: str
    weights: Path | None

    @cached_property
    def model(self) -> torch.nn.Module:
        """The dense network, with norms drawn or trained."""
        model = NETWORKS[self.network][0]().eval()
        if self.weights is None:
            return spread(model)
        load_into_(model, read(self.weights), self.weights)
        return model

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """One example."""
        return (torch.randn(1, *NETWORKS[self.network][1], generator=torch.Generator().manual_seed(0)),)

    def key(self, runtime: str, recipe: Recipe) -> str:
        """What a row is logged under."""
        return f"{self.network} ({self.weights.name if self.weights else 'drawn'}), {runtime}, {recipe.name}"


@dataclass(frozen=True)
class Match:
    """Our side of the comparison, in one runtime."""

    contest: Contest
    place: Bench
    table: LatencyTable

    @classmethod
    def of(cls, subject: Subject, profile: Profile, progress: Progress) -> "Match":
        """Pose the problem with the table measured on this machine."""
        place = bench(subject.model, subject.inputs, profile)
        table = calibrate(place, progress=progress)
        posed = planner.problem(subject.model, subject.inputs, profile, table=table)
        return cls(Contest.on(subject.network, posed), place, table)

    def at_macs(self, macs: int) -> Choice | None:
        """Return our network of so many MACs: of those that keep most, the one that is predicted to be fastest.

        The latency budget is halved towards the least at which the plan still has the MACs that it has without one.
        """
        limits, graph, judge = Limits(macs=macs, gap=GAP), self.contest.problem.graph, self.contest.judge
        best = self.contest.ours(None, limits)
        if best is None:
            return None
        least, low, high = (1 - SAME) * graph.macs(best), 0.0, judge.latency(best)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            choice = self.contest.ours(middle, limits)
            if choice is not None and graph.macs(choice) >= least:
                best, high = choice, judge.latency(choice)
            else:
                low = middle
        return best

    def at_latency(self, fraction: float, progress: Progress) -> Choice | None:
        """Return our network of a measured fraction of the dense latency; None if that is below the floor.

        The budget is scaled by what the planned network missed; of all that were measured the nearest is returned.
        """
        if fraction >= 1:
            return self.contest.problem.graph.dense
        tried: list[tuple[float, Choice]] = []
        budget = fraction
        while len(tried) < TRIES and (not tried or min(off for off, _ in tried) > NEAR):
            choice = self.contest.ours(min(budget, 1.0))
            if choice is None or any(choice == own for _, own in tried):
                break
            found = measured(self.place, choice, progress)
            tried.append((abs(found / fraction - 1), choice))
            budget *= fraction / found
        return min(tried, key=lambda each: each[0])[1] if tried else None

    def row(self, choice: Choice, seconds: float, progress: Progress) -> Row:
        """Measure a recipe's network and ours beside it; return what is kept of it."""
        fraction = measured(self.place, choice, progress)
        ours = {"same_macs": self.at_macs(self.contest.problem.graph.macs(choice))}
        ours["same_latency"] = self.at_latency(fraction, progress)
        found = self.timed({"recipe": choice} | {name: own for name, own in ours.items() if own}, seconds, progress)
        return found.pop("recipe") | {name: found.get(name) for name in ours}

    def timed(self, choices: Mapping[str, Choice], seconds: float, progress: Progress) -> dict[str, Row]:
        """Compile networks and time them in turns with the dense one."""
        problem, name = self.contest.problem, self.place.runtime.NAME
        wanted = {"dense": problem.graph.dense, **choices}
        contenders = [
            Contender(label, narrowed(problem.model, problem.graph, own), own, None, None, label)
            for label, own in wanted.items()
        ]
        with TemporaryDirectory(prefix="espalier-") as folder, off_the_grid():
            artifacts = built(contenders, [name], self.place.inputs, Path(folder), progress=progress)
            taken = timed(contenders, artifacts, self.place.inputs, seconds=seconds, progress=progress)
        found = rows(contenders, problem.graph, taken)
        told = {each.label: self._told(found[0], each, wanted[each.label], name) for each in found[1:]}
        told["recipe"]["remark"] = "; ".join(dict.fromkeys(each.remark for each in taken[name] if each.remark))
        return told

    def _told(self, dense: outcome.Row, own: outcome.Row, choice: Choice, runtime: str) -> Row:
        return {
            "macs_speedup": dense.macs / own.macs,
            "speedup": own.speedup[runtime].model_dump(),
            "efficiency": own.efficiency[runtime],
            "kept": self.contest.judge.importance(choice),
            "removed": len(choice.removed),
        }


def run(
    subject: Subject, runtimes: Sequence[str], recipes: Sequence[Recipe], *, log: Log, seconds: float, stage: Stage
) -> list[Row]:
    """Measure what the log lacks of one network, and return all of it."""
    made: dict[Recipe, Choice | None] = {}
    found = log.rows()
    for runtime in runtimes:
        missing = [recipe for recipe in recipes if subject.key(runtime, recipe) not in found]
        profile = available(runtime, stage) if missing else None
        if profile is None:
            continue
        with stage.phase(f"{subject.network}: table of {runtime}") as phase, one_thread():
            match = Match.of(subject, profile, phase.step)
        for recipe in missing:
            if recipe not in made:
                made[recipe] = recipe.made(match.contest.problem)
            if (choice := made[recipe]) is None:
                stage.say(f"{subject.network}: torch-pruning ends before {recipe.name}")
                continue
            about = {"network": subject.network, "recipe": recipe.name, "runtime": runtime}
            with stage.phase(f"{subject.network}, {recipe.name}: {runtime}") as phase, one_thread():
                row = {**about, "runtime_version": match.table.runtime_version}
                row |= match.row(choice, seconds, phase.step)
            log.keep(subject.key(runtime, recipe), row)
    found = log.rows()
    return [found[key] for name in runtimes for recipe in recipes if (key := subject.key(name, recipe)) in found]


def main(
    networks: Annotated[str, typer.Option(help="comma-separated")] = ",".join(RECIPES),
    runtimes: Annotated[str, typer.Option(help="comma-separated")] = RUNTIMES,
    recipes: Annotated[str, typer.Option(help="only those whose name holds this")] = "",
    seconds: Annotated[float, typer.Option(min=0.01, help="of measuring per network")] = 2.0,
    weights: Annotated[Path | None, typer.Option(help="safetensors of the one network that is named")] = None,
    log: Annotated[Path, typer.Option(help="what is measured, and gone on with")] = Path("macs.log.json"),
) -> None:
    """Measure every recipe beside ours, and keep the rows."""
    stage, names = Stage(Console(stderr=True)), networks.split(",")
    if unknown := [name for name in names if name not in RECIPES]:
        raise typer.BadParameter(f"no recipe for network {unknown[0]!r}; there are {', '.join(RECIPES)}")
    if weights is not None and len(names) > 1:
        raise typer.BadParameter("--weights are of one network; name it with --networks")
    torch.set_num_threads(1)
    for name in names:
        wanted = [recipe for recipe in RECIPES[name] if recipes in recipe.name]
        found = run(Subject(name, weights), runtimes.split(","), wanted, log=Log(log), seconds=seconds, stage=stage)
        command, key = "python -m tools.evidence.macs", ("network", "recipe", "runtime")
        add("macs", found, command=command, key=key)
        for row in found:
            gain = row["speedup"]
            stage.say(
                f"{row['network']}, {row['recipe']}, {row['runtime']}: {row['macs_speedup']:.2f}x fewer MACs, "
                f"{gain['value']:.2f}x faster ({gain['low']:.2f}-{gain['high']:.2f})"
            )


if __name__ == "__main__":
    typer.run(main)
