"""Widths: numbers of channels that can be cut, found in the units that planner.rules followed through a model."""

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.fx import Node

from planner.axes import Ids, Propagation, Slice, kind, place
from planner.blocks import Block, module_path
from planner.operations import Extent


@dataclass(frozen=True)
class Width:
    """A number of channels (or features) that can be cut: `size` groups, each owning slices of several parameters."""

    name: str  # the module that makes it
    size: int
    slices: tuple[Slice, ...]  # units are group numbers 0..size-1 of this width, -1 elsewhere
    frozen: str | None  # why it cannot be cut
    makers: tuple[str, ...]  # every module whose outputs are tied in it
    block: str | None  # the residual block that it lies in wholly
    structure: Literal["filter", "hidden", "head", "embedding"] = "filter"
    streams: bool = False  # residual blocks add to it
    ties: tuple[str, ...] = ()  # the operations that tie its parts, with file:line
    lossy: str | None = None  # why removing its channels changes the output although their weights are zero

    @property
    def is_stream(self) -> bool:
        """Whether it is the stream of a residual network, which blocks add to."""
        return self.structure == "embedding" or self.streams


@dataclass(frozen=True)
class Labels:
    """What every unit belongs to."""

    group: Ids  # (units,) units tied together
    width: Ids  # (groups,) the width that each group is a channel of, -1 if of none
    number: Ids  # (groups,) its number there


def _label(state: Propagation, pairs: list[Ids]) -> Ids:
    left, right = np.concatenate([np.zeros((2, 0), np.int64), *pairs], axis=1)
    links = coo_array((np.ones(len(left)), (left, right)), shape=(state.count, state.count))
    labels: Ids = connected_components(links, directed=False)[1].astype(np.int64)
    return labels


def components(state: Propagation) -> Ids:
    """Return the group of every unit: units that are tied together."""
    return _label(state, state.ties)


def labels_of(state: Propagation) -> Labels:
    """Number the groups, and the widths: groups of common producers that appear equally often everywhere."""
    group = components(state)
    count = int(group.max(initial=-1)) + 1
    if not count:
        return Labels(group, np.zeros(0, np.int64), np.zeros(0, np.int64))
    producer = np.zeros(count, np.int64)
    producer[group] = _label(state, state.ties + state.siblings)
    made = np.zeros(count, bool)
    for units, _ in state.makers:
        made[group[units]] = True
    frozen = np.zeros(count, bool)
    for units, _ in state.frozen:
        frozen[group[units]] = True
    dice, appears = np.random.default_rng(0), np.zeros(count, np.uint64)  # a hash of how often it appears in each leaf
    for units in state.leaves.values():
        appears += np.bincount(group[units], minlength=count).astype(np.uint64) * dice.integers(
            1, 2**63, dtype=np.uint64
        )
    first = np.full(count, state.count)
    np.minimum.at(first, group, np.arange(state.count))
    order = np.argsort(first)[made[np.argsort(first)]]  # by the first unit
    keys = np.stack([producer.astype(np.uint64), frozen.astype(np.uint64), appears], axis=1)[order]
    _, start, of_key = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(start), np.int64)
    rank[np.argsort(start)] = np.arange(len(start))
    width, number = np.full(count, -1), np.full(count, -1)
    width[order] = rank[of_key.reshape(-1)]
    sort = np.argsort(width[order], kind="stable")
    sizes = np.bincount(width[order], minlength=len(start))
    number[order[sort]] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return Labels(group, width, number)


def find_widths(
    state: Propagation, labels: Labels, blocks: tuple[Block, ...], owned: Container[str]
) -> tuple[Width, ...]:
    """Give each width its slices of the tensors `owned`, its makers, and why it cannot be cut."""
    sizes = np.bincount(labels.width[labels.width >= 0])
    of_unit = labels.width[labels.group]
    slices: list[list[Slice]] = [[] for _ in sizes]
    makers: list[list[Node]] = [[] for _ in sizes]
    ties: list[list[str]] = [[] for _ in sizes]
    for (tensor, axis), units in state.leaves.items():
        inside = of_unit[units]
        for width in np.unique(inside[inside >= 0]) if tensor in owned else ():
            numbers = np.where(inside == width, labels.number[labels.group[units]], -1)
            about = (tensor, axis) in state.penalised, (tensor, axis) in state.reading
            slices[width].append(Slice(tensor, axis, numbers, *about))
    for units, node in state.makers:
        for width in np.unique(of_unit[units]):
            makers[width].append(node)
    for pairs, tie in zip(state.ties, state.tied_at, strict=True):
        for width in np.unique(of_unit[pairs[0]]):
            if width >= 0 and tie is not None:
                ties[width].append(place(tie))
    reasons, lossy = _said(of_unit, state.frozen), _said(of_unit, state.inexact)
    names = _width_names(makers)
    ends = {tensor for block in blocks for tensor in block.last}
    return tuple(
        Width(
            name=names[i],
            size=int(size),
            slices=tuple(slices[i]),
            frozen=reasons.get(i) or ("all its channels are one group" if size == 1 else None),
            makers=tuple(module_path(node) or node.name for node in makers[i]),
            block=next((b.name for b in blocks if all(node.name in b.body for node in makers[i])), None),
            structure=_structure(makers[i], slices[i], int(size), ends),
            streams=_adds_to(slices[i], ends),
            ties=tuple(dict.fromkeys(ties[i])),
            lossy=lossy.get(i),
        )
        for i, size in enumerate(sizes)
    )


def _said(of_unit: Ids, listed: Sequence[tuple[Ids, str]]) -> dict[int, str]:
    """Return the first thing that is said of the units of each width."""
    found: dict[int, str] = {}
    for units, reason in listed:
        for width in np.unique(of_unit[units]):
            found.setdefault(int(width), reason)
    return found


def _adds_to(slices: Sequence[Slice], ends: Container[str]) -> bool:
    """Whether residual blocks, which end in the tensors `ends`, add to a width."""
    return any(piece.tensor in ends and piece.penalised and piece.axis == 0 for piece in slices)


def _structure(
    makers: Sequence[Node], slices: Sequence[Slice], size: int, ends: Container[str]
) -> Literal["filter", "hidden", "head", "embedding"]:
    """Return what the channels of a width are called."""
    kinds = {kind(node) for node in makers}
    if all(name.startswith("conv") for name in kinds):
        return "filter"
    if "embedding" in kinds or _adds_to(slices, ends):
        return "embedding"
    produced = [piece for piece in slices if piece.penalised and piece.axis == 0]
    runs = [int((piece.units >= 0).sum()) // size for piece in produced if (piece.units >= 0).any()]
    return "head" if min(runs, default=1) > 1 and not kinds & {"lstm", "gru", "rnn_tanh"} else "hidden"


def _width_names(makers: Sequence[Sequence[Node]]) -> list[str]:
    """Name each width by its first maker, with a number where one makes several."""
    names, counts = [], Counter[str]()
    for nodes in makers:
        path = module_path(nodes[0]) or nodes[0].name
        counts[path] += 1
        names.append(path if counts[path] == 1 else f"{path}#{counts[path]}")
    return names


def extent(widths: tuple[Width, ...], labels: Labels, units: Ids | None, size: int) -> Extent:
    """Return the length of an axis with these units as a function of the widths that can be cut."""
    if units is None:
        return Extent(size, ())
    inside = labels.width[labels.group[units]]
    found, counts = np.unique(inside[inside >= 0], return_counts=True)
    cut = [
        (widths[i], round(int(n) / widths[i].size)) for i, n in zip(found, counts, strict=True) if not widths[i].frozen
    ]
    fixed = size - sum(times * width.size for width, times in cut)
    return Extent(fixed, tuple((width.name, times) for width, times in cut))
