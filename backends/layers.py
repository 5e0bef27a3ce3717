"""Layers that others take the place of: which can be replaced, by what name, and what happens where that is wrong."""

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from backends.record import records
from profiles.errors import BuildError

log = logging.getLogger(__name__)
CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def own_forward(layer: nn.Module, kinds: tuple[type[nn.Module], ...] = CONVOLUTIONS) -> bool:
    """Whether a module is of one of these kinds and computes what PyTorch's do, from a weight that is a parameter."""
    kind: Any = next((k for k in kinds if isinstance(layer, k)), None)
    if kind is None or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    own: Any = type(layer)
    weight = layer._parameters.get("weight")
    same = own.forward is kind.forward and getattr(own, "_conv_forward", None) is getattr(kind, "_conv_forward", None)
    return same and weight is not None and weight.is_floating_point()


def weight_of(layer: str) -> str:
    """Return the name of a layer's weight."""
    return f"{layer}.weight".lstrip(".")


def replaced(model: nn.Module, made: Mapping[int, nn.Module]) -> nn.Module:
    """Return `model` with new modules in the place of those of these ids."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        new = made.get(id(module), module)
        if new is not module and path:
            model.set_submodule(path, new)
    whole = made.get(id(model), model)
    vars(whole).update(records(model))
    return whole


def as_many(
    make: Callable[[nn.Module, Collection[str]], nn.Module], model: nn.Module, names: Collection[str]
) -> nn.Module:
    """Return what `make` makes of `model` and all names, or of one after the other, without those for which it raises.

    These keep their zeros, and a warning says why.
    """
    if not names:
        return model
    try:
        return make(model, names)
    except BuildError as error:
        if len(names) == 1:
            log.warning("%s: zeros stay in place: %s", next(iter(names)), error)
            return model
    for name in names:
        model = as_many(make, model, [name])
    return model
