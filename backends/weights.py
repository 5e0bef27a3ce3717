"""Weights on disk: safetensors, written atomically, checked against the model that they are loaded into."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backends.channels import selected
from backends.rebuild import cut
from backends.record import CROPPED, GATHERED, KEPT, PLAN, REMOVED, SELECTED, as_text, read_records
from backends.shapes import cropped, gathered
from planner.graph import Graph
from planner.spec import Plan
from profiles import atomic
from profiles.errors import BuildError, PlanError


def save(model: nn.Module, path: Path | str) -> None:
    """Write the weights of a rebuilt model as safetensors, atomically, with what it keeps of channels and kernels."""
    with atomic.replacing(path) as temporary:
        # Tensors of several names are written under each: the format knows no sharing.
        tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, temporary, as_text(model))


def save_pruned(plan: Plan, model: nn.Module, folder: Path | str) -> None:
    """Write a rebuilt model as `weights.safetensors` and `plan.json` into `folder`, which is made if need be."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    plan.save(Path(folder) / "plan.json")
    save(model, Path(folder) / "weights.safetensors")


def load_pruned(factory: Callable[[], nn.Module], folder: Path | str) -> nn.Module:
    """Return the model that `save_pruned` wrote: `factory` makes the dense one, whose weights do not matter.

    Nothing is unpickled. Raises PlanError if a file is missing or edited, or the factory makes another model.
    """
    return load_rebuilt(Plan.load(Path(folder) / "plan.json"), factory(), Path(folder) / "weights.safetensors")


def load_rebuilt(plan: Plan, model: nn.Module, path: Path | str) -> nn.Module:
    """Return the rebuilt model whose weights `save` wrote: `model` is the dense class, its weights do not matter."""
    graph = plan.graph(model)
    weights = read(path)
    try:
        said = read_records(path)
        model = cropped(model, {_layer(name): own for name, own in said[CROPPED].items()})
        removed = plan.choice.removed | said[REMOVED].keys()
        dense = cut(model, graph, _kept(plan, graph, weights, said[KEPT], path=path), removed)
        dense = gathered(dense, {_layer(name): own for name, own in said[GATHERED].items()})
        dense = selected(dense, {_layer(name): own for name, own in said[SELECTED].items()})
    except (AssertionError, AttributeError, BuildError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise PlanError(f"{path} keeps what the model does not have ({error!r}); save it again") from error
    load_into_(dense, weights, path)
    vars(dense)[PLAN] = plan.sha256
    return dense


def _layer(weight: str) -> str:
    return weight.removesuffix("weight").removesuffix(".")


def _kept(
    plan: Plan, graph: Graph, weights: Mapping[str, Tensor], said: Mapping[str, list[int]], *, path: Path | str
) -> dict[str, Tensor]:
    """Return the channels that a file says its model keeps, checked; for one that does not say, the first ones."""
    kept = {}
    for name in said:
        channels, size = torch.tensor(said[name], dtype=torch.int64), graph.width[name].size
        if channels.dim() != 1 or not len(channels) or channels.min() < 0 or channels.max() >= size:
            raise PlanError(f"{path} keeps channels of {name} that the model does not have; save it again")
        kept[name] = channels
    for width in (graph.width[width.name] for width in plan.widths if width.keep and width.name not in said):
        piece = next((s for s in width.slices if s.tensor in weights and (s.units >= 0).all()), None)
        if piece is not None and weights[piece.tensor].dim() > piece.axis:  # else the file does not fit, or it left
            repeats = len(piece.units) // width.size
            kept[width.name] = torch.arange(min(width.size, weights[piece.tensor].shape[piece.axis] // repeats))
    return kept


def read(path: Path | str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; raises PlanError if it is not a whole one."""
    try:
        return dict(load_file(path))
    except Exception as error:
        raise PlanError(f"{path} is not a whole safetensors file: {error}") from error


def load_into_(model: nn.Module, weights: Mapping[str, Tensor], path: Path | str) -> None:
    """Load `weights`, read from `path`, into `model`; raises PlanError naming the first one that does not fit."""
    own = model.state_dict()
    # Weights saved before BatchNorm counted its batches lack the counters, which decide nothing here.
    weights = {**{name: own[name] for name in own if name.endswith("num_batches_tracked")}, **weights}
    wrong = [
        name for name in own.keys() | weights.keys() if own.get(name, _NONE).shape != weights.get(name, _NONE).shape
    ]
    if wrong:
        name = sorted(wrong)[0]
        raise PlanError(
            f"{path} does not fit the model: {name} is {_shape(weights, name)} in the file, {_shape(own, name)} in the "
            f"model ({len(wrong)} such tensors)"
        )
    model.load_state_dict(weights)


_NONE = torch.empty(0, 0, 0, 0, 0, 0, 0)


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return "x".join(map(str, tensors[name].shape)) or "a number" if name in tensors else "absent"
