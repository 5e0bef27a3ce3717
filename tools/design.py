"""Which networks calibration measures: random ones, as uneven as plans are, on the profile's grid and off it."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from planner.graph import Graph
from planner.operations import Choice

Options = Mapping[str, Sequence[int]]
_NETWORKS = 160  # at most; any first part of them is a design too
_NARROWEST, _LEVEL = 0.03, 0.25  # of a width; of a network's widest narrowed one, at least


def design(graph: Graph, options: Options, *, seed: int = 0) -> list[Choice]:
    """Return the networks to measure, in order.

    The dense one comes first. Of the others a third has widths on the grid, a third any widths, a third some of both;
    half of them lack blocks, and half keep all streams whole, as most plans do: a stream touches every operation beside
    it. Widths are drawn one by one, so that what operations cost can be told apart, and below a level that is drawn for
    each network, so that there are small ones and large ones.
    """
    random, wanted = np.random.default_rng(seed), [graph.dense]
    blocks = [block.name for block in graph.blocks if not block.frozen]
    for index in range(_NETWORKS):
        on_grid = (1.0, 0.0, 0.5)[index % 3]
        whole, level = random.uniform(0, 0.5), random.uniform(_LEVEL, 1 + _LEVEL)
        keep = {}
        for name, counts in options.items():
            size = graph.width[name].size
            some = max(1, round(size * min(1.0, random.uniform(_NARROWEST, level))))
            if random.random() < whole or (graph.width[name].is_stream and index // 2 % 2 == 0):
                some = size
            keep[name] = min(counts, key=lambda kept: abs(kept - some)) if random.random() < on_grid else some
        share = random.uniform(0.1, 0.6) if index % 2 else 0.0
        gone = frozenset(name for name in blocks if random.random() < share)
        wanted.append(graph.choice(keep, gone))
    return wanted


@contextmanager
def off_the_grid() -> Iterator[None]:
    """Keep the builder from warning of widths that the device dislikes: here they are the question."""
    logger = logging.getLogger("backends.build")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
