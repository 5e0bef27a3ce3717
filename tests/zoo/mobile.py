"""Small CNNs for small devices: depthwise convolutions, gates, channel shuffles."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import images, net


def conv_bn(inputs: int, outputs: int, size: int = 3, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution without bias and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Classifier(nn.Module):
    """Features, global mean, linear."""

    def __init__(self, *features: nn.Module, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(channels, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean([2, 3])
        return self.classifier(x)


def mobilenet_v1() -> nn.Module:
    """Return depthwise and pointwise convolutions in turn."""

    def separable(a: int, b: int, stride: int) -> nn.Sequential:
        depthwise = [*conv_bn(a, a, stride=stride, groups=a), nn.ReLU(inplace=True)]
        return nn.Sequential(*depthwise, *conv_bn(a, b, 1), nn.ReLU(inplace=True))

    stem = nn.Sequential(*conv_bn(3, 8, stride=2), nn.ReLU(inplace=True))
    return Classifier(stem, separable(8, 16, 1), separable(16, 32, 2), separable(32, 32, 1), channels=32)


class InvertedResidual(nn.Module):
    """Expand, depthwise, (gate,) project without activation, add where the shape stays."""

    def __init__(
        self, inputs: int, outputs: int, *, stride: int = 1, act: type[nn.Module] = nn.ReLU6, gate: str = ""
    ) -> None:
        super().__init__()
        hidden = inputs * 2
        self.use_res_connect = stride == 1 and inputs == outputs
        layers = [*conv_bn(inputs, hidden, 1), act(), *conv_bn(hidden, hidden, stride=stride, groups=hidden), act()]
        if gate:
            layers.append(Gate(hidden, hidden // 4, hard=gate == "hard"))
        self.conv = nn.Sequential(*layers, *conv_bn(hidden, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class Gate(nn.Module):
    """Squeeze-and-excitation, with a hard or an ordinary sigmoid."""

    def __init__(self, channels: int, squeezed: int, *, hard: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.hard = hard

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        scale = self.fc2(F.relu(self.fc1(scale)) if self.hard else F.silu(self.fc1(scale)))
        return (F.hardsigmoid(scale) if self.hard else scale.sigmoid()) * x


def inverted(act: type[nn.Module], gate: str) -> nn.Module:
    """Return a stem, three inverted residuals and a wide last convolution."""
    blocks = [
        InvertedResidual(8, 8, act=act, gate=gate),
        InvertedResidual(8, 12, stride=2, act=act),
        InvertedResidual(12, 12, act=act, gate=gate),
    ]
    head = nn.Sequential(*conv_bn(12, 32, 1), act())
    return Classifier(nn.Sequential(*conv_bn(3, 8), act()), *blocks, head, channels=32)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Return `x` with the channels of the groups interleaved."""
    batchsize, num_channels, height, width = x.data.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, -1, height, width)


class ShuffleV1(nn.Module):
    """Grouped 1x1 convolutions with a shuffle between them."""

    def __init__(self, channels: int, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.conv1 = nn.Sequential(*conv_bn(channels, channels, 1, groups=groups))
        self.conv2 = nn.Sequential(*conv_bn(channels, channels, groups=channels))
        self.conv3 = nn.Sequential(*conv_bn(channels, channels, 1, groups=groups))

    def forward(self, x: Tensor) -> Tensor:
        out = channel_shuffle(F.relu(self.conv1(x)), self.groups)
        return F.relu(self.conv3(self.conv2(out)) + x)


class ShuffleV2(nn.Module):
    """Half of the channels pass by, and both halves are interleaved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        branch = [*conv_bn(half, half, 1), nn.ReLU(), *conv_bn(half, half, groups=half), *conv_bn(half, half, 1)]
        self.branch2 = nn.Sequential(*branch, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat((x1, self.branch2(x2)), dim=1), 2)


class ShuffleDown(nn.Module):
    """Both branches see all channels; the concatenation doubles the width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.branch1 = nn.Sequential(
            *conv_bn(inputs, inputs, stride=2, groups=inputs), *conv_bn(inputs, half, 1), nn.ReLU()
        )
        self.branch2 = nn.Sequential(*conv_bn(inputs, half, 1), nn.ReLU(), *conv_bn(half, half, stride=2, groups=half))

    def forward(self, x: Tensor) -> Tensor:
        return channel_shuffle(torch.cat((self.branch1(x), self.branch2(x)), dim=1), 2)


class Ghost(nn.Module):
    """Cheap depthwise features are concatenated to the real ones, and the surplus sliced off."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        half = outputs // 2
        self.primary_conv = nn.Sequential(*conv_bn(inputs, half, 1), nn.ReLU(inplace=True))
        self.cheap_operation = nn.Sequential(*conv_bn(half, half, groups=half), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        out = torch.cat([x1, self.cheap_operation(x1)], dim=1)
        return out[:, : self.outputs, :, :]


class ConvMixer(nn.Module):
    """Patches, then a residual depthwise and a pointwise convolution, in nested Sequentials."""

    class Residual(nn.Module):
        def __init__(self, fn: nn.Module) -> None:
            super().__init__()
            self.fn = fn

        def forward(self, x: Tensor) -> Tensor:
            return self.fn(x) + x

    def __init__(self, dim: int = 16, depth: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, dim, 4, stride=4), nn.GELU(), nn.BatchNorm2d(dim)]
        for _ in range(depth):
            spatial = nn.Sequential(nn.Conv2d(dim, dim, 3, groups=dim, padding="same"), nn.GELU(), nn.BatchNorm2d(dim))
            layers += [self.Residual(spatial), nn.Conv2d(dim, dim, 1), nn.GELU(), nn.BatchNorm2d(dim)]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(dim, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of an image, by permutes."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, then channels last: LayerNorm, linear, GELU, linear, scale per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = self.pwconv2(F.gelu(self.pwconv1(self.norm(x))))
        x = self.gamma * x
        return shortcut + x.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """Return patches, blocks, a downsampling, a block."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 2, stride=2), LayerNorm2d(16, eps=1e-6))
    down = nn.Sequential(LayerNorm2d(16, eps=1e-6), nn.Conv2d(16, 24, 2, stride=2))
    return Classifier(stem, ConvNeXtBlock(16), down, ConvNeXtBlock(24), LayerNorm2d(24), channels=24)


class SELinear(nn.Module):
    """Squeeze-and-excitation with nn.Linear, views and expand_as."""

    def __init__(self, channel: int, reduction: int = 2) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class CBAM(nn.Module):
    """Gates per channel from mean and maximum by one MLP, then a gate per pixel from mean and maximum over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(channels, channels // 2), nn.ReLU(), nn.Linear(channels // 2, channels)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        avg = F.avg_pool2d(x, (x.size(2), x.size(3)), stride=(x.size(2), x.size(3)))
        peak = F.adaptive_max_pool2d(x, 1)
        scale = torch.sigmoid(self.mlp(avg) + self.mlp(peak)).unsqueeze(2).unsqueeze(3)
        x = x * scale.expand_as(x)
        pooled = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.spatial(pooled))


class ECA(nn.Module):
    """A one-dimensional convolution over the channels: neighbours matter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * y.sigmoid().expand_as(x)


def attended(*attention: nn.Module) -> nn.Module:
    """Return two convolutions with an attention module after the first."""
    stem, last = nn.Sequential(*conv_bn(3, 16), nn.ReLU()), nn.Sequential(*conv_bn(16, 24), nn.ReLU())
    return Classifier(stem, *attention, last, channels=24)


def shuffled(*blocks: nn.Module, channels: int = 16) -> nn.Module:
    """Return a stem, blocks and a last 1x1 convolution."""
    stem, last = nn.Sequential(*conv_bn(3, 16), nn.ReLU()), nn.Sequential(*conv_bn(channels, 32, 1), nn.ReLU())
    return Classifier(stem, *blocks, last, channels=32)


PIXELS = images(3, 16, 16, other=(3, 24, 24))
NETS = (
    net("mobilenet_v1", mobilenet_v1, PIXELS, "depthwise separable convolutions"),
    net("mobilenet_v2", lambda: inverted(nn.ReLU6, ""), PIXELS, "inverted residuals with linear bottlenecks"),
    net("mobilenet_v3", lambda: inverted(nn.Hardswish, "hard"), PIXELS, "hard-swish and hard squeeze-and-excitation"),
    net(
        "efficientnet",
        lambda: inverted(nn.SiLU, "soft"),
        PIXELS,
        "SiLU and squeeze-and-excitation on depthwise features",
    ),
    net(
        "shufflenet_v1", lambda: shuffled(ShuffleV1(16), ShuffleV1(16)), PIXELS, "grouped 1x1 convolutions and shuffle"
    ),
    net(
        "shufflenet_v2",
        lambda: shuffled(ShuffleV2(16), ShuffleDown(16, 24), ShuffleV2(24), channels=24),
        PIXELS,
        "split, concatenation, shuffle",
    ),
    net(
        "ghostnet",
        lambda: shuffled(Ghost(16, 24), Ghost(24, 16)),
        PIXELS,
        "features concatenated to their depthwise copies",
    ),
    net("convmixer", ConvMixer, images(3, 16, 16, other=(3, 24, 24)), "residual depthwise convolutions on patches"),
    net("convnext", convnext, PIXELS, "LayerNorm channels last, layer scale, permutes"),
    net("se_linear", lambda: attended(SELinear(16)), PIXELS, "squeeze-and-excitation by nn.Linear, view and expand_as"),
    net("cbam", lambda: attended(CBAM(16)), PIXELS, "mean and maximum over channels, a shared MLP"),
    net("eca", lambda: attended(ECA()), PIXELS, "a convolution along the channel axis"),
)
