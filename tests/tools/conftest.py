"""Data that several tests train on."""

from pathlib import Path

import pytest
import torch

from backends.weights import save
from tools.examples import cifar10
from tools.examples.resnet import ResNet


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Random images in CIFAR-10's layout, and random weights; a tiny net stands for ResNet-20."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]:
        records = torch.randint(0, 256, (40, 3073), generator=generator, dtype=torch.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.numpy().tobytes())
    monkeypatch.setenv(cifar10.FOLDER, "unset")
    monkeypatch.setattr(cifar10, "resnet20", lambda: ResNet(1, (8, 8, 16)))
    save(ResNet(1, (8, 8, 16), seed=3), tmp_path / "weights.safetensors")
    return {"data": tmp_path, "weights": tmp_path / "weights.safetensors", "log": tmp_path / "log.jsonl"}
