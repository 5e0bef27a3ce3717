"""Evaluation mode, and BatchNorm by the statistics of a batch, for as long as they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from profiles.errors import PlanError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block every module evaluates; afterwards each trains or evaluates as it did before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def normalising_by_batch(model: nn.Module) -> Iterator[None]:
    """Within the block every BatchNorm takes the statistics of its batch, as after a cut, and keeps its running ones.

    A batch should have many examples. Raises PlanError if one leaves a single value a channel, which has no variance.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    modes = [(norm, norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise PlanError(f"BatchNorm needs statistics of a batch, but: {error}; give larger batches") from error
    finally:
        for norm, training, tracked in modes:
            norm.training, norm.track_running_stats = training, tracked
