"""Rounds of a comparison that something else disturbed: another load on the cores, or a clock that changed."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["COMMON", "LOST", "disturbed"]

COMMON = 0.10  # all candidates of a round that are together slower or faster than usual by more than this share
LOST = 0.10  # a block in which the process had its cores for a share less than usual by more than this


def disturbed(relative: ArrayLike, busy: ArrayLike) -> NDArray[np.bool_]:
    """Return which rounds were disturbed, (rounds,).

    `relative` is the latency of each block over its usual one and `busy` its share of CPU time, (rounds, candidates). A
    round is off if |mean_c log(relative[r,c])| is above log(1 + COMMON): what candidates have in common, so that
    leaving such rounds out favours none of them.
    """
    common = np.abs(np.log(np.asarray(relative, float)).mean(axis=1)) > np.log1p(COMMON)
    shares = np.asarray(busy, float)
    lost = (shares < (1 - LOST) * np.median(shares, axis=0)).any(axis=1)
    found: NDArray[np.bool_] = common | lost
    return found
