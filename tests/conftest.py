"""Settings of all tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors are faster on one thread, and a busy machine then disturbs a test less."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _short_calibration() -> Iterator[None]:
    """Beside other tests no measurement becomes calm: do not wait for it; and measure fewer networks."""
    with pytest.MonkeyPatch.context() as settings:
        settings.setattr("tools.calibrate._TIMED_S", 0.0)
        settings.setattr("tools.design._NETWORKS", 60)
        yield
