"""What the evidence of training shares: a run that goes on where it stopped, what it predicts, and its speed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import planner
from backends import Samples, rebuild
from planner import Plan, Recipe
from planner.evaluation import evaluating
from profiles.errors import EspalierError
from tools.batches import Data
from tools.console import Stage
from tools.targets import Target, Variant, Work, gains
from tools.threads import fastest, one_thread

RUNTIMES = "onnxruntime,openvino,executorch,pytorch"


@dataclass(frozen=True)
class Tested:
    """The predictions of a trained model and of what it was rebuilt as, on the test images."""

    masked: Tensor  # (n,)
    rebuilt: Tensor
    labels: Tensor

    @property
    def before_cut(self) -> float:
        """The error of the trained model, whose groups are zero but still there."""
        return _share(self.masked != self.labels)

    @property
    def error(self) -> float:
        """The error of the rebuilt model."""
        return _share(self.rebuilt != self.labels)

    @property
    def changed(self) -> int:
        """The number of images that the rebuild predicts otherwise."""
        return int((self.masked != self.rebuilt).sum())


def _share(wrong: Tensor) -> float:
    return int(wrong.sum()) / len(wrong)


def part(data: Data, examples: int | None, *, seed: int) -> Data:
    """Return data with so many of the training images, drawn by chance, the same for every seed of training."""
    train = data.train
    if examples is None:
        return Data(replace(train, seed=seed), data.test)
    if not train.batch <= examples <= len(train.x):
        raise EspalierError(f"--examples {examples} is not between a batch of {train.batch} and all {len(train.x)}")
    chosen = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(0))[:examples]
    return Data(replace(train, x=train.x[chosen], y=train.y[chosen], seed=seed), data.test)


def trained_(
    model: nn.Module, plan: Plan | None, data: Data, recipe: Recipe, *, checkpoint: Path, stage: Stage
) -> nn.Module:
    """Train a model in place from where its checkpoint stands; return what it is rebuilt as, itself without a plan."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
    name = f"train {checkpoint.parent.name}"
    with stage.phase(name) as phase, fastest(model, next(iter(data.train))[0]):
        planner.fit(
            model,
            data.train,
            recipe,
            plan=plan,
            checkpoint=checkpoint,
            watch=lambda m: phase.step(f"loss {m.loss:.3f}", m.step, m.steps),
        )
    return rebuild(plan, model.eval()) if plan else model.eval()


def tested(masked: nn.Module, rebuilt: nn.Module, data: Data) -> Tested:
    """Return what both predict; each sees the test images once."""
    first = predicted(masked, data.test)
    second = first if rebuilt is masked else predicted(rebuilt, data.test)
    return Tested(first, second, data.test.y.long())


@torch.no_grad()
def predicted(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the class that a model gives to every image, (n,)."""
    with evaluating(model):
        return torch.cat([model(x).argmax(1) for x, _ in batches])


def variant(label: str, model: nn.Module, inputs: tuple[Tensor, ...], plan: Plan | None = None) -> Variant:
    """Return a model as one of those that are timed in turns."""
    graph = planner.trace(model.eval(), inputs)
    return Variant(label, model, graph.macs(graph.dense), plan.sha256 if plan else None)


@dataclass(frozen=True)
class Timer:
    """Where models are compiled for which runtimes, and how long each is timed."""

    folder: Path
    runtimes: Sequence[str]
    seconds: float
    stage: Stage

    def speeds(self, name: str, models: Sequence[Variant], inputs: tuple[Tensor, ...]) -> dict[str, dict[str, Any]]:
        """Return for each model but the first, the dense one, by runtime what was measured in turns with it.

        What was measured of the same files before is not measured again.
        """
        targets = [Target.of(runtime) for runtime in self.runtimes]
        work = Work(models, inputs, Samples(), self.folder / name, self.seconds, fresh=False)
        with self.stage.phase(f"compile {name}") as phase, one_thread():
            made = work.compiled(targets, phase.step)
        with self.stage.phase(f"measure {name}") as phase, one_thread():
            found = gains(work, targets, made, phase.step)
        for of, reason in {**work.refused, **work.absent}.items():
            self.stage.say(f"{name}, {of}: {reason}")
        rows = {(row.plan, row.target): row.model_dump(mode="json") for row in found.rows}
        dense = models[0].label
        return {
            own.label: {
                target.name: {
                    "dense_s": rows[dense, target.name]["measured_s"],
                    **{key: rows[own.label, target.name][key] for key in ("measured_s", "speedup", "remark")},
                }
                for target in targets
                if (dense, target.name) in rows and (own.label, target.name) in rows
            }
            for own in models[1:]
        }
