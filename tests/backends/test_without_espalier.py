"""The README's lines that run a file without espalier, executed as they are written where the runtime is installed."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import backends
from profiles.errors import BackendUnavailable

from .nets import IMAGE, profile_of, stripes, trained

README = Path(os.path.abspath(__file__)).parents[2] / "README.md"
FILES = {
    "onnxruntime": "small.onnx",
    "openvino": "small.onnx",
    "executorch": "small.pte",
    "pytorch": "small.pt2",
    "tensorrt": "small.engine",
}
OPTIONS = {"pytorch": {"mode": "exported"}}


def blocks() -> dict[str, str]:
    """Return the code by the runtime that its first line names; empty if the README has no such section."""
    section = re.search(r"^#+ Without espalier$(.*?)(?=^##+ |\Z)", README.read_text(), re.M | re.S)
    found = re.findall(r"```py\n# (\w+)\n(.*?)```", section[1], re.S) if section else []
    return dict(found)


@pytest.mark.parametrize("name", FILES)
def test_a_file_runs_without_espalier(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not blocks():
        pytest.skip("the README has no section 'Without espalier'")
    code = blocks()[name]  # one for each runtime
    assert "espalier" not in code
    assert "backends" not in code
    if name == "tensorrt" and not torch.cuda.is_available():
        pytest.skip("tensorrt needs a CUDA device, and PyTorch sees none")
    try:
        runtime = backends.load(name)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    profile = profile_of(name, "fp32", **OPTIONS.get(name, {}))
    runtime.build(trained(), (torch.zeros(IMAGE),), profile, tmp_path / FILES[name])
    monkeypatch.chdir(tmp_path)
    image, _ = stripes(1, 7)
    namespace = {"x": image.numpy()}
    exec(compile(code, f"README.md ({name})", "exec"), namespace)
    np.testing.assert_allclose(np.asarray(namespace["y"]), trained()(image).detach().numpy(), rtol=1e-4, atol=1e-4)
