"""Optimizer state for a rebuilt model: momentum and moments of the weights that stay."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backends.rebuild import masks_of
from backends.record import CROPPED, KEPT, SELECTED
from backends.shapes import GatheredConv2d
from planner.graph import Graph, aliases
from profiles.errors import PlanError

Own = TypeVar("Own", bound=Optimizer)
_SQUARED = ("sq", "square", "sum", "var")  # parts of the names of what is in squares of the gradient


def carry_over(optimizer: Own, model: nn.Module, dense: nn.Module, *, graph: Graph) -> Own:
    """Return an optimizer like that of `model`, for `dense`, that goes on where it is: s'[i] = s[kept[i]].

    `dense` is what `rebuild`, and then `crop`, `gather` or `select`, made of `model`; `graph` is `plan.graph(model)`.
    The new optimizer is of the same class, with the same parameter groups in the same order and with their options;
    what left the model left its group. State of the shape of a parameter, or of its shape with some axes 1, is cut like
    it; numbers such as the count of steps are copied. Parameters that are not the model's own stay in it, those without
    state have none, and a weight of several names is one. A proximal step and other hooks are not carried over.

    A scheduler holds its optimizer and has to be made again: `new = StepLR(carried, 30)`, then
    `new.load_state_dict(old.state_dict())`, and, as making it changes learning rates,
    `for group, lr in zip(carried.param_groups, old.get_last_lr()): group["lr"] = lr`.

    Raises PlanError, naming the parameter, if `dense` is not of `model`, or if state is of another shape (L-BFGS).
    """
    stays = _stays(model, dense, graph)
    own = {id(parameter) for parameter in model.parameters()}
    kept = [[p for p in group["params"] if id(p) in stays or id(p) not in own] for group in optimizer.param_groups]
    groups = [_group(group, old, stays) for group, old in zip(optimizer.param_groups, kept, strict=True)]
    new = _like(optimizer, groups)
    for old in (parameter for group in kept for parameter in group if parameter in optimizer.state):
        stay = stays.get(id(old))
        state = optimizer.state[old].items()
        new.state[stay.new if stay else old] = {
            key: stay.state(key, x) if stay else copy.deepcopy(x) for key, x in state
        }
    return new


@dataclass(frozen=True)
class _Stay:
    """What became of one parameter."""

    name: str
    old: nn.Parameter
    new: nn.Parameter
    masks: Mapping[int, Tensor]  # axis -> which elements stay, where some do not
    gathered: GatheredConv2d | None  # that holds it now
    factor: float = 1.0  # new = factor · what stays of the old: the scale of a root-mean-square normalisation

    def state(self, key: str, value: object) -> object:
        """Return what stays of one entry of the optimizer's state for it."""
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        if value.shape != self.old.shape and value.numel() == 1:
            return value.clone()
        sizes = zip(value.shape, self.old.shape, strict=False)
        follows = value.dim() == self.old.dim() and all(size in (1, whole) for size, whole in sizes)
        if not follows or (self.gathered is not None and value.shape != self.old.shape):
            raise PlanError(
                f"the optimizer's {key} of {self.name} has shape {tuple(value.shape)}, which does not follow that of "
                f"the parameter, {tuple(self.old.shape)}; start a new optimizer"
            )
        part = self.part(value).to(self.new.device)
        if self.factor == 1:
            return part
        return part / (self.factor**2 if any(word in key for word in _SQUARED) else self.factor)

    def part(self, value: Tensor) -> Tensor:
        """Return what stays of a tensor of the old parameter's shape, some axes of which may be 1."""
        value = value.detach()
        for axis, mask in self.masks.items():
            if value.shape[axis] == len(mask):
                value = value.index_select(axis, mask.nonzero().flatten().to(value.device))
        return self.gathered.take(value) if self.gathered is not None else value.clone()


def _stays(model: nn.Module, dense: nn.Module, graph: Graph) -> dict[int, _Stay]:
    """Return what became of the parameters that did not leave, by their ids."""
    kept: dict[str, Tensor] = getattr(dense, KEPT, {})
    if unknown := sorted(set(kept) - set(graph.width)):
        raise PlanError(
            f"the graph has no width {unknown[0]}, which the rebuilt model keeps a part of; give the model's own"
        )
    masks: dict[str, dict[int, Tensor]] = {}
    for (tensor, axis), mask in masks_of(graph, kept).items():
        masks.setdefault(tensor, {})[axis] = mask
    choice = graph.choice({name: len(channels) for name, channels in kept.items()})
    factors = {path: (n.under(graph.dense) / n.under(choice)) ** 0.5 for path, n in graph.counted}
    found, others = {}, dict(dense.named_parameters(remove_duplicate=False))
    names = aliases(model)
    for name, old in model.named_parameters():
        if here := next((other for other in names[name] if other in others), None):
            path = here.rpartition(".")[0]
            owner = dense.get_submodule(path)
            own = _selected(dense, old, names[name], masks.get(name, {}) | _cropped(dense, old, names[name]))
            gathered = owner if isinstance(owner, GatheredConv2d) and here.endswith("weight") else None
            found[id(old)] = _checked(_Stay(name, old, others[here], own, gathered), factors.get(path, 1.0))
    return found


def _cropped(dense: nn.Module, old: nn.Parameter, names: list[str]) -> dict[int, Tensor]:
    """Return which positions stay of a kernel that was cropped."""
    bounds = next((own for name, own in getattr(dense, CROPPED, {}).items() if name in names), ())
    masks = {}
    for axis, (first, end) in enumerate(bounds, old.dim() - len(bounds)):
        masks[axis] = torch.zeros(old.shape[axis], dtype=torch.bool)
        masks[axis][first:end] = True
    return masks


def _selected(dense: nn.Module, old: nn.Parameter, names: list[str], masks: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return the masks of a weight, along its input channels with those alone that are selected of what stays."""
    stays = next((own for name, own in getattr(dense, SELECTED, {}).items() if name in names), None)
    if stays is None:
        return masks
    axis = next(i for i, size in enumerate(stays.shape) if size > 1)
    mask = masks.get(axis, torch.ones(old.shape[axis], dtype=torch.bool)).clone()
    if int(mask.sum()) == stays.numel():  # else its shapes are found not to fit
        mask[mask.nonzero().flatten()] = stays.flatten()
    return {**masks, axis: mask}


def _checked(stay: _Stay, factor: float) -> _Stay:
    """Return `stay` with the factor that it was multiplied by; raises PlanError if its shapes do not fit."""
    fits = all(len(mask) == stay.old.shape[axis] for axis, mask in stay.masks.items())
    part = stay.part(stay.old) if fits else stay.old.detach()
    if not fits or part.shape != stay.new.shape:
        raise PlanError(
            f"{stay.name} has shape {tuple(stay.new.shape)} in the rebuilt model, and not {tuple(part.shape)}, what it "
            "keeps of it; give the model that it was rebuilt from, and that model's graph"
        )
    new, part = stay.new.detach(), part.to(stay.new.device)
    if factor != 1 and (new - factor * part).norm() < (new - part).norm():
        return _Stay(stay.name, stay.old, stay.new, stay.masks, stay.gathered, factor)
    return stay


def _group(group: Mapping[str, Any], kept: list[nn.Parameter], stays: Mapping[int, _Stay]) -> dict[str, Any]:
    """Return a parameter group with its options and the new parameters, named if the old ones were."""
    options = {key: copy.deepcopy(x) for key, x in group.items() if key not in ("params", "param_names")}
    new = [stays[id(old)].new if id(old) in stays else old for old in kept]
    if "param_names" not in group:
        return {**options, "params": new}
    names = {id(old): name for old, name in zip(group["params"], group["param_names"], strict=True)}
    return {**options, "params": [(names[id(old)], own) for old, own in zip(kept, new, strict=True)]}


def _like(optimizer: Own, groups: list[dict[str, Any]]) -> Own:
    """Return an optimizer of the same class and defaults."""
    accepted = inspect.signature(type(optimizer)).parameters
    defaults = {key: copy.deepcopy(x) for key, x in optimizer.defaults.items() if key in accepted}
    try:
        return type(optimizer)(groups, **defaults)
    except (TypeError, ValueError) as error:
        raise PlanError(f"a {type(optimizer).__name__} cannot be made from its defaults: {error}") from error
