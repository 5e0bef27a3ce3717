"""CIFAR-10 (Krizhevsky 2009) in its official binary layout, and the residual networks usually trained on it."""

import os
from pathlib import Path

import torch
from torch import Tensor

from profiles.errors import EspalierError
from tools.batches import Batches, Data, Normalise, Shift
from tools.examples.resnet import ResNet

FOLDER = "ESPALIER_CIFAR10"
RECORD_BYTES = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes
REMEDY = (
    f"get 'CIFAR-10 binary version' from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and set {FOLDER} "
    "to the folder that holds cifar-10-batches-bin"
)


def resnet20() -> ResNet:
    """ResNet-20 with 1x1-convolution shortcuts: 272,474 parameters."""
    return _resnet(20, pad_shortcuts=False)


def resnet20_a() -> ResNet:
    """ResNet-20 with zero-padded shortcuts: 269,722 parameters."""
    return _resnet(20, pad_shortcuts=True)


def resnet32() -> ResNet:
    """ResNet-32 with 1x1-convolution shortcuts."""
    return _resnet(32, pad_shortcuts=False)


def resnet32_a() -> ResNet:
    """ResNet-32 with zero-padded shortcuts."""
    return _resnet(32, pad_shortcuts=True)


def resnet44() -> ResNet:
    """ResNet-44 with 1x1-convolution shortcuts."""
    return _resnet(44, pad_shortcuts=False)


def resnet44_a() -> ResNet:
    """ResNet-44 with zero-padded shortcuts."""
    return _resnet(44, pad_shortcuts=True)


def resnet56() -> ResNet:
    """ResNet-56 with 1x1-convolution shortcuts: 855,770 parameters."""
    return _resnet(56, pad_shortcuts=False)


def resnet56_a() -> ResNet:
    """ResNet-56 with zero-padded shortcuts: 853,018 parameters."""
    return _resnet(56, pad_shortcuts=True)


def _resnet(depth: int, *, pad_shortcuts: bool) -> ResNet:
    return ResNet((depth - 2) // 6, (16, 32, 64), pad_shortcuts=pad_shortcuts)


def data() -> Data:
    """CIFAR-10 normalised as the published networks with 1x1-convolution shortcuts expect it."""
    return load(_folder(), Normalise((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))


def data_a() -> Data:
    """CIFAR-10 normalised as the published networks with zero-padded shortcuts expect it."""
    return load(_folder(), Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def load(folder: Path, normalise: Normalise, *, batch: int = 128, seed: int = 0) -> Data:
    """Training batches with random crops (pad 4) and flips, and test batches as they are."""
    parts = [read(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    test_images, test_labels = read(folder / "test_batch.bin")
    train = Batches(
        images, labels, batch=batch, shuffle=True, augment=Shift(pad=4, flip=True), normalise=normalise, seed=seed
    )
    test_batch = min(500, len(test_images))
    return Data(train, Batches(test_images, test_labels, batch=test_batch, shuffle=False, normalise=normalise))


def read(path: Path) -> tuple[Tensor, Tensor]:
    """The images (n, 3, 32, 32) and labels (n,) of one binary file, in bytes; EspalierError if it is no such file."""
    try:
        content = bytearray(path.read_bytes())
    except OSError as error:
        raise EspalierError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error
    if not content or len(content) % RECORD_BYTES:
        raise EspalierError(f"{path} has {len(content)} bytes, no multiple of {RECORD_BYTES}: it is cut off; {REMEDY}")
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, RECORD_BYTES)
    labels = records[:, 0].clone()
    if labels.max() > 9:
        raise EspalierError(f"{path} has a label {int(labels.max())} above 9: it is not CIFAR-10; {REMEDY}")
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def _folder() -> Path:
    given = os.environ.get(FOLDER)
    if not given:
        raise EspalierError(f"{FOLDER} is not set; {REMEDY}")
    inner = Path(given) / "cifar-10-batches-bin"
    return inner if inner.is_dir() else Path(given)
