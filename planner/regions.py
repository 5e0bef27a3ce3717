"""Regions of a forward under `torch.no_grad` or autocast: the exporter makes calls of graphs of them."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from planner.axes import kind

_CALLS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}  # and where the called graph stands
_MARK = "espalier_autocast"


def inline(module: GraphModule) -> None:
    """Put the operations of all regions in the place of their calls; what ran under autocast is marked.

    What is inlined computes as if no region were there: the same but for the precision that an autocast chose.
    """
    for node in list(module.graph.nodes):
        at = _CALLS.get(kind(node)) if node.op == "call_function" else None
        if at is None:
            continue
        body: Any = copy.deepcopy(getattr(module, node.args[at].target))
        inline(body)
        for inner in body.graph.nodes if kind(node) == "wrap_with_autocast" and node.args[2] else ():
            inner.meta[_MARK] = True
        _put(module.graph, node, body.graph, node.args[at + 1 :])


def under_autocast(nodes: Iterable[Node]) -> bool:
    """Whether any of the nodes of an inlined graph ran under autocast."""
    return any(node.meta.get(_MARK, False) for node in nodes)


def _put(graph: torch.fx.Graph, call: Node, body: torch.fx.Graph, given: Any) -> None:
    """Copy the nodes of `body` before a call of it, whose results they replace."""
    values = dict(zip((node for node in body.nodes if node.op == "placeholder"), given, strict=True))
    with graph.inserting_before(call):
        made: Any = graph.graph_copy(body, values)
    for old, new in values.items():
        if isinstance(new, Node) and old.op == "call_function":
            new.meta.update({key: value for key, value in old.meta.items() if key == _MARK})
    for user in list(call.users):
        user.replace_all_uses_with(made[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(call)
