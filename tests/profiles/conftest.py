"""Profiles are looked up without the folders of whoever runs the tests."""

from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest

SMALLEST = """\
schema = 1
id = "{id}"
[device]
vendor = "acme"
kind = "npu"
arch = "anvil"
[runtime]
name = "onnxruntime"
[dtype]
weights = "int8"
activations = "int8"
"""

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_folders_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPALIER_PROFILES", raising=False)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda app: tmp_path / "config" / app)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write profile files into a folder that is looked up: the id, lines after the smallest profile, or the whole."""
    folder = tmp_path / "devices"
    folder.mkdir()
    monkeypatch.setenv("ESPALIER_PROFILES", str(folder))

    def write(profile_id: str, extra: str = "", *, whole: str | None = None) -> Path:
        path = folder / f"{profile_id}.toml"
        path.write_text(SMALLEST.format(id=profile_id) + extra if whole is None else whole)
        return path

    return write
