"""The user's own data, cut into batches of the shape that a model is built for."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from profiles.errors import BuildError

__all__ = ["CASES", "Inputs", "Samples"]

CASES = 8

Inputs = tuple[Tensor, ...]
Batches = Iterable[tuple[Tensor | Inputs, Tensor]]


@dataclass(frozen=True)
class Samples:
    """Inputs to calibrate a quantised model with, and labelled inputs to compare its accuracy on; either may be empty.

    Every batch has the shapes of the inputs that the model is built for: `of` cuts batches of any size to them.
    """

    calibration: tuple[Inputs, ...] = ()
    test: tuple[tuple[Inputs, Tensor], ...] = ()
    cases: int = CASES  # random inputs on which parity is shown

    @classmethod
    def of(
        cls,
        calibration: Batches,
        test: Batches = (),
        *,
        like: Inputs,
        calibrated: int = 128,
        tested: int = 1000,
    ) -> Self:
        """Take the first `calibrated` and `tested` examples of batches `(inputs, targets)`, in batches of `like`.

        Raises BuildError if the examples are of another shape than those of `like`.
        """
        return cls(
            calibration=tuple(inputs for inputs, _ in _cut(calibration, like, calibrated)),
            test=tuple(_cut(test, like, tested)),
        )


def _cut(batches: Batches, like: Inputs, limit: int) -> Iterator[tuple[Inputs, Tensor]]:
    """Yield batches as large as `like`, at least one; examples that do not fill a batch are left out."""
    size = like[0].shape[0]
    wanted = max(1, limit // size)
    kept: list[Inputs] = []  # inputs and, last, targets: less than a batch
    for inputs, targets in batches:
        row = (*((inputs,) if isinstance(inputs, Tensor) else inputs), targets)
        _check(row[:-1], like)
        joined = tuple(torch.cat(parts) for parts in zip(*kept, row, strict=True))
        while len(joined[-1]) >= size:
            head, joined = tuple(part[:size] for part in joined), tuple(part[size:] for part in joined)
            yield tuple(part.to(example.dtype) for part, example in zip(head, like, strict=False)), head[-1]
            wanted -= 1
            if not wanted:
                return
        kept = [joined]


def _check(inputs: Inputs, like: Inputs) -> None:
    found, expected = ([tuple(part.shape[1:]) for part in parts] for parts in (inputs, like))
    if found != expected:
        raise BuildError(
            f"the data has examples of shapes {found}, but the model is built for {expected}; give data of the model's "
            "shapes, or inputs of the data's"
        )
