"""Settings of all tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors are faster on one thread, and a busy machine then disturbs a test less."""
    torch.set_num_threads(1)
