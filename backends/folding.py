"""BatchNorm folded into the convolution or linear layer before it, in the graphs that torch.export makes."""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from backends.samples import Inputs
from backends.subnormals import flush_
from profiles.errors import BuildError

__all__ = ["exported", "fold_"]

_PLAIN = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
_GROUPS = 6  # the place of a transposed convolution's groups among its arguments


def exported(module: nn.Module, inputs: Inputs) -> tuple[Any, int]:
    """Return `module`, which evaluates, as a graph of ATen operations, and the subnormals that were set to 0.

    BatchNorm is folded; the graph holds the tensors of `module` that need no change. BuildError if it cannot be made.
    """
    try:
        graph = torch.export.export(module, inputs, strict=False).module(check_guards=False)
    except Exception as error:  # torch.export raises what it likes
        raise BuildError(f"the model cannot be exported: {error}") from error
    with torch.no_grad():
        fold_(graph)
        count = sum(map(flush_, (*graph.parameters(), *graph.buffers())))
    return graph, count


def fold_(graph: GraphModule) -> int:
    """Fold in place what can be, delete the tensors that nothing reads any more, and return how many were folded.

    A BatchNorm stays that uses the statistics of its batch, that has no such layer before it, or whose layer computes
    its weight or is read by something else too. Layers that share a weight get one each. Computed in fp64, so that the
    only error is that of rounding to the type of the weight.
    """
    norms = [node for node in graph.graph.nodes if _name(node) == "batch_norm" and _foldable(node)]
    for norm in norms:
        _fold_(graph, norm)
    if norms:
        graph.graph.eliminate_dead_code()
        _forget_unread_(graph)
        graph.recompile()
    return len(norms)


def _name(node: Node) -> str:
    return str(getattr(node.target, "_opname", "")) if node.op == "call_function" else ""


def _foldable(norm: Node) -> bool:
    args: Any = norm.args  # those of an operation of ATen
    layer, *affine, training = args[:6]
    if training or not isinstance(layer, Node) or _name(layer) not in _PLAIN | _TRANSPOSED:
        return False
    held = [each for each in (*_weight_and_bias(layer), *affine) if each is not None]
    constant = all(each.op == "get_attr" for each in held) and not layer.kwargs
    # Without a batch, or with rows between, the axis that is normalised is not that of the weight's outputs.
    return constant and len(layer.users) == 1 and layer.meta["val"].dim() == held[0].meta["val"].dim()


def _fold_(graph: GraphModule, norm: Node) -> None:
    """Scale the weight of the layer before `norm`, shift its bias, and let it stand for both."""
    args: Any = norm.args
    layer: Node = args[0]
    tensors: list[Any] = [
        None if node is None else attrgetter(node.target)(graph).detach().double()
        for node in (*_weight_and_bias(layer), *args[1:5])
    ]
    weight, bias, gamma, beta, mean, variance = tensors
    scale = (1.0 if gamma is None else gamma) / torch.sqrt(variance + args[7])
    shift = (0.0 if beta is None else beta) - mean * scale + (0.0 if bias is None else bias * scale)
    with graph.graph.inserting_before(layer):
        own = _kept(graph, layer, "weight", weight * _per_output(layer, weight, scale))
        layer.args = (layer.args[0], own, _kept(graph, layer, "bias", shift), *layer.args[3:])
    norm.replace_all_uses_with(layer)
    graph.graph.erase_node(norm)


def _weight_and_bias(layer: Node) -> tuple[Any, Any]:
    return layer.args[1], layer.args[2] if len(layer.args) > 2 else None


def _per_output(layer: Node, weight: Tensor, scale: Tensor) -> Tensor:
    """Return `scale`, one number per output, in the shape that multiplies the weight."""
    after = [1] * (weight.dim() - 2)
    if _name(layer) in _PLAIN:
        return scale.view(-1, 1, *after)
    args: Any = layer.args
    groups = args[_GROUPS] if len(args) > _GROUPS else 1  # the weight is (inputs, outputs / groups)
    return scale.view(groups, -1).repeat_interleave(len(weight) // groups, 0).view(*weight.shape[:2], *after)


def _kept(graph: GraphModule, layer: Node, name: str, value: Tensor) -> Node:
    """Put a tensor into the graph's module, in the type and layout of the layer's weight, and return its reader."""
    source: Any = layer.args[1]
    like = attrgetter(source.target)(graph)
    held = torch.empty_like(like) if name == "weight" else torch.empty_like(value, dtype=like.dtype)
    own = f"{layer.name}_folded_{name}"
    graph.register_parameter(own, nn.Parameter(held.copy_(value), requires_grad=False))
    node = graph.graph.get_attr(own)
    node.meta["val"] = source.meta["val"].fake_mode.from_tensor(getattr(graph, own), static_shapes=True)
    return node


def _forget_unread_(graph: GraphModule) -> None:
    parts = [(f"{name}." * bool(name), part) for name, part in graph.named_modules() if isinstance(part, GraphModule)]
    read = {prefix + str(node.target) for prefix, part in parts for node in part.graph.find_nodes(op="get_attr")}
    held = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    for name, _ in held:
        if name not in read:
            owner, _, own = name.rpartition(".")
            delattr(graph.get_submodule(owner), own)
