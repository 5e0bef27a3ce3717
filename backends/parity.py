"""Parity: a built model must compute what the PyTorch module computes, or it is refused."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from backends.artifact import Accuracy, Parity
from backends.contract import Array, Session, flattened
from backends.samples import CASES, Inputs, Samples
from planner.evaluation import evaluating
from profiles.errors import BuildError

__all__ = [
    "CASES",
    "RELATIVE_TOLERANCE",
    "TOLERANCES",
    "accuracy_of",
    "check_parity",
    "parity_of",
    "random_cases",
    "tolerance_of",
]

RELATIVE_TOLERANCE = 1e-4
# The largest relative error of a format that rounds: 32 of its rounding units for fp16 and bf16. int8 is judged
# on the user's data only, since noise lies outside the ranges that were calibrated, and there against what is no longer
# the same function; whether it is good enough is a question of accuracy, which is recorded.
TOLERANCES = {"fp32": RELATIVE_TOLERANCE, "fp16": 2**-6, "bf16": 2**-3, "int8": 0.5}
_SEED = 0x657370  # the generator is our own: the same cases every time, whatever the caller's random state


def check_parity(
    runtime: str, session: Session, *, model: torch.nn.Module, inputs: Inputs, samples: Samples, number: str
) -> tuple[Parity, Parity | None]:
    """Compare `session` with the eager `model` on random inputs shaped like `inputs`, and on the calibration data.

    The error of a case is max|a - b| / max|b| over one output, b being PyTorch's; BuildError above the tolerance.
    """
    tolerance = TOLERANCES[number]
    random = parity_of(runtime, session, model=model, cases=random_cases(inputs, samples))
    _judge(runtime, random, tolerance=np.inf if number == "int8" else tolerance, what="random")
    if not samples.calibration:
        return random, None
    real = parity_of(runtime, session, model=model, cases=samples.calibration[: 4 * CASES])
    _judge(runtime, real, tolerance=tolerance, what="calibration")
    return random, real


def parity_of(runtime: str, session: Session, *, model: torch.nn.Module, cases: Iterable[Inputs]) -> Parity:
    """Return the largest errors of `session` over `cases`."""
    worst_abs, worst_rel, count = 0.0, 0.0, 0
    for case in cases:
        absolute, relative = _errors(session(case), _expected(model, case), runtime=runtime)
        worst_abs, worst_rel, count = max(worst_abs, absolute), max(worst_rel, relative), count + 1
    return Parity(cases=count, max_abs=worst_abs, max_rel=worst_rel)


def accuracy_of(session: Session, *, model: torch.nn.Module, samples: Samples) -> Accuracy | None:
    """Return how many test examples both classify as labelled, by their first output; None without test examples."""
    compiled = pytorch = examples = 0
    for inputs, targets in samples.test:
        labels = targets.cpu().numpy()
        compiled += int((session(inputs)[0].argmax(1) == labels).sum())
        pytorch += int((_expected(model, inputs)[0].argmax(1) == labels).sum())
        examples += len(labels)
    if not examples:
        return None
    return Accuracy(examples=examples, compiled=compiled / examples, pytorch=pytorch / examples)


def tolerance_of(dtype: str) -> float:
    """Return the largest relative error of an artifact of this dtype."""
    return {"float16": TOLERANCES["fp16"], "bfloat16": TOLERANCES["bf16"], "int8": TOLERANCES["int8"]}.get(
        dtype, RELATIVE_TOLERANCE
    )


def random_cases(inputs: Inputs, samples: Samples, *, count: int | None = None, seed: int = _SEED) -> Iterator[Inputs]:
    """Yield `count` random inputs like the example, of the mean and the deviation of the calibration data if any."""
    generator = torch.Generator().manual_seed(seed)
    moments = [_moments([batch[index] for batch in samples.calibration]) for index in range(len(inputs))]
    for _ in range(count or samples.cases):
        yield tuple(_like(example, generator, *pair) for example, pair in zip(inputs, moments, strict=True))


def _moments(batches: Sequence[torch.Tensor]) -> tuple[float, float]:
    if not batches or not batches[0].is_floating_point():
        return 0.0, 1.0
    values = torch.stack([batch.float() for batch in batches])
    return float(values.mean()), float(values.std(correction=0))


def _like(example: torch.Tensor, generator: torch.Generator, mean: float, deviation: float) -> torch.Tensor:
    if example.is_floating_point():
        drawn = torch.randn(example.shape, generator=generator) * deviation + mean
    else:  # token ids and masks: only values between those of the example are known to be valid
        low, high = int(example.min()), int(example.max())
        drawn = torch.randint(low, high + 1, example.shape, generator=generator)
    return drawn.to(dtype=example.dtype, device=example.device)


def _expected(model: torch.nn.Module, inputs: Inputs) -> list[Array]:
    with evaluating(model), torch.inference_mode():
        return flattened(model(*inputs))


def _judge(runtime: str, parity: Parity, *, tolerance: float, what: str) -> None:
    if not parity.max_rel <= tolerance or not np.isfinite(parity.max_rel):
        raise BuildError(
            f"{runtime} does not compute what PyTorch computes: relative error {parity.max_rel:.3g} over "
            f"{parity.cases} {what} inputs, tolerance {tolerance:g}; the file is discarded. Report the model, or use "
            "another runtime or number format"
        )


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
