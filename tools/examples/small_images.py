"""VGG16, ResNet-18 and MobileNetV1 in their forms for images of 32x32, with random weights."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from tools.examples.resnet import CLASSES, BasicBlock

VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width and convolutions of each stage
# Width and stride of each pair of a depthwise and a pointwise convolution (Howard et al. 2017, table 1).
MOBILENET = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


def vgg16(channels: int = 3) -> nn.Module:
    """VGG16 (Simonyan and Zisserman 2015) with BatchNorm and one linear layer: 14.7 million parameters."""
    return _seeded(lambda: _vgg(channels))


def resnet18(channels: int = 3) -> nn.Module:
    """ResNet-18 (He et al. 2016) with a 3x3 stem that does not halve the image: 11.2 million parameters."""
    return _seeded(lambda: _resnet(channels))


def mobilenet_v1(channels: int = 3) -> nn.Module:
    """MobileNetV1 (Howard et al. 2017) with a stem that does not halve the image: 3.2 million parameters."""
    return _seeded(lambda: _mobilenet(channels))


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _convolution(inputs: int, outputs: int, size: int = 3, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _classifier(inputs: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES)]


def _vgg(inputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for width, count in VGG16:
        for _ in range(count):
            layers += _convolution(inputs, width)
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, *_classifier(inputs))


def _resnet(channels: int) -> nn.Module:
    layers = _convolution(channels, 64)
    for inputs, width in pairwise((64, 64, 128, 256, 512)):
        layers += [_halving(inputs, width) if inputs != width else BasicBlock(inputs, width), BasicBlock(width, width)]
    return nn.Sequential(*layers, *_classifier(512))


def _halving(inputs: int, width: int) -> BasicBlock:
    shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, 2, bias=False), nn.BatchNorm2d(width))
    return BasicBlock(inputs, width, stride=2, downsample=shortcut)


def _mobilenet(channels: int) -> nn.Module:
    layers, inputs = _convolution(channels, 32), 32
    for width, stride in MOBILENET:
        layers += _convolution(inputs, inputs, stride=stride, groups=inputs)
        layers += _convolution(inputs, width, 1)
        inputs = width
    return nn.Sequential(*layers, *_classifier(inputs))
