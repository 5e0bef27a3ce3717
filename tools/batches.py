"""Labelled images in memory, served in batches whose order and augmentation depend on the seed and the epoch alone."""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from profiles.errors import EspalierError

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Normalise:
    """(x / 255 - mean) / std per channel, from bytes (n, c, h, w) to floats."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


@dataclass(frozen=True)
class Shift:
    """Pad each image with zeros and crop it back at a random place; with `flip`, mirror it half of the time."""

    pad: int
    flip: bool

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        tops, lefts = torch.randint(0, 2 * self.pad + 1, (2, len(images)), generator=generator)
        flips = torch.randint(0, 1 + self.flip, (len(images),), generator=generator).bool()
        return self.crop(images, tops, lefts, flips)

    def crop(self, images: Tensor, tops: Tensor, lefts: Tensor, flips: Tensor) -> Tensor:
        """Cut image i of (n, c, h, w) at (tops[i], lefts[i]) of its padded self, mirrored if flips[i]."""
        count, _, height, width = images.shape
        # Channels last, so that the gather below copies whole pixels.
        padded = functional.pad(images, (self.pad,) * 4).permute(0, 2, 3, 1).contiguous()
        across = torch.arange(width).expand(count, width)
        columns = lefts[:, None] + torch.where(flips[:, None], width - 1 - across, across)  # (n, w)
        rows = tops[:, None] + torch.arange(height)  # (n, h)
        image = torch.arange(count)[:, None, None]
        return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(eq=False)
class Batches:
    """A re-iterable of (images, labels): float32 (batch, c, h, w) and int64 (batch,).

    Shuffled batches are for training and all of one size: the last short one is dropped. Augmentation sees the images
    as they are stored, before `normalise`. The same epoch gives the same batches: call `set_epoch` before each pass.
    """

    x: Tensor
    y: Tensor
    _: KW_ONLY
    batch: int
    shuffle: bool
    augment: Augment | None = None
    normalise: Normalise | None = None
    seed: int = 0
    channels_last: bool = True
    epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        count = len(self.x)
        if count != len(self.y):
            raise EspalierError(f"{count} images have {len(self.y)} labels; give one label per image")
        if not 1 <= self.batch <= count:
            raise EspalierError(f"batch {self.batch} is impossible with {count} images; choose 1 to {count}")

    def __len__(self) -> int:
        return len(self.x) // self.batch if self.shuffle else -(-len(self.x) // self.batch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next passes."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mixed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)  # (1, 2) is not (2, 1)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        count = len(self.x)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for start in range(0, len(self) * self.batch, self.batch):
            chosen = order[start : start + self.batch]
            yield self._images(chosen, generator), self.y[chosen].long()

    def _images(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        images = self.x[chosen]
        if self.augment is not None:
            images = self.augment(images, generator)
        images = images.float() if self.normalise is None else self.normalise(images)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout)


@dataclass(frozen=True)
class Data:
    """What a data factory returns: batches to train on and batches to test on."""

    train: Batches
    test: Batches
