"""Subnormal floats: weights that mean zero but make some processors ten times slower."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["flushed"]

# Bits of the exponent. Half precision is absent: its subnormals start at 6e-5, too large to call zero.
_EXPONENT = {
    np.dtype(np.float32): (np.uint32, 0x7F80_0000),
    np.dtype(np.float64): (np.uint64, 0x7FF0_0000_0000_0000),
}


def flushed(values: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """Return `values` with every subnormal set to 0, and how many there were.

    Sparse training with weight decay ends in subnormals, and so does folding a batch norm into a convolution. The
    processor's own flush-to-zero flag does not reach a runtime's worker threads, hence the weights are changed. The
    test reads bits: a comparison with the smallest normal number is itself subject to that flag.
    """
    if values.dtype not in _EXPONENT:
        return values, 0
    unsigned, exponent = _EXPONENT[values.dtype]
    result = values.copy()
    bits = result.view(unsigned)
    subnormal = ((bits & unsigned(exponent)) == 0) & ((bits << unsigned(1)) != 0)
    bits[subnormal] = 0
    return result, int(subnormal.sum())
