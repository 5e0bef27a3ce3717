"""Work on a CUDA device as something that a clock can time: captured in a graph, and finished when the call returns."""

from collections.abc import Callable
from typing import Any

import torch

from profiles.errors import BackendUnavailable

__all__ = ["finished", "required"]

_CAPTURE_AFTER = 3  # runs before a graph is captured, as PyTorch's manual asks: libraries allocate in them


def required(what: str) -> None:
    """Raise BackendUnavailable unless PyTorch sees a CUDA device."""
    if not torch.cuda.is_available():
        raise BackendUnavailable(f"{what} needs a CUDA device, and PyTorch sees none; choose a profile of the CPU")


def finished(launch: Callable[[], object], *, graph: bool) -> Callable[[], None]:
    """Return a call that runs `launch` and waits for the device; as the replay of one CUDA graph if `graph`.

    A launch returns at once: what is timed ends with an event that the device records behind the work.
    """
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_CAPTURE_AFTER):
            launch()
    torch.cuda.current_stream().wait_stream(side)
    step: Callable[[], object] = launch
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            launch()
        step = captured.replay
    done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def run() -> None:
        step()
        done.record()
        done.synchronize()

    return run
