"""Residual blocks of an exported graph: additions of a shortcut and a body that nothing else uses."""

from collections import Counter
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.fx
from torch import nn
from torch.fx import Node

from planner import arithmetic, indexing, layers, layout
from planner.axes import arg, kind, place, shape
from planner.evaluation import evaluating
from planner.rules import rule_of
from profiles.errors import PlanError

# Where the weight of a layer stands among its arguments, and behind it its bias.
_WEIGHT = {
    **dict.fromkeys([f"conv{n}d" for n in (1, 2, 3)] + [f"conv_transpose{n}d" for n in (1, 2, 3)], 1),
    **dict.fromkeys(("linear", "batch_norm", "instance_norm"), 1),
    **dict.fromkeys(("layer_norm", "group_norm", "rms_norm"), 2),
    "addmm": 2,
}
# The rules of what makes zeros of zeros: functions of each element, moves, pools.
_KEEPING = {
    *(layout.same, layout.reshape, layout.transpose, layout.permute, layout.movedim, layout.expand, layout.repeat),
    *(layout.repeat_interleave, layout.split, layout.slices, layout.select, layout.unbind, layout.roll, layout.flip),
    *(layout.pixel_shuffle, layout.pixel_unshuffle, layout.item, indexing.index, arithmetic.reduce),
    *(layers.pool, layers.glu, layers.prelu, layers.divide),
}
_SUMS = ("cat", "stack", "add", "sub", "maximum", "minimum")
_PRODUCTS = ("mul", "matmul", "bmm", "mm")


@dataclass(frozen=True)
class Block:
    """A residual block: its body can leave, then the bare shortcut remains."""

    name: str  # the module that holds it
    module: str  # the same, without the number that tells several additions of one module apart
    body: frozenset[str]  # names of the nodes that only the body needs
    last: tuple[str, ...]  # the parameters whose zeros make the body's output zero
    stage: str  # blocks of one stage have the same output shape
    modules: frozenset[str]  # the modules that hold the body's parameters
    repeats_relu: bool  # what is left is the ReLU of a ReLU's output: nothing
    where: str
    add: str = ""  # the name of the node that adds body and shortcut
    frozen: str | None = None  # why it cannot leave


def module_path(node: Node) -> str:
    """Return the name of the innermost module that a node was called in."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def find_blocks(
    nodes: Sequence[Node], names: dict[str, str], model: nn.Module, *, inputs: Collection[str]
) -> tuple[Block, ...]:
    """Find every addition of two tensors one of which is a removable body and the other comes from `inputs`."""
    trained = {name for name, _ in model.named_parameters()}
    given = {node for node in nodes if node.name in inputs}
    numbered = _numbered(nodes)
    found: list[Block] = []
    for node in nodes:
        if not _joins(node):
            continue
        left, right = node.all_input_nodes
        sides = [(_body(left, right, node), left, right), (_body(right, left, node), right, left)]
        body, end, shortcut = max(sides, key=lambda side: _layers(side[0]))
        last = _zeroing(end, body, names, trained)
        if _layers(body) and last and given & _ancestors(shortcut):
            block, taken = _block(node, body, last, names), {"", *(block.name for block in found)}
            while block.name in taken:
                block = replace(block, name=f"{block.module}.{numbered[node]}".lstrip("."))
            found.append(block)
    return tuple(replace(block, frozen=_shared(nodes, names, block) or _overwriting(nodes, block)) for block in found)


def _joins(node: Node) -> bool:
    """Whether a node adds two tensors of one shape, neither of them scaled."""
    if kind(node) not in ("add", "add_") or len(node.all_input_nodes) != 2 or node.kwargs.get("alpha", 1) != 1:
        return False
    return all(shape(tensor) == shape(node) for tensor in node.all_input_nodes)


def _shared(nodes: Sequence[Node], names: dict[str, str], block: Block) -> str | None:
    """Return why the body cannot be made zero without harm elsewhere, or None."""
    for node in nodes:
        if names.get(node.name) in block.last:
            for user in node.users:
                if user.name not in block.body:
                    return f"{names[node.name]} is also used by {place(user)}"
    return None


def _overwriting(nodes: Sequence[Node], block: Block) -> str | None:
    """Return why leaving would change what the shortcut passes on, or None: the body writes into it in place."""
    for node in nodes:
        target = node.args[0] if node.name in block.body and kind(node).endswith("_") else None
        if isinstance(target, Node) and target.name not in block.body:
            return f"its {place(node)} overwrites what the shortcut passes on"
    return None


def _numbered(nodes: Sequence[Node]) -> dict[Node, str]:
    """Return a name for each addition of tensors that does not depend on what else is in the graph: "add", "add_1"."""
    counts, found = Counter[str](), {}
    for node in nodes:
        if kind(node) in ("add", "add_") and shape(node):
            count = counts[kind(node)]
            found[node] = f"{kind(node)}_{count}" if count else kind(node)
            counts[kind(node)] += 1
    return found


def _block(add: Node, body: set[Node], last: tuple[str, ...], names: dict[str, str]) -> Block:
    reads = [node for node in body if any(source.name in names for source in node.all_input_nodes)]
    module = _common_module([add, *reads])  # what is made elsewhere for the body alone, such as a mask, is no matter
    tensors = {names[source.name] for node in body for source in node.all_input_nodes if source.name in names}
    modules = frozenset(tensor.rpartition(".")[0] for tensor in tensors)
    stage = "x".join(map(str, shape(add)[1:]))
    (shortcut,) = set(add.all_input_nodes) - body
    relu = all(kind(user).rstrip("_") == "relu" for user in add.users) and kind(shortcut).rstrip("_") == "relu"
    inside = frozenset(node.name for node in body)
    return Block(module, module, inside, last, stage, modules, relu, place(add), add.name)


def _body(end: Node, other: Node, add: Node) -> set[Node]:
    """Return the nodes that only `add` needs, through `end` and not through `other`."""
    behind = _ancestors(end) - _ancestors(other)
    body: set[Node] = set()
    for node in sorted(behind, reverse=True):  # fx orders nodes by their place in the graph
        users = [user for user in node.users if kind(user) != "_assert_tensor_metadata"]
        if node.op == "call_function" and all(user in body or user is add for user in users):
            body.add(node)
    return body


def _ancestors(node: Node) -> set[Node]:
    seen, pending = {node}, [node]
    while pending:
        new = [source for source in pending.pop().all_input_nodes if source not in seen]
        seen.update(new)
        pending += new
    return seen


def _layers(body: set[Node]) -> int:
    """Return how many layers with parameters a side has: the side with more is the body."""
    return sum(kind(node) in _WEIGHT for node in body)


def _zeroing(end: Node, body: set[Node], names: dict[str, str], trained: Container[str]) -> tuple[str, ...]:
    """Return the parameters, the last ones of the body, whose zeros make `end` zero; none if no such are known."""
    found: dict[Node, tuple[str, ...]] = {}
    for node in sorted(body):
        ways = (_known(way, found, names, trained) for way in _ways(node, names))
        found[node] = next((own for own in ways if own), ())
    return found.get(end, ())


def _known(
    way: Sequence[object], found: Mapping[Node, tuple[str, ...]], names: dict[str, str], trained: Container[str]
) -> tuple[str, ...]:
    """Return the parameters that make all of some tensors zero, or none."""
    parts = []
    for source in way:
        own = names.get(source.name) if isinstance(source, Node) else None
        known = found.get(source, ()) if isinstance(source, Node) else ()
        parts.append((own,) if own is not None and own in trained else known)
    return tuple(dict.fromkeys(name for part in parts for name in part)) if parts and all(parts) else ()


def _ways(node: Node, names: dict[str, str]) -> list[list[Any]]:
    """Return sets of what a node reads, each of which makes it zero if all in it are zero; what is last comes first."""
    name = kind(node).rstrip("_")
    given: Any = node.args
    if name in _WEIGHT:
        at = _WEIGHT[name]
        bias = given[0] if name == "addmm" else arg(node, at + 1, "bias")
        own = [x for x in (arg(node, at, "weight"), bias) if x is not None]
        ways = [own] if arg(node, at, "weight") is not None else []
        return ways if name == "batch_norm" or bias is not None else [*ways, [given[0]]]
    if name in _SUMS:
        return [list(given[0] if isinstance(given[0], list | tuple) else given[:2])]
    if name in _PRODUCTS:  # scales first: they are of the body as a whole, or of each channel
        return [[factor] for factor in sorted(given[:2], key=lambda factor: not _is_scale(factor, names))]
    if name == "scaled_dot_product_attention":
        return [[given[2]]]
    if name == "einsum":
        return [[factor] for factor in sorted(given[1], key=lambda factor: not _is_scale(factor, names))]
    if name == "_weight_norm":
        return [[given[1]]]
    return [[given[0]]] if _keeps_zero(node) else []


def _keeps_zero(node: Node) -> bool:
    return node.op == "call_function" and rule_of(node) in _KEEPING


def _is_scale(factor: object, names: dict[str, str]) -> bool:
    while isinstance(factor, Node) and _keeps_zero(factor):
        factor = factor.args[0]
    return isinstance(factor, Node) and factor.name in names


def _common_module(nodes: Sequence[Node]) -> str:
    """Return the innermost module that was running at every node."""
    stacks = [[str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()] for node in nodes]
    common = ""
    for paths in zip(*stacks, strict=False):
        if len(set(paths)) > 1:
            break
        common = paths[0]
    return common


def bare_shortcut(module: nn.Module, blocks: Sequence[Block]) -> nn.Module:
    """Return `module` without the bodies of `blocks`, as an ordinary module that keeps the names of what remains.

    What its forward does in training mode alone, beyond its submodules, is lost. Raises PlanError if the forward cannot
    be followed by torch.fx or holds no such addition.
    """
    try:
        with evaluating(module):
            traced = torch.fx.symbolic_trace(module)
    except Exception as error:
        raise PlanError(f"block {blocks[0].name} cannot leave: torch.fx cannot follow it: {error}") from error
    traced.training = module.training
    for block in blocks:
        prefix = f"{block.module}." if block.module else ""
        _drop_body(traced, {name.removeprefix(prefix) for name in block.modules}, block)
    if all(block.repeats_relu for block in blocks) and _is_relu(traced):
        return nn.Identity().train(module.training)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _drop_body(traced: torch.fx.GraphModule, body: set[str], block: Block) -> None:
    """Replace the addition without whose body exactly the modules `body`, and such without weights, are unused."""
    before = _used(traced, traced.graph)
    for index, node in enumerate(traced.graph.nodes):
        for side in (0, 1) if _adds(node) else ():
            trial, copied = torch.fx.Graph(), dict[Node, Node]()
            output = trial.graph_copy(traced.graph, copied)
            trial.output(output)
            _bypass(copied[node], side)
            trial.eliminate_dead_code(_has_effect)
            if before - _used(traced, trial) == body:
                _refuse_overwritten(traced, {node for node, copy in copied.items() if copy in trial.nodes}, block)
                _bypass(list(traced.graph.nodes)[index], side)
                traced.graph.eliminate_dead_code(_has_effect)
                return
    raise PlanError(f"block {block.name} cannot leave: no addition at {block.where} that can be bypassed")


def _refuse_overwritten(traced: torch.fx.GraphModule, stay: set[Node], block: Block) -> None:
    """Raise PlanError if a node that leaves writes into what stays."""
    for node in set(traced.graph.nodes) - stay:
        module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        inplace = getattr(module, "inplace", False) or node.kwargs.get("inplace", False)
        if (inplace or kind(node).endswith("_")) and stay.intersection(node.all_input_nodes):
            raise PlanError(f"block {block.name} cannot leave: its {kind(node)} overwrites what the shortcut passes on")


def _has_effect(node: Node) -> bool:
    return node.op in ("placeholder", "output")  # a body's dropout or in-place activation leaves with it


def _bypass(node: Node, side: int) -> None:
    node.replace_all_uses_with(node.all_input_nodes[side])


def _adds(node: Node) -> bool:
    return node.op.startswith("call_") and kind(node).rstrip("_") in ("add", "iadd") and len(node.all_input_nodes) == 2


def _used(traced: torch.fx.GraphModule, graph: torch.fx.Graph) -> set[str]:
    """Return the modules with weights that a graph calls."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    return {path for path in called if traced.get_submodule(path).state_dict()}


def _is_relu(traced: torch.fx.GraphModule) -> bool:
    calls = [node for node in traced.graph.nodes if node.op.startswith("call_")]
    names = [type(traced.get_submodule(str(n.target))).__name__ if n.op == "call_module" else kind(n) for n in calls]
    return len(names) == 1 and names[0].lower().rstrip("_") == "relu"
