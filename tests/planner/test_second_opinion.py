"""Where torch-pruning is right, it ties the same elements of the same layers as our graph does."""

import pytest
import torch_pruning as tp
from torch import nn

from planner.graph import Graph, trace

from ..zoo import ZOO

NETS = ["plain_cnn", "resnet_b", "resnet_bottleneck", "densenet", "unet", "googlenet", "se_resnet", "hrnet"]
Tied = set[tuple[str, int, int]]  # (layer, axis of its weight, position)


def ours(graph: Graph, layer: str, channel: int) -> Tied | None:
    """Return what is tied to a filter of a layer; None if it cannot be cut."""
    for width in graph.cuttable:
        for piece in width.slices:
            if (piece.tensor, piece.axis) == (f"{layer}.weight", 0) and piece.units[channel] >= 0:
                return {
                    (own.tensor.removesuffix(".weight"), own.axis, position)
                    for own in width.slices
                    if own.tensor.endswith(".weight")
                    for position in (own.units == piece.units[channel]).nonzero()[0].tolist()
                }
    return None


def theirs(model: nn.Module, dependencies: tp.DependencyGraph, layer: str, channel: int) -> Tied:
    """Return the same as torch-pruning sees it."""
    names = {module: name for name, module in model.named_modules()}
    module = model.get_submodule(layer)
    prune = tp.prune_conv_out_channels if isinstance(module, nn.Conv2d) else tp.prune_linear_out_channels
    found: Tied = set()
    for dependency, positions in dependencies.get_pruning_group(module, prune, idxs=[channel]):
        target = dependency.target.module
        if isinstance(target, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.ConvTranspose2d):
            outgoing = "out_channels" in dependency.handler.__name__
            axis = (not outgoing) ^ isinstance(target, nn.ConvTranspose2d)
            found |= {(names[target], int(axis), int(position)) for position in positions}
    return found


@pytest.mark.parametrize("name", NETS)
def test_both_tie_the_same(name: str) -> None:
    net = ZOO[name]
    model, inputs = net.build(), net.inputs()
    graph = trace(model, inputs)
    dependencies = tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
    compared = 0
    for layer, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and (tied := ours(graph, layer, 1)) is not None:
            assert tied == theirs(model, dependencies, layer, 1), layer
            compared += 1
    assert compared > 1
