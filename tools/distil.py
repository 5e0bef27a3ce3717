"""Distillation from a dense network (Hinton et al. 2015), as batches and a loss that any training loop takes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from planner.evaluation import evaluating
from tools.batches import Batches


@dataclass(frozen=True)
class Taught:
    """Batches whose targets hold the label and what a teacher says: (batch, 1 + classes), the label in front."""

    train: Batches
    teacher: nn.Module
    bfloat16: bool = False

    def __len__(self) -> int:
        return len(self.train)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next passes."""
        self.train.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.train:
            with (
                evaluating(self.teacher),
                torch.no_grad(),
                torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16),
            ):
                logits = self.teacher(x)
            yield x, torch.cat([y[:, None].float(), logits.float()], 1)


@dataclass(frozen=True)
class Distillation:
    """(1 - w)·CE(y) + w·T²·KL(teacher/T || student/T), of the targets that `Taught` yields."""

    weight: float = 0.7
    temperature: float = 4.0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        labels, logits = target[:, 0].long(), target[:, 1:]
        own, other = (log_softmax(each.float() / self.temperature, 1) for each in (output, logits))
        soft = kl_div(own, other, reduction="batchmean", log_target=True) * self.temperature**2
        return (1 - self.weight) * cross_entropy(output, labels) + self.weight * soft
