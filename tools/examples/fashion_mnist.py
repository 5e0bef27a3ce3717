"""Fashion-MNIST (Xiao et al. 2017) in its official layout: four gzipped idx files."""

import gzip
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from profiles.errors import EspalierError
from tools.batches import Batches, Data, Normalise, Shift

FOLDER = "ESPALIER_FASHION_MNIST"
REMEDY = (
    "get train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
    f"t10k-labels-idx1-ubyte.gz from https://github.com/zalandoresearch/fashion-mnist, and set {FOLDER} to their folder"
)
UNSIGNED_BYTE = 8  # the third byte of an idx file; the fourth is the number of axes


def data() -> Data:
    """Fashion-MNIST, its images with two rows and columns of zeros around them: 1x32x32."""
    given = os.environ.get(FOLDER)
    if not given:
        raise EspalierError(f"{FOLDER} is not set; {REMEDY}")
    return load(Path(given), Normalise((0.2190,), (0.3318,)))  # of the padded training images


def load(folder: Path, normalise: Normalise, *, batch: int = 128, seed: int = 0) -> Data:
    """Training batches with random crops (pad 4) and flips, and test batches as they are."""
    (images, labels), (test_images, test_labels) = (labelled(folder, part) for part in ("train", "t10k"))
    augment = Shift(pad=4, flip=True)
    train = Batches(images, labels, batch=batch, shuffle=True, augment=augment, normalise=normalise, seed=seed)
    test_batch = min(500, len(test_images))
    return Data(train, Batches(test_images, test_labels, batch=test_batch, shuffle=False, normalise=normalise))


def labelled(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """The images (n, 1, 32, 32) and labels (n,) of a part, in bytes; EspalierError if they do not belong together."""
    images, labels = read(folder / f"{part}-images-idx3-ubyte.gz"), read(folder / f"{part}-labels-idx1-ubyte.gz")
    if images.dim() != 3 or labels.shape != images.shape[:1]:
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise EspalierError(f"{folder} holds images and labels of shapes {shapes}, not one label per image; {REMEDY}")
    return functional.pad(images, (2, 2, 2, 2)).unsqueeze(1), labels


def read(path: Path) -> Tensor:
    """The bytes of one idx file, in its shape; EspalierError if it is no whole one."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise EspalierError(f"{path} cannot be read ({error}); {REMEDY}") from error
    axes = content[3] if len(content) > 3 else 0
    if content[:3] != bytes([0, 0, UNSIGNED_BYTE]) or not axes or len(content) < 4 + 4 * axes:
        raise EspalierError(f"{path} is no idx file of bytes; {REMEDY}")
    shape = np.frombuffer(content, ">u4", axes, 4).tolist()
    values = bytearray(content[4 + 4 * axes :])
    if len(values) != np.prod(shape):
        raise EspalierError(f"{path} has {len(values)} bytes for the shape {shape}: it is cut off; {REMEDY}")
    return torch.frombuffer(values, dtype=torch.uint8).view(shape)
