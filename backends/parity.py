"""Parity: a built model must compute what the PyTorch module computes, or it is refused."""

from collections.abc import Sequence

import numpy as np
import torch

from backends.artifact import Parity
from backends.contract import Array, Session, flattened
from planner.evaluation import evaluating
from profiles.errors import BuildError

__all__ = ["CASES", "RELATIVE_TOLERANCE", "check_parity"]

CASES = 8
RELATIVE_TOLERANCE = 1e-4
_SEED = 0x657370  # the generator is our own: the same cases every time, whatever the caller's random state


def check_parity(runtime: str, session: Session, *, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Parity:
    """Compare `session` with the eager `model` on fresh random inputs shaped like `inputs`.

    The error of a case is max|a - b| / max|b| over one output, b being PyTorch's; BuildError above the tolerance.
    """
    generator = torch.Generator().manual_seed(_SEED)
    worst_abs, worst_rel = 0.0, 0.0
    for _ in range(CASES):
        drawn = tuple(_like(example, generator) for example in inputs)
        with evaluating(model), torch.inference_mode():
            expected = flattened(model(*drawn))
        absolute, relative = _errors(session(drawn), expected, runtime=runtime)
        worst_abs, worst_rel = max(worst_abs, absolute), max(worst_rel, relative)
    if worst_rel > RELATIVE_TOLERANCE:
        raise BuildError(
            f"{runtime} does not compute what PyTorch computes: relative error {worst_rel:.3g} over {CASES} random "
            f"inputs, tolerance {RELATIVE_TOLERANCE:g}; the file is discarded. Report the model, or use another runtime"
        )
    return Parity(cases=CASES, max_abs=worst_abs, max_rel=worst_rel)


def _like(example: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if example.is_floating_point():
        drawn = torch.randn(example.shape, generator=generator)
    else:  # token ids and masks: only values between those of the example are known to be valid
        low, high = int(example.min()), int(example.max())
        drawn = torch.randint(low, high + 1, example.shape, generator=generator)
    return drawn.to(dtype=example.dtype, device=example.device)


def _errors(found: Sequence[Array], expected: Sequence[Array], *, runtime: str) -> tuple[float, float]:
    shapes = [array.shape for array in found], [array.shape for array in expected]
    if shapes[0] != shapes[1]:
        raise BuildError(f"{runtime} returns outputs of shapes {shapes[0]}, PyTorch {shapes[1]}; the file is discarded")
    worst = [_error(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(found, expected, strict=True)]
    return max((pair[0] for pair in worst), default=0.0), max((pair[1] for pair in worst), default=0.0)


def _error(found: Array, expected: Array) -> tuple[float, float]:
    if not np.isfinite(expected).all():
        raise BuildError("the PyTorch module returns NaN or infinity on normal random inputs; mend or retrain it first")
    if not np.isfinite(found).all():
        return np.inf, np.inf
    absolute = float(np.abs(found - expected).max(initial=0.0))
    scale = float(np.abs(expected).max(initial=0.0))
    return absolute, absolute / scale if scale else (np.inf if absolute else 0.0)
