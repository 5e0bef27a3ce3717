"""Shapes that a device dislikes: what a profile marks as rejected or as a cliff, told by layer before compiling."""

from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.fx import GraphModule, Node

if TYPE_CHECKING:
    from profiles.schema import Granularity, Profile

__all__ = ["beside_the_grid"]


def beside_the_grid(model: nn.Module, profile: "Profile") -> tuple[str, ...]:
    """Return one sentence for each layer and axis of `model` that the profile rejects or lets fall off a cliff.

    Seen are convolutions and linear layers, as modules and in exported graphs, which a rebuilt model may be. A rule's
    `when` is for people and cannot be evaluated, so it is quoted.
    """
    return tuple(
        _told(name, width, rule)
        for name, weight, groups in _layers(model)
        for op, axis, width in _axes(tuple(weight.shape), groups)
        for rule in profile.rules(op, axis)
        if rule.mode in ("cliff", "reject") and rule.about(width) and width % rule.quantum
    )


def _layers(model: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Yield name, weight and groups of each layer."""
    for name, module in model.named_modules():
        if isinstance(module, GraphModule):
            yield from _nodes(name, module)
        elif isinstance(module, nn.Linear):
            yield name, module.weight, 1
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            yield name, module.weight, module.groups


def _nodes(name: str, module: GraphModule) -> Iterator[tuple[str, Tensor, int]]:
    for node in module.graph.nodes:
        kind = str(node.target).split(".")[:2]
        if node.op != "call_function" or kind not in (["aten", "linear"], ["aten", "conv1d"], ["aten", "conv2d"]):
            continue
        weight = node.args[1]
        if isinstance(weight, Node) and weight.op == "get_attr":  # else it is computed, and no layer's own
            path = str(weight.target)
            groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
            yield f"{name}.{path}".strip(".").removesuffix(".weight"), attrgetter(path)(module), groups


def _axes(shape: tuple[int, ...], groups: int) -> Iterator[tuple[str, str, int]]:
    """Yield operation, axis and width, counted as profiles do: per group, or altogether where it is depthwise."""
    outputs, inputs, op = shape[0], shape[1] * groups, ("linear", "conv1d", "conv2d")[len(shape) - 2]
    if groups > 1 and op == "conv2d":
        depthwise = groups == inputs
        op, groups = ("depthwise_conv2d", 1) if depthwise else ("grouped_conv2d", groups)
    else:
        groups = 1
    yield op, "in_channels", inputs // groups
    yield op, "out_channels", outputs // groups


def _told(name: str, width: int, rule: "Granularity") -> str:
    then = rule.fallback or ("it leaves the accelerator" if rule.mode == "reject" else "another kernel runs")
    when = f" ({rule.when})" if rule.when else ""
    return (
        f"{name}: {rule.axis} {width} of a {rule.op} is no multiple of {rule.quantum}{when}: "
        f"{rule.mode}, {then} ({rule.confidence})"
    )
