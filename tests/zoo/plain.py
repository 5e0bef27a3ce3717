"""Convolutions one after the other: classifiers, normalisations, activations, and other widths than the usual."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .net import images, net


class PlainCNN(nn.Module):
    """Convolution, BatchNorm, ReLU, pooling, global mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean(dim=(2, 3)))


class LeNet(nn.Module):
    """Flattens with numbers written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(8, 16, 5)
        self.fc1 = nn.Linear(16 * 4 * 4, 32)
        self.fc2 = nn.Linear(32, 24)
        self.fc3 = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 4 * 4)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return F.log_softmax(self.fc3(x), dim=1)


class VGG(nn.Module):
    """Layers made from a list, a view-flatten classifier with dropout."""

    def __init__(self, widths: tuple[int | str, ...] = (8, 8, "M", 16, 16, "M", 32, "M")) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            if isinstance(width, str):
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
            else:
                conv = nn.Conv2d(channels, width, kernel_size=3, padding=1)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(32 * 2 * 2, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(True), nn.Linear(32, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.view(x.size(0), -1)
        return self.classifier(x)


class AlexNet(nn.Module):
    """Adaptive pooling to 2x2, so that the flatten has 4 columns per channel at every image size."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, kernel_size=7, stride=2, padding=3),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            nn.Conv2d(16, 24, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(24 * 2 * 2, 32), nn.ReLU(inplace=True), nn.Linear(32, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class LocalResponse(nn.Module):
    """LocalResponseNorm: a channel is divided by its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 5, padding=2), nn.Conv2d(16, 24, 3, padding=1)
        self.norm, self.fc = nn.LocalResponseNorm(3, alpha=0.5), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(F.relu(self.conv1(x))), 2)
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


class NetworkInNetwork(nn.Module):
    """No linear layer: the last convolution's channels are the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.mlp1 = nn.Conv2d(16, 24, 1)
        self.mlp2 = nn.Conv2d(24, 16, 1)
        self.classes = nn.Conv2d(16, 10, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mlp2(torch.relu(self.mlp1(torch.relu(self.conv(x))))))
        x = self.classes(x)
        return F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)


class Maxout(nn.Module):
    """Pairs of channels compete: views as (pieces, channels) or (channels, pieces), then takes the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).max(dim=1)[0]
        a, b = self.conv2(x), self.conv3(x)
        x = torch.max(a, b)
        x = F.max_pool2d(x, 2).mean([2, 3])
        return self.fc(x)


class Smooth(nn.Module):
    """Activations with f(0) != 0 between convolutions: a channel whose weights are zero still speaks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 3)
        self.conv4 = nn.Conv2d(16, 16, 3)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.conv1(x))
        x = F.softplus(self.conv2(x))
        x = torch.cos(self.conv3(x))
        x = self.conv4(x).exp().clamp(max=4)
        return self.fc(x.mean((2, 3)))


class Activations(nn.Module):
    """Activations with f(0) = 0 of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        kinds = (nn.LeakyReLU(0.1), nn.ELU(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Tanh(), nn.Hardswish(), nn.ReLU6())
        widths = (3, 8, 12, 16, 8, 12, 16, 8, 12)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.kinds = nn.ModuleList(kinds)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in zip(self.layers, self.kinds, strict=True):
            x = act(layer(x))
        return self.fc(x.mean((-2, -1)))


class PerChannelPReLU(nn.Module):
    """A slope per channel, and one slope for all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16)
        self.conv2, self.act2 = nn.Conv2d(16, 24, 3, padding=1), nn.PReLU()
        self.conv3 = nn.Conv2d(24, 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.conv2(self.act1(self.conv1(x))))
        return self.conv3(x).amax(dim=(2, 3))


class GroupNormCNN(nn.Module):
    """Statistics over runs of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.GroupNorm(8, 32)
        self.conv3, self.norm3 = nn.Conv2d(32, 16, 3, padding=1), nn.GroupNorm(1, 16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.conv1(x)))
        x = F.silu(self.norm2(self.conv2(x)))
        x = F.silu(self.norm3(self.conv3(x)))
        return self.fc(x.mean([2, 3]))


class StyleTransfer(nn.Module):
    """Reflection padding, InstanceNorm with and without scale, nearest upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16, affine=True), nn.ReLU()
        )
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.InstanceNorm2d(32), nn.ReLU())
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.Conv2d(32, 16, 3))
        self.norm = nn.InstanceNorm2d(16, affine=True, track_running_stats=True)
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.out(F.relu(self.norm(self.up(self.body(self.down(x)))))))


class DepthMultiplier(nn.Module):
    """A depthwise convolution with two filters per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.pointwise(F.relu(self.bn(self.depthwise(x)))))
        return self.head(x.flatten(2).mean(-1))


class OneChannel(nn.Module):
    """A convolution to one channel, which is not depthwise, gates the features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 16, 3, padding=1)
        self.gate = nn.Conv2d(16, 1, 1)
        self.out = nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x))
        x = x * torch.sigmoid(self.gate(x))
        return self.out(x).mean((2, 3))


class CNN3d(nn.Module):
    """Video: three-dimensional convolutions, one of them factorised into space and time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.space = nn.Conv3d(8, 16, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0))
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.time(F.relu(self.space(x))))
        x = self.pool(x)
        return self.fc(x.view(x.shape[0], -1))


class SpaceToDepth(nn.Module):
    """Pixels become channels: by strided slices (YOLOv5's Focus), and by PixelUnshuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.unshuffle, self.conv3 = nn.PixelUnshuffle(2), nn.Conv2d(32, 24, 1)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]), 1)
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.relu(self.conv3(self.unshuffle(x)))
        return self.fc(x.mean((2, 3)))


class WeightNorm(nn.Module):
    """Each filter is a direction times a learned length (torch.nn.utils.parametrizations)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = weight_norm(nn.Conv2d(3, 16, 3, padding=1))
        self.conv2 = weight_norm(nn.Conv2d(16, 24, 3, padding=1))
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x), 0.2)), 0.2)
        return self.fc(x.mean((2, 3)))


def sequential() -> nn.Sequential:
    """Return a model that is only an nn.Sequential."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


PIXELS = images(3, 16, 16, other=(3, 20, 20))
NETS = (
    net("plain_cnn", PlainCNN, PIXELS, "convolutions with BatchNorm, global mean"),
    net("lenet", LeNet, images(1, 28, 28), "view(-1, 256): the flattened width is a number in the code"),
    net("vgg", VGG, images(3, 16, 16), "view(x.size(0), -1): 4 columns of the classifier per channel"),
    net("alexnet", AlexNet, images(3, 32, 32, other=(3, 40, 40)), "adaptive pooling before flatten(1)"),
    net("local_response", LocalResponse, PIXELS, "LocalResponseNorm: neighbouring channels matter"),
    net("sequential", sequential, PIXELS, "a bare nn.Sequential with Flatten and BatchNorm1d"),
    net("network_in_network", NetworkInNetwork, PIXELS, "the output is a convolution's channels, squeezed"),
    net("maxout", Maxout, PIXELS, "maximum over pieces of channels, and of two layers"),
    net("smooth", Smooth, PIXELS, "activations with f(0) != 0 between convolutions"),
    net("activations", Activations, PIXELS, "eight activations with f(0) = 0"),
    net("prelu", PerChannelPReLU, PIXELS, "PReLU with a slope per channel"),
    net("group_norm", GroupNormCNN, PIXELS, "GroupNorm: statistics over runs of channels"),
    net("instance_norm", StyleTransfer, PIXELS, "InstanceNorm with and without scale and statistics"),
    net("depth_multiplier", DepthMultiplier, PIXELS, "depthwise convolution with two filters per channel"),
    net("one_channel", OneChannel, PIXELS, "a dense convolution to one channel, broadcast over all"),
    net("space_to_depth", SpaceToDepth, PIXELS, "pixels become channels by strided slices and PixelUnshuffle"),
    net("weight_norm", WeightNorm, PIXELS, "parametrised weights: directions and lengths"),
    net("cnn_3d", CNN3d, images(3, 4, 16, 16, other=(3, 6, 12, 12)), "three-dimensional convolutions"),
)
