"""How many threads PyTorch works with: small networks, and machines that others use too, are often faster on one."""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)
TRIALS = 5
ENOUGH_S = 1.0


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread within the block: parity checks and exports of small models are slower on several."""
    with _threads(1):
        yield


@contextmanager
def fastest(model: nn.Module, inputs: Tensor) -> Iterator[int]:
    """Within the block PyTorch has one thread, or as many as before, whichever trains a copy of `model` faster now."""
    most = torch.get_num_threads()
    count = 1
    if most > 1 and inputs.device.type == "cpu":
        trial = _trial(copy.deepcopy(model).train(), inputs)
        with _threads(1):
            single = _typical(trial)
        several = _typical(trial)
        count = most if several < single else 1
        log.info("%d threads: %.3g s a step on 1, %.3g s on %d", count, single, several, most)
    with _threads(count):
        yield count


def _trial(model: nn.Module, inputs: Tensor) -> Callable[[], float]:
    def step() -> float:
        start = time.perf_counter()
        model(inputs).sum().backward()
        return time.perf_counter() - start

    return step


def _typical(trial: Callable[[], float]) -> float:
    """Return the median of a few trials after a warm-up, of fewer where they take long."""
    trial()
    times: list[float] = []
    while not times or (len(times) < TRIALS and sum(times) < ENOUGH_S):
        times.append(trial())
    return median(times)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
