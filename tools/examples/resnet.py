"""Residual networks of the CIFAR family (He et al. 2016, section 4.2), named as published checkpoints name them."""

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


class PadShortcut(nn.Module):
    """Shortcut "option A", without parameters: every second pixel, and zero channels on both sides up to `width`."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.before = (width - inputs) // 2
        self.after = width - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is the input itself where `downsample` is None."""

    def __init__(self, inputs: int, width: int, *, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A 3x3 stem, three stages of `blocks` basic blocks (the last two each halve the image), and a linear classifier.

    The depth is 6 x blocks + 2. With `pad_shortcuts` the shortcuts are option A and the classifier is named `linear`,
    otherwise they are 1x1 convolutions ("option B") and it is `fc`, as in published checkpoints. The weights depend on
    `seed` alone.
    """

    def __init__(
        self,
        blocks: int,
        widths: tuple[int, int, int],
        *,
        channels: int = 3,
        pad_shortcuts: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.head = "linear" if pad_shortcuts else "fc"
        first, second, third = widths
        with torch.random.fork_rng(devices=[]):  # modules draw weights as they are made; all are drawn again below
            self.conv1 = nn.Conv2d(channels, first, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(first)
            self.layer1 = _stage(BasicBlock(first, first), blocks)
            self.layer2 = _stage(_halving(first, second, pad_shortcut=pad_shortcuts), blocks)
            self.layer3 = _stage(_halving(second, third, pad_shortcut=pad_shortcuts), blocks)
            self.add_module(self.head, nn.Linear(third, CLASSES))
        draw_weights_(self, torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.get_submodule(self.head)(x.mean((2, 3)))
        return logits


def _halving(inputs: int, width: int, *, pad_shortcut: bool) -> BasicBlock:
    shortcut: nn.Module
    if pad_shortcut:
        shortcut = PadShortcut(inputs, width)
    else:
        shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, 2, bias=False), nn.BatchNorm2d(width))
    return BasicBlock(inputs, width, stride=2, downsample=shortcut)


def _stage(first: BasicBlock, blocks: int) -> nn.Sequential:
    width = first.conv2.out_channels
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))


def draw_weights_(model: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of convolutions and linear layers as He et al. 2015 do."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
            nn.init.zeros_(module.bias)
