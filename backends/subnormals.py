"""Subnormal floats: weights that mean zero but make some processors ten times slower."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["flush_", "flushed"]

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


def flush_(tensor: torch.Tensor) -> int:
    """Set every subnormal of a tensor to 0, in place, and return how many there were; fp16 keeps its own."""
    if tensor.dtype == torch.bfloat16:  # NumPy has none: it is the upper half of an fp32, with the same exponent
        wide = tensor.detach().cpu().float()
        count = flush_(wide)
    elif tensor.dtype in (torch.float32, torch.float64):
        values, count = flushed(tensor.detach().cpu().contiguous().numpy())
        wide = torch.from_numpy(values)
    else:
        return 0
    if count:
        tensor.data.copy_(wide)
    return count
