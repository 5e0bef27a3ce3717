"""What the README says is so."""

import re
from pathlib import Path

import pytest

import profiles

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_example_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert 0 < float(capsys.readouterr().out) < 1
    assert (tmp_path / "plan.json").exists()
    assert (tmp_path / "small.onnx").exists()


def test_device_example_is_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    (tmp_path / "my-board.onnxruntime.fp32.toml").write_text(block)
    monkeypatch.setenv("ESPALIER_PROFILES", str(tmp_path))
    assert profiles.load("my-board.onnxruntime.fp32").quantum("conv2d", "out_channels") == 8


def test_named_files_exist() -> None:
    root = Path(__file__).parent.parent
    named = set(re.findall(r"`((?:profiles|planner|backends|tools|tests)/[\w/.]+\.\w+)`", README))
    assert len(named) >= 4
    assert not [name for name in named if not (root / name).exists()]


def test_named_verbs_exist() -> None:
    from tools.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands} | {"profiles"}
    assert set(re.findall(r"`espalier (\w+)", README)) <= verbs
