"""SSL's layers: which residual blocks leave is decided in training, by one WGSEF pool over all of them.

Wen et al. 2016, table 3: from ResNet-20's error of 8.82 % to 7.40 % with 18 layers and 8.54 % with 14. There each block
has a group lasso, and how many leave follows from its strength; here the number is given, and which ones they are is
not. The row of 20 layers trains as long without a plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import planner
from backends.weights import load_into_, read
from planner import Plan, Recipe
from planner.document import with_depth_budget
from planner.pools import leaving
from profiles.errors import EspalierError
from tools.batches import Data
from tools.evidence.record import Row
from tools.evidence.runs import Timer, predicted, tested, trained_, variant
from tools.examples import cifar10
from tools.given import given
from tools.targets import DENSE

PUBLISHED = {20: 0.0882, 18: 0.0740, 14: 0.0854}  # errors
PER_BLOCK = 2  # layers


@dataclass(frozen=True)
class Case:
    """What all rows start from."""

    data: Data
    weights: Path
    recipe: Recipe

    def dense(self) -> nn.Module:
        """Return ResNet-20 with the weights given."""
        model = cifar10.resnet20()
        load_into_(model, read(self.weights), self.weights)
        return model.eval()

    @property
    def name(self) -> str:
        """What distinguishes a run from others of the same network."""
        train = self.data.train
        return f"{self.recipe.epochs} epochs of {len(train.x)}, seed {train.seed}"


def plan_of(model: nn.Module, data: Data, layers: int) -> Plan | None:
    """Return the plan that leaves a residual network so many layers, None for as many as it has."""
    graph = planner.trace(model, (next(iter(data.test))[0][:1],))
    whole = PER_BLOCK * len(graph.blocks) + 2  # with a stem and a classifier
    gone, odd = divmod(whole - layers, PER_BLOCK)
    if odd or not 0 <= gone < len(graph.blocks):
        raise EspalierError(f"{layers} layers cannot be left of {whole}: blocks of {PER_BLOCK} leave, one stays")
    return with_depth_budget(given(graph, {}), model, len(graph.blocks) - gone) if gone else None


def rows(case: Case, depths: Sequence[int], timer: Timer) -> Iterator[Row]:
    """Train, rebuild, test and time for each number of layers."""
    start = predicted(case.dense(), case.data.test)
    dense_error = float((start != case.data.test.y.long()).double().mean())
    for layers in depths:
        model = case.dense()
        plan = plan_of(model, case.data, layers)
        folder = f"{layers} layers, {case.name}".replace(", ", "-").replace(" ", "_")
        checkpoint = timer.folder / folder / "training.safetensors"
        small = trained_(model, plan, case.data, case.recipe, checkpoint=checkpoint, stage=timer.stage)
        test = tested(model, small, case.data)
        inputs = (next(iter(case.data.test))[0][:1],)
        models = [variant(DENSE, case.dense(), inputs), variant("rebuilt", small, inputs, plan)]
        yield {
            "part": "depth",
            "case": f"{layers} layers",
            "how": case.name,
            "layers": layers,
            "blocks_left": gone(model, plan),
            "start_error": dense_error,
            "before_cut_error": test.before_cut,
            "error": test.error,
            "images_changed": test.changed,
            "published_error": PUBLISHED.get(layers),
            "macs_speedup": models[0].macs / models[1].macs,
            "speed": timer.speeds(folder, models, inputs)["rebuilt"] if plan else {},
        }


def gone(model: nn.Module, plan: Plan | None) -> list[str]:
    """Return the blocks that training set to zero."""
    return sorted(leaving(plan, model, plan.graph(model))) if plan else []
