"""AlexNet as Caffe has it (CaffeNet), with random weights; also with its grouped convolutions as pairs of halves."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 1000
GROUPED = ("conv2", "conv4", "conv5")


def alexnet() -> "AlexNet":
    """CaffeNet for images of 3x227x227 (Krizhevsky et al. 2012, Jia et al. 2014): 61.0 million parameters."""
    return AlexNet(towers=False)


def alexnet_towers() -> "AlexNet":
    """The same network with the same weights, whose grouped convolutions are two each, as on the paper's two GPUs."""
    return in_towers(alexnet())


class LocalResponseNorm(nn.Module):
    """x / (1 + alpha / 5 · sum of x² over 5 neighbouring channels)^0.75, of operations that are fast in every runtime.

    There is no pool over channels in XNNPACK but one over rows, and d^-0.75 = sqrt(r)·r with r = 1 / sqrt(d) takes a
    fraction of the time of a power.
    """

    def __init__(self, alpha: float = 1e-4) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        squares = (x * x).flatten(2).unsqueeze(1)  # (n, 1, c, pixels)
        mean = functional.avg_pool2d(squares, (5, 1), stride=1, padding=(2, 0)).squeeze(1).view(x.shape)
        inverse = torch.rsqrt(1 + self.alpha * mean)
        out: Tensor = x * inverse * inverse.sqrt()
        return out


class Halves(nn.Module):
    """A convolution of two groups as two convolutions, whose filters can be cut one by one."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(inputs // 2, outputs // 2, size, padding=size // 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([self.a(left), self.b(right)], 1)


class AlexNet(nn.Module):
    """Five convolutions, the first two normalised after pooling, and three linear layers."""

    def __init__(self, *, towers: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.features = _features(towers=towers)
            self.classifier = nn.Sequential(
                *(nn.Linear(256 * 6 * 6, 4096), nn.ReLU(), nn.Dropout()),
                *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
                nn.Linear(4096, CLASSES),
            )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits


def _features(*, towers: bool) -> nn.Sequential:
    def grouped(inputs: int, outputs: int, size: int) -> nn.Module:
        if towers:
            return Halves(inputs, outputs, size)
        return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=2)

    layers: dict[str, nn.Module] = {
        **{"conv1": nn.Conv2d(3, 96, 11, 4), "relu1": nn.ReLU(), "pool1": nn.MaxPool2d(3, 2)},
        **{"norm1": LocalResponseNorm(), "conv2": grouped(96, 256, 5), "relu2": nn.ReLU()},
        **{"pool2": nn.MaxPool2d(3, 2), "norm2": LocalResponseNorm()},
        **{"conv3": nn.Conv2d(256, 384, 3, padding=1), "relu3": nn.ReLU()},
        **{"conv4": grouped(384, 384, 3), "relu4": nn.ReLU(), "conv5": grouped(384, 256, 3), "relu5": nn.ReLU()},
        **{"pool5": nn.MaxPool2d(3, 2), "flat": nn.Flatten()},
    }
    return nn.Sequential(OrderedDict(layers))


def in_towers(model: AlexNet) -> AlexNet:
    """Return the network that computes what a `model` with grouped convolutions does, with two instead of each."""
    weights = dict(model.state_dict())
    for name in GROUPED:
        for kind in ("weight", "bias"):
            halves = weights.pop(f"features.{name}.{kind}").chunk(2)
            weights |= {f"features.{name}.{half}.{kind}": own for half, own in zip("ab", halves, strict=True)}
    same = AlexNet(towers=True)
    same.load_state_dict(weights)
    return same
