"""What a choice trims off single layers of a network that is only timed: which weights stay does not matter there."""

from torch import arange, nn

from backends import channels, shapes
from planner.operations import Choice, cropped


def with_kernels(model: nn.Module, choice: Choice) -> nn.Module:
    """Return `model` with the kernels that a choice leaves."""
    bounds = {}
    for tensor, keep in _kept(choice, "kernel").items():
        whole = tuple(model.get_parameter(tensor).shape[2:])
        sizes = zip(whole, cropped(whole, keep), strict=True)
        bounds[_layer(tensor)] = tuple(((k - own) // 2, (k + own) // 2) for k, own in sizes)
    bounds = {layer: own for layer, own in bounds.items() if any(first for first, _ in own)}
    return shapes.cropped(model, bounds) if bounds else model


def selecting(model: nn.Module, choice: Choice) -> nn.Module:
    """Return `model` with the layers that read less than all as a choice says."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stays = {}
    for tensor, keep in _kept(choice, "channel").items():
        shape = model.get_parameter(tensor).shape if tensor in names else ()  # else it left with a block
        if shape and keep < shape[1]:
            stays[_layer(tensor)] = (arange(shape[1]) < keep).view(1, -1, *(1 for _ in shape[2:]))
    return channels.selected(model, stays) if stays else model


def _kept(choice: Choice, what: str) -> dict[str, int]:
    """Return what stays of the weights that are trimmed in one way."""
    names = (name.rpartition(" ") for name in choice.keep)
    return {tensor: choice.keep[f"{tensor} {what}"] for tensor, _, own in names if own == what}


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0]
