"""Shapes that a device dislikes: what a profile marks as rejected or as a cliff, told by layer before compiling."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from profiles.schema import Granularity, Profile

__all__ = ["beside_the_grid"]


def beside_the_grid(model: nn.Module, profile: "Profile") -> tuple[str, ...]:
    """Return one sentence for each layer and axis of `model` that the profile rejects or lets fall off a cliff.

    Seen are convolution and linear modules. A rule's `when` is for people and cannot be evaluated, so it is quoted.
    """
    return tuple(
        _told(name, width, rule)
        for name, module in model.named_modules()
        for op, axis, width in _axes(module)
        for rule in profile.rules(op, axis)
        if rule.mode in ("cliff", "reject") and width >= rule.at_least and width % rule.quantum
    )


def _axes(module: nn.Module) -> Iterator[tuple[str, str, int]]:
    if isinstance(module, nn.Linear):
        yield "linear", "in_channels", module.in_features
        yield "linear", "out_channels", module.out_features
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        op, groups = "conv1d" if isinstance(module, nn.Conv1d) else "conv2d", 1
        if module.groups > 1 and isinstance(module, nn.Conv2d):
            depthwise = module.groups == module.in_channels
            # A profile counts the channels of a group, and those of a depthwise convolution altogether.
            op, groups = ("depthwise_conv2d", 1) if depthwise else ("grouped_conv2d", module.groups)
        yield op, "in_channels", module.in_channels // groups
        yield op, "out_channels", module.out_channels // groups


def _told(name: str, width: int, rule: "Granularity") -> str:
    then = rule.fallback or ("it leaves the accelerator" if rule.mode == "reject" else "another kernel runs")
    when = f" ({rule.when})" if rule.when else ""
    return (
        f"{name}: {rule.axis} {width} of a {rule.op} is no multiple of {rule.quantum}{when}: "
        f"{rule.mode}, {then} ({rule.confidence})"
    )
