"""Lossless rebuild: how many test images change their class when the support is fixed, and when the zeros are cut out.

    python -m tools.evidence.lossless [--seeds 1] [--epochs 8]
    python -m tools.evidence.lossless --data FOLDER --weights resnet20.safetensors --keep 0.5 --epochs 6 --lr 0.04

The handwritten digits and a small residual network that is trained here first, or CIFAR-10 and ResNet-20, as in
tools/bench_training.py: every method ends on the same share of every inner width, half way or at the start, and what is
left trains on. Beside them torch-pruning by group norms, cut at the start, or after its GroupNormPruner.regularize with
its own defaults; it cuts its models itself. Exit 1 if a rebuild of ours changes the class of any image, or if fixing a
support does that WGSEF has reached before. Runs are kept in --log as they end, and a later call goes on from there.
"""

import copy
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from backends import rebuild
from planner import Plan, Recipe
from planner.evaluation import evaluating
from tools.batches import Data
from tools.bench_training import METHODS, Cutting, Method, Setting, Start, untouched
from tools.console import Stage
from tools.evidence.record import Log, Row, add

KEY = ("data", "method", "seed")


@dataclass(frozen=True)
class TorchPruning(Method):
    """torch-pruning ranks and cuts; with `reg` it shrinks groups by their gradients before."""

    reg: float = 0.0

    def select(self, cut: Cutting, norms: Tensor) -> Tensor:
        """Return the groups that torch-pruning keeps."""
        kept = chosen(cut.start.plan, cut.model)
        return torch.cat([kept[structure.width.name] for structure in cut.state.groups.structures])  # type: ignore[union-attr]

    def before_step(self, cut: Cutting) -> Callable[..., None] | None:
        """Return its regulariser, which adds to gradients until the cut."""
        if not self.reg:
            return None
        pruner = pruner_of(cut.start.plan, cut.model, reg=self.reg)
        pruner.update_regularizer()

        def regularise(*_: object) -> None:
            if cut.taken < cut.schedule.steps:
                pruner.regularize(cut.model)

        return regularise


ALL: tuple[Method, ...] = (
    *METHODS,
    TorchPruning("torch-pruning: regularised, then cut", untouched, reg=1e-4),
    TorchPruning("torch-pruning: cut at the start", untouched, cut_at=0.0),
)


def layers_of(plan: Plan, model: nn.Module) -> dict[str, nn.Module]:
    """Return the layer that makes each planned width."""
    graph = plan.graph(model)
    return {width.name: model.get_submodule(graph.width[width.name].makers[0]) for width in plan.widths}


def pruner_of(plan: Plan, model: nn.Module, *, reg: float = 0.0) -> Any:
    """Return torch-pruning's GroupNormPruner of what a plan narrows, to the widths that it keeps; of all else nothing.

    It keeps int(size * (1 - ratio)) channels.
    """
    import torch_pruning  # a test extra

    logging.getLogger("torch_pruning").setLevel(logging.ERROR)
    layers = layers_of(plan, model)
    ratios = {layers[width.name]: 1 - (width.keep + 0.5) / width.dense for width in plan.widths}
    others = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd) and m not in ratios]
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        return torch_pruning.pruner.GroupNormPruner(
            model,
            plan.inputs_like(),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),  # GroupNorm's name in 1.6
            reg=reg,
            pruning_ratio_dict=ratios,
            ignored_layers=others,
        )


def chosen(plan: Plan, model: nn.Module) -> dict[str, Tensor]:
    """Return the channels of each planned width that torch-pruning would keep, (size,) bool."""
    copied = copy.deepcopy(model)
    names = {layer: name for name, layer in layers_of(plan, copied).items()}
    kept = {width.name: torch.ones(width.dense, dtype=torch.bool) for width in plan.widths}
    for group in pruner_of(plan, copied).step(interactive=True):
        dependency, channels = group[0]
        kept[names[dependency.target.module]][list(channels)] = False
    return kept


def torch_pruned(plan: Plan, model: nn.Module) -> nn.Module:
    """Return a copy from which torch-pruning cut the channels of planned widths whose filters are zero."""
    import torch_pruning

    small = copy.deepcopy(model)
    pruner = pruner_of(plan, small)
    for layer in layers_of(plan, small).values():
        assert isinstance(layer.weight, Tensor)
        gone = (layer.weight.flatten(1) == 0).all(1).nonzero().flatten().tolist()
        pruner.manual_prune_width(layer, torch_pruning.prune_conv_out_channels, gone)
    return small


def smaller(method: Method, plan: Plan, model: nn.Module) -> nn.Module:
    """Return what a method cuts from a model whose support is fixed: torch-pruning its own way, others by rebuild."""
    return torch_pruned(plan, model) if isinstance(method, TorchPruning) else rebuild(plan, model)


@torch.no_grad()
def classes(model: nn.Module, data: Data) -> Tensor:
    """Return the class that each test image is given, (n,)."""
    with evaluating(model):
        return torch.cat([model(x).argmax(1) for x, _ in data.test])


def run(method: Method, start: Start, recipe: Recipe) -> Row:
    """Train by one method; return accuracies, and the images whose class changed."""
    plan, said = start.plan, [classes(start.dense, start.data)]

    def look(model: nn.Module) -> None:
        said.append(classes(model, start.data))

    def cut(model: nn.Module) -> None:
        look(model)
        look(smaller(method, plan, model))

    steps = recipe.epochs * len(start.data.train)
    cutting = Cutting(method, start, steps, before=look, after=cut)
    cut(cutting.train(recipe))
    labels = torch.cat([y for _, y in start.data.test])
    moments = ("dense", "before", "fixed", "rebuilt", "trained", "final")
    return {
        "images": len(labels),
        "groups_cut": cutting.cut_groups,
        "kept_groups": int(cutting.kept.sum()),
        "accuracy": {name: int((own == labels).sum()) / len(labels) for name, own in zip(moments, said, strict=True)},
        "changed_by_fixing": int((said[1] != said[2]).sum()),
        "changed_by_rebuild": int((said[2] != said[3]).sum()),
        "changed_in_the_end": int((said[4] != said[5]).sum()),
    }


def lossless(row: Row) -> bool:
    """Whether a row keeps the promise: no rebuild changes a class, nor does a cut of what was zero before."""
    reached = row["groups_cut"] == 0 and row["changed_by_fixing"] > 0
    return not (reached or row["changed_by_rebuild"] or row["changed_in_the_end"])


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    epochs: Annotated[int, typer.Option(min=2, help="of every method, after the dense ones")] = 8,
    dense_epochs: Annotated[int, typer.Option(min=1, help="without --weights")] = 6,
    lr: Annotated[float, typer.Option(min=0)] = 0.02,
    keep: Annotated[float, typer.Option(min=0, max=1, help="share of every inner width")] = 0.25,
    data: Annotated[Path | None, typer.Option(help="folder of CIFAR-10, else the digits")] = None,
    weights: Annotated[Path | None, typer.Option(help="safetensors to start from")] = None,
    log: Annotated[Path, typer.Option(help="what has run, and is gone on with")] = Path("lossless.log.json"),
) -> None:
    """Run every method, keep the rows; exit 1 if ours changes the class of an image."""
    torch.set_num_threads(1)
    about = ("digits" if data is None else "CIFAR-10", "trained here" if weights is None else weights.name)
    setting = Setting(*about, keep, 0 if weights else dense_epochs, Recipe(epochs, lr=lr, bfloat16=data is not None))
    stage, kept, found = Stage(Console(stderr=True)), Log(log), []
    for seed in range(seeds):
        start = None
        for method in ALL:
            key = f"{setting}, {method.name}, seed {seed}"
            if key not in kept.rows():
                with stage.phase(f"seed {seed}: {method.name}"):
                    start = start or setting.start(seed, data, weights)
                    row = run(method, start, setting.recipe)
                kept.keep(key, {"data": about[0], "method": method.name, "seed": seed, **row})
            found.append(kept.rows()[key])
    add("lossless", found, command="python -m tools.evidence.lossless", key=KEY)
    names = {method.name for method in METHODS}
    sys.exit(0 if all(lossless(row) for row in found if row["method"] in names) else 1)


if __name__ == "__main__":
    typer.run(main)
