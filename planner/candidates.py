"""Candidates: the numbers of channels that are useful to keep on a device."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from planner.blocks import Block
from planner.graph import Graph
from planner.resources import Resource, Term, widths_of
from planner.scope import Scope
from planner.structures import Depth, of_width
from planner.widths import Width
from profiles import Profile
from profiles.errors import PlanError

MOST = 12  # candidates per width
_FEW = 2  # widths on one axis


def paying(graph: Graph, profile: Profile, scope: Scope) -> tuple[Graph, tuple[str, ...]]:
    """Return the graph without the structures that do not pay on the device, unless forced, and what was left out.

    Raises PlanError if nothing is left of what could be cut, nor can any layer be trimmed.
    """
    parts: list[Width | Block] = [*graph.cuttable, *(block for block in graph.blocks if not block.frozen)]
    refused: dict[str, str] = {}
    for part in parts:
        kind = of_width(part).profile_kind if isinstance(part, Width) else Depth.profile_kind
        known = profile.pays(kind)
        if known is not None and known.pays == "no" and not scope.force:
            refused[part.name] = f"cutting {kind} does not pay on {profile.id}"
    if parts and len(refused) == len(parts) and not graph.trims:
        raise PlanError(
            f"{next(iter(refused.values()))}, and nothing else can be cut; Scope(force=True) plans it anyway"
        )
    widths = tuple(replace(w, frozen=w.frozen or refused.get(w.name)) for w in graph.widths)
    blocks = tuple(replace(b, frozen=b.frozen or refused.get(b.name)) for b in graph.blocks)
    return replace(graph, widths=widths, blocks=blocks), tuple(dict.fromkeys(refused.values()))


def candidates(graph: Graph, profile: Profile, scope: Scope | None = None) -> dict[str, tuple[int, ...]]:
    """Return for each width what the profile holds useful, the dense one last.

    That is the multiples of the profile's quantum, and one half of it, which padding may still reward, but not where a
    width is joined with many others: there it only shifts where steps begin. The stream of a residual network (a width
    that its blocks add to) counts as any other.
    """
    found = {}
    sides = [side for operation in graph.operations for side in (operation.inputs, operation.outputs)]
    joined = {name for side in sides if len(side.parts) > _FEW for name, _ in side.parts}
    for width in graph.cuttable:
        least = min(width.size, scope.at_least(width) if scope else 1)
        counts = _multiples(width.size, quantum(graph, profile, width), half=width.name not in joined)
        found[width.name] = tuple(count for count in counts if count >= least)
    return found


def quantum(graph: Graph, profile: Profile, width: Width) -> int:
    """Return the least common multiple of the quanta of all operations that make or read a width, per channel of it."""
    quanta = [1]
    for operation in graph.operations:
        for axis, extent in (("out_channels", operation.outputs), ("in_channels", operation.inputs)):
            for name, times in extent.parts:
                if name == width.name:
                    q = profile.quantum(operation.kind, axis, operation.kernel)
                    quanta.append(q // math.gcd(q, times))
    return math.lcm(*quanta)


def _multiples(size: int, quantum: int, *, half: bool) -> tuple[int, ...]:
    step = quantum * max(1, math.ceil(size / quantum / MOST))
    found = {size, *range(step, size, step)}
    if half and quantum > 1 and quantum // 2 < size:
        found.add(quantum // 2)
    return tuple(sorted(found))


def useful(graph: Graph, times: Sequence[Resource], options: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Drop candidates that cost as much as a wider one in every sum of every device: the rest are tops of its steps."""
    every = [terms for time in times for terms in time.sums]
    touching: dict[str, list[list[Term]]] = {name: [[] for _ in every] for name in options}
    for index, terms in enumerate(every):
        for term in terms:
            for name in widths_of(term.extents):
                if name in touching:
                    touching[name][index].append(term)
    kept = {}
    for name, counts in options.items():
        tops: list[tuple[int, list[float]]] = []
        for count in sorted(counts, reverse=True):
            trial = graph.choice({name: count})
            cost = [sum(term.under(trial) for term in own) for own in touching[name]]
            if not any(all(a <= b for a, b in zip(wider, cost, strict=True)) for _, wider in tops):
                tops.append((count, cost))
        kept[name] = tuple(count for count, _ in reversed(tops))
    return kept
