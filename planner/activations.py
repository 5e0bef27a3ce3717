"""Activations that are in memory at once: what a run needs at its peak.

An activation lives from the node that makes it to the last that reads it. Views and what is computed element by element
from an activation that nothing else reads lie in its place, as compilers arrange it; a sum with a residual block's body
lies in the place of the shortcut, which is what remains of it when the block leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from planner.axes import Propagation, kind
from planner.blocks import Block
from planner.operations import FREE, Extent, Measure, numel, side_of

_IN_PLACE = frozenset(
    "batch_norm add sub mul div relu relu6 hardtanh hardswish hardsigmoid silu gelu sigmoid tanh elu leaky_relu prelu "
    "clamp neg exp softmax layer_norm group_norm".split()
)


@dataclass(frozen=True)
class Activation:
    """A tensor that a run holds: `per_channel` elements for each of its channels."""

    channels: Extent
    per_channel: int
    blocks: frozenset[str]  # it is not made without these


def find_alive(
    nodes: Sequence[Node], state: Propagation, extent: Measure, blocks: Sequence[Block]
) -> tuple[tuple[Activation, ...], ...]:
    """Return the sets of activations that are alive at once, without those that lie within another set."""
    order = {node: i for i, node in enumerate(nodes)}
    held = [n for n in nodes if numel(n) and n not in state.constants and state.name(n) is None]
    owner = _owners(held, {block.add: block for block in blocks})
    last: dict[Node, int] = {}
    for node in held:
        end = max((order[user] for user in node.users if user in order), default=order[node])
        last[owner[node]] = max(last.get(owner[node], 0), end)
    made: dict[Node, Activation] = {}
    for node in dict.fromkeys(owner.values()):
        units, channels = side_of(state, node)
        inside = frozenset(b.name for b in blocks if node.name in b.body)
        made[node] = Activation(extent(units, channels), numel(node) // channels, inside)
    found: list[frozenset[Node]] = []
    for node in held:
        now = order[node]
        found.append(frozenset(o for o in made if order[o] <= now <= last[o]))
    sets = [one for one in dict.fromkeys(found) if not any(one < other for other in found)]
    return tuple(tuple(made[node] for node in sorted(one, key=order.__getitem__)) for one in sets)


def _owners(nodes: Sequence[Node], sums: dict[str, Block]) -> dict[Node, Node]:
    """Return for each node the one in whose place its result lies."""
    owner: dict[Node, Node] = {}
    for node in nodes:
        sources = [source for source in node.all_input_nodes if source in owner]
        if node.name in sums:
            sources.sort(key=lambda source: source.name in sums[node.name].body)
        name = kind(node)
        if sources and (name in FREE or name.endswith("_")):
            owner[node] = owner[sources[0]]
            continue
        dying = [s for s in sources if len(s.users) == 1 or list(s.users)[-1] is node]
        if node.name in sums:
            dying = [s for s in dying if s.name not in sums[node.name].body]
        same = [s for s in dying if numel(s) == numel(node)]
        owner[node] = owner[same[0]] if name.rstrip("_") in _IN_PLACE and same else node
    return owner
