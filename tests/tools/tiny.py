"""A model and data so small that the whole chain runs in seconds; factories for the command line."""

import torch

from planner import LatencyTable
from planner.candidates import candidates
from planner.latency import keys
from tests.planner.nets import table_of
from tools.batches import Batches, Data
from tools.calibrate import Bench
from tools.examples.resnet import ResNet


def model() -> ResNet:
    """Three stages of one block, 16, 32 and 64 channels."""
    return ResNet(1, (16, 32, 64), channels=1)


def other() -> ResNet:
    """A model that plans for `model` do not fit."""
    return ResNet(2, (16, 32, 64), channels=1)


def branching() -> torch.nn.Module:
    """A model whose Python branches on its data."""

    class Branching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            if y.sum() > 0:
                return y
            return -y

    return Branching()


def text() -> str:
    """Not a model."""
    return "text"


def data() -> Data:
    """Four classes of noisy 8x8 patterns."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 1, 8, 8, generator=generator)

    def batches(count: int, *, shuffle: bool) -> Batches:
        y = torch.arange(count) % 4
        x = patterns[y] + 0.5 * torch.randn(count, 1, 8, 8, generator=generator)
        return Batches(x, y, batch=32, shuffle=shuffle)

    return Data(batches(512, shuffle=True), batches(128, shuffle=False))


def table(place: Bench) -> LatencyTable:
    """Return a table that nobody measured: a width costs as much as the next multiple of 16."""
    wanted = keys(place.graph, candidates(place.graph, place.profile))
    costs = {key: 1e-9 * -(-key[1] // 16) * -(-key[2] // 16) for key in wanted}
    found = table_of(place.graph, costs, profile=place.profile.id, overhead_s=1e-9)
    return found.model_copy(update=place.place().model_dump())
