"""Networks for 224x224 images, with random weights: ResNets, DenseNet-201, MobileNetV2 and vision transformers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.examples.resnet import BasicBlock

CLASSES = 1000
# Expansion, width, blocks and stride of each stage of MobileNetV2 (Sandler et al. 2018, table 2).
STAGES = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


def resnet18() -> nn.Module:
    """ResNet-18 (He et al. 2016): 11.7 million parameters."""
    return _seeded(lambda: _resnet((64, 128, 256, 512)))


def resnet50() -> nn.Module:
    """ResNet-50 (He et al. 2016): 25.6 million parameters."""
    return _seeded(lambda: _bottlenecks((3, 4, 6, 3)))


def resnet152() -> nn.Module:
    """ResNet-152 (He et al. 2016): 60.2 million parameters."""
    return _seeded(lambda: _bottlenecks((3, 8, 36, 3)))


def densenet201() -> nn.Module:
    """DenseNet-201 (Huang et al. 2017): 20.0 million parameters."""
    return _seeded(lambda: _densenet((6, 12, 48, 32), growth=32))


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 at width 1.0: 3.5 million parameters."""
    return _seeded(_mobilenet)


def vit_tiny() -> nn.Module:
    """ViT-Tiny with patches of 16x16 (Touvron et al. 2021): 5.7 million parameters."""
    return _seeded(lambda: VisionTransformer(192, heads=3, depth=12))


def vit_b16() -> nn.Module:
    """ViT-B with patches of 16x16 (Dosovitskiy et al. 2021): 86.6 million parameters."""
    return _seeded(lambda: VisionTransformer(768, heads=12, depth=12))


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _resnet(widths: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = [*_convolution(3, widths[0], 7, stride=2), nn.MaxPool2d(3, 2, 1)]
    inputs = widths[0]
    for width in widths:
        stride = 1 if width == inputs else 2
        shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        layers.append(BasicBlock(inputs, width, stride=stride, downsample=None if stride == 1 else shortcut))
        layers.append(BasicBlock(width, width))
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def _convolution(
    inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), act()]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut, which is the input itself where shapes agree."""

    def __init__(self, inputs: int, width: int, *, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        inner = [*_convolution(inputs, width, 1), *_convolution(width, width, 3, stride=stride)]
        self.body = nn.Sequential(*inner, *_convolution(width, outputs, 1)[:2])
        changes = stride > 1 or inputs != outputs
        self.shortcut = nn.Sequential(*_convolution(inputs, outputs, 1, stride=stride)[:2]) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + (x if self.shortcut is None else self.shortcut(x)))


def _bottlenecks(depths: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = [*_convolution(3, 64, 7, stride=2), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, depth in enumerate(depths):
        for index in range(depth):
            layers.append(Bottleneck(inputs, 64 << stage, stride=2 if stage and not index else 1))
            inputs = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class DenseLayer(nn.Module):
    """A bottleneck of 4 x `growth` channels that reads all that came before, and joins `growth` channels to it."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        before = [nn.BatchNorm2d(inputs), nn.ReLU(), *_convolution(inputs, 4 * growth, 1)]
        self.body = nn.Sequential(*before, nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def _densenet(depths: tuple[int, ...], *, growth: int) -> nn.Module:
    layers, inputs = [*_convolution(3, 64, 7, stride=2), nn.MaxPool2d(3, 2, 1)], 64
    for stage, depth in enumerate(depths):
        for _ in range(depth):
            layers.append(DenseLayer(inputs, growth))
            inputs += growth
        layers += [nn.BatchNorm2d(inputs), nn.ReLU()]
        if stage < len(depths) - 1:
            layers += [nn.Conv2d(inputs, inputs // 2, 1, bias=False), nn.AvgPool2d(2)]
            inputs //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter channel by channel, project; the input is added where shapes agree."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = _convolution(inputs, hidden, 1, act=nn.ReLU6) if expansion > 1 else []
        filter_ = _convolution(hidden, hidden, 3, stride=stride, groups=hidden, act=nn.ReLU6)
        project = _convolution(hidden, outputs, 1)[:2]
        self.body = nn.Sequential(*expand, *filter_, *project)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


def _mobilenet() -> nn.Module:
    layers, inputs = _convolution(3, 32, 3, stride=2, act=nn.ReLU6), 32
    for expansion, width, blocks, first in STAGES:
        for index in range(blocks):
            layers.append(InvertedResidual(inputs, width, expansion=expansion, stride=first if index == 0 else 1))
            inputs = width
    layers += _convolution(inputs, 1280, 1, act=nn.ReLU6)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, CLASSES))


class Encoder(nn.Module):
    """Attention and a perceptron of two layers, each normalised before and added to its input."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads, self.features = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (-1, self.features)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        y = self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        out: Tensor = x + y
        return out


class VisionTransformer(nn.Module):
    """Patches, a class token and positions, encoders, and a linear classifier on the class token."""

    def __init__(self, width: int, *, heads: int, depth: int, image: int = 224, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, width))
        self.encoders = nn.Sequential(*(Encoder(width, heads=heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.encoders(x))[:, 0])
        return logits
