"""The 1,797 handwritten digits that come with scikit-learn, and a residual network for them: nothing to download."""

import torch
from torch.nn import functional

from profiles.errors import BackendUnavailable
from tools.batches import Batches, Data, Normalise, Shift
from tools.examples.resnet import ResNet

TEST_IMAGES = 500


def resnet() -> ResNet:
    """Three stages of three basic blocks, 64, 112 and 192 wide, for images of 1x16x16."""
    return ResNet(3, (64, 112, 192), channels=1)


def data() -> Data:
    """1,297 digits to train on, shifted by up to a pixel, and 500 to test on; both hold every class in proportion."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise BackendUnavailable("the digits come with scikit-learn: pip install 'espalier[demo]'") from error
    values, digits = load_digits(return_X_y=True)  # (1797, 64) of 0..16
    small = torch.from_numpy(values).float().view(-1, 1, 8, 8) * (255 / 16)
    images = functional.interpolate(small, scale_factor=2, mode="bilinear").round().byte()
    labels = torch.from_numpy(digits)
    chosen = train_test_split(range(len(digits)), test_size=TEST_IMAGES, stratify=digits, random_state=0)
    train, test = (torch.tensor(sorted(part)) for part in chosen)
    pixels = images[train].float() / 255
    normalise = Normalise((float(pixels.mean()),), (float(pixels.std()),))
    return Data(
        Batches(
            images[train], labels[train], batch=64, shuffle=True, augment=Shift(pad=1, flip=False), normalise=normalise
        ),
        Batches(images[test], labels[test], batch=TEST_IMAGES, shuffle=False, normalise=normalise),
    )
