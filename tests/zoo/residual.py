"""Streams that layers add to: every kind of residual network."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import images, net


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zero channels on both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels // 4, self.channels // 4), "constant", 0)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut of option A or B."""

    def __init__(self, inputs: int, planes: int, stride: int = 1, option: str = "B") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or inputs != planes:
            if option == "A":
                self.shortcut = PadShortcut(planes)
            else:
                conv = nn.Conv2d(inputs, planes, 1, stride=stride, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """Two stages of two basic blocks each."""

    def __init__(self, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(BasicBlock(8, 8, 1, option), BasicBlock(8, 8, 1, option))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2, option), BasicBlock(16, 16, 1, option))
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer2(self.layer1(out))
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with groups), 1x1, an optional squeeze-and-excitation, and a shortcut."""

    expansion = 2

    def __init__(self, inputs: int, planes: int, *, stride: int = 1, groups: int = 1, squeeze: int = 0) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.se = SqueezeExcite(planes, squeeze) if squeeze else nn.Identity()
        self.downsample = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.se(out)))
        if self.downsample is not None:
            identity = self.downsample(x)
        return self.relu(out + identity)


class SqueezeExcite(nn.Module):
    """A gate per channel from 1x1 convolutions on the pooled image."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(self.avgpool(x)))))


class Stages(nn.Module):
    """A stem, blocks, and a classifier."""

    def __init__(self, stem: int, blocks: list[nn.Module], outputs: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(True))
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(outputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.blocks(self.stem(x)))
        return self.fc(torch.flatten(x, 1))


class PreActivation(nn.Module):
    """BatchNorm and ReLU come before each convolution: the stream itself is never normalised."""

    def __init__(self, inputs: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        if stride != 1 or inputs != planes:
            self.shortcut = nn.Conv2d(inputs, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + shortcut


class ReZero(nn.Module):
    """The branch is multiplied by one learned scalar."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 32, 3, padding=1), nn.Conv2d(32, channels, 3, padding=1)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.conv2(F.relu(self.conv1(F.relu(x))))


class DropPath(nn.Module):
    """Drops the branch of whole examples in training, nothing in evaluation."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device) >= self.rate
        return x / (1 - self.rate) * keep


class StochasticDepth(nn.Module):
    """A block whose branch ends in DropPath."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.drop_path = DropPath(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.drop_path(self.branch(x)))


class Res2Block(nn.Module):
    """Splits the channels, and each part adds the result of the part before it."""

    def __init__(self, channels: int, scale: int = 4) -> None:
        super().__init__()
        self.width = channels // scale
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.convs = nn.ModuleList(nn.Conv2d(self.width, self.width, 3, padding=1) for _ in range(scale - 1))
        self.conv3, self.bn3 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(F.relu(self.bn1(self.conv1(x))), self.width, 1)
        outs = [parts[0]]
        for part, conv in zip(parts[1:], self.convs, strict=True):
            outs.append(F.relu(conv(part if len(outs) == 1 else part + outs[-1])))
        out = self.bn3(self.conv3(torch.cat(outs, 1)))
        return F.relu(out + x)


class Applied(nn.Module):
    """One block of weights, applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = F.relu(x + self.block(x))
        return self.fc(x.mean((2, 3)))


class RepVGG(nn.Module):
    """Three parallel branches, one of them only a BatchNorm, that are added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rbr_dense = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))
        self.rbr_1x1 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.rbr_identity = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.rbr_dense(x) + self.rbr_1x1(x) + self.rbr_identity(x))


class ChannelGrowth(nn.Module):
    """The stream grows by zero channels at its end (PyramidNet)."""

    def __init__(self, inputs: int, planes: int) -> None:
        super().__init__()
        self.bn, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, planes, 3, 2, 1)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1), nn.BatchNorm2d(planes)
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.conv1(self.bn(x)))))
        shortcut = self.pool(x)
        n, c, h, w = out.shape
        zeros = torch.zeros(n, c - shortcut.size(1), h, w, dtype=x.dtype, device=x.device)
        return out + torch.cat((shortcut, zeros), 1)


def residual(block: type[nn.Module], *widths: int) -> nn.Module:
    """Return a stem and blocks of one width, or of growing widths."""
    blocks = [block(a) for a in widths] if len(widths) == 1 else [block(a, b) for a, b in pairwise(widths)]
    return Stages(widths[0], blocks, widths[-1])


def bottlenecks(**options: int) -> nn.Module:
    """Return a stem and three bottlenecks."""
    blocks: list[nn.Module] = [
        Bottleneck(8, 8, **options),
        Bottleneck(16, 16, stride=2, **options),
        Bottleneck(32, 16, **options),
    ]
    return Stages(8, blocks, 32)


PIXELS = images(3, 16, 16, other=(3, 20, 20))
NETS = (
    net("resnet_a", lambda: ResNet("A"), PIXELS, "shortcuts by strided slice and zero channels on both sides"),
    net("resnet_b", lambda: ResNet("B"), PIXELS, "shortcuts by 1x1 convolutions"),
    net("resnet_bottleneck", bottlenecks, PIXELS, "bottleneck blocks, in-place ReLU"),
    net("resnet_preactivation", lambda: residual(PreActivation, 8, 8, 16), PIXELS, "BatchNorm before the convolutions"),
    net("resnext", lambda: bottlenecks(groups=4), PIXELS, "grouped convolutions in bottlenecks"),
    net("se_resnet", lambda: bottlenecks(squeeze=4), PIXELS, "squeeze-and-excitation in bottlenecks"),
    net("regnet", lambda: bottlenecks(groups=2, squeeze=4), PIXELS, "grouped convolutions with squeeze-and-excitation"),
    net("res2net", lambda: residual(Res2Block, 16), PIXELS, "split, hierarchical additions, concatenation"),
    net("pyramidnet", lambda: residual(ChannelGrowth, 8, 12, 16), PIXELS, "shortcut padded by concatenated zeros"),
    net("rezero", lambda: residual(ReZero, 16), PIXELS, "a learned scalar on the branch"),
    net("stochastic_depth", lambda: residual(StochasticDepth, 16), PIXELS, "branches dropped in training"),
    net("repvgg", lambda: residual(RepVGG, 16), PIXELS, "a BatchNorm as a branch of its own"),
    net("applied_twice", Applied, PIXELS, "one block's weights used twice"),
)
