"""PyTorch beyond eager fp32: programs without pickles, torch.compile, half precision, 2:4 weights, CUDA where it is."""

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import backends
from backends.artifact import sha256_of
from backends.parity import TOLERANCES
from backends.program import opened_program, saved_program
from backends.pytorch import _sparse_where_planned, options_for
from backends.semi_structured import has_two_of_four, is_two_of_four, qualifies, shape_fits, sparsified_
from profiles import Profile
from profiles.errors import BackendUnavailable, BuildError

from .nets import IMAGE, profile_of, stripes, trained

INPUTS = (torch.zeros(IMAGE),)


def test_an_exported_program_needs_no_module(tmp_path: Path) -> None:
    runtime = backends.load("pytorch")
    profile = profile_of("pytorch", "fp32", mode="exported")
    artifact = runtime.build(trained(), INPUTS, profile, tmp_path / "model.pt2")
    assert artifact.settings["mode"] == "exported"
    image, _ = stripes(1, 7)
    found = runtime.session(artifact)((image,))[0]
    np.testing.assert_allclose(found, trained()(image).detach().numpy(), rtol=1e-5, atol=1e-6)


class Attack:
    """A pickle that would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path, str]]:
        return Path.write_text, (self.path, "run")


def rewritten(content: bytes, change: dict[str, bytes]) -> bytes:
    """Return the archive with some records replaced or added; the names are those below its one folder."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        root = old.namelist()[0].split("/")[0]
        added = {f"{root}/{name}": record for name, record in change.items()}
        for name in dict.fromkeys([*old.namelist(), *added]):
            new.writestr(name, added[name] if name in added else old.read(name))
    return out.getvalue()


def entries(path_name: str, *, use_pickle: bool, content: bytes, config: str) -> bytes:
    """Return the weights' configuration with its first entry pointing to a pickle."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        table = json.loads(archive.read(next(name for name in archive.namelist() if name.endswith(config))))
    first = next(iter(table["config"]), "x")
    entry = table["config"].get(first, {"is_param": False, "tensor_meta": None})
    table["config"][first] = {**entry, "path_name": path_name, "use_pickle": use_pickle}
    return json.dumps(table).encode()


def test_a_program_that_would_run_code_is_refused_unopened(tmp_path: Path) -> None:
    content = saved_program(trained(), INPUTS)
    opened_program(content)
    trap = tmp_path / "ran"
    hostile = pickle.dumps(Attack(trap))
    weights, constants = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
    changes = {
        "sample inputs": {"data/sample_inputs/model.pt": hostile},
        "a weight": {
            weights: entries("weight_0", use_pickle=True, content=content, config="weights_config.json"),
            "data/weights/weight_0": hostile,
        },
        "an object": {
            constants: entries("opaque_obj_0", use_pickle=False, content=content, config="constants_config.json"),
            "data/constants/opaque_obj_0": hostile,
        },
        "old weights": {"data/weights/model.pt": hostile},
    }
    for what, change in changes.items():
        with pytest.raises(BuildError, match=r"refused unopened: .* pickle"):
            opened_program(rewritten(content, change))
        assert not trap.exists(), what
    with pytest.raises(BuildError, match="refused unopened: it is no whole archive"):
        opened_program(content[: len(content) // 2])


def test_a_program_with_symbolic_sizes_is_refused() -> None:
    content = saved_program(trained(), INPUTS)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        graph = json.loads(archive.read(name))
    graph["range_constraints"] = {"s0": {"as_expr": {"expr_str": "__import__('os')"}}}
    with pytest.raises(BuildError, match=r"refused unopened: .* has a as_expr"):
        opened_program(rewritten(content, {name.partition("/")[2]: json.dumps(graph).encode()}))


def test_a_changed_program_is_refused_by_its_digest_first(tmp_path: Path) -> None:
    runtime = backends.load("pytorch")
    artifact = runtime.build(trained(), INPUTS, profile_of("pytorch", "fp32", mode="exported"), tmp_path / "m.pt2")
    other = saved_program(nn.Linear(2, 2), (torch.zeros(1, 2),))
    Path(artifact.path).write_bytes(other)
    with pytest.raises(BuildError, match="changed since it was built"):
        runtime.session(artifact)
    assert sha256_of(other) != artifact.sha256


@pytest.mark.parametrize("number", ["bf16", "fp16"])
def test_half_precision_rounds_and_no_more(number: str, tmp_path: Path) -> None:
    runtime = backends.load("pytorch")
    artifact = runtime.build(trained(), INPUTS, profile_of("pytorch", number), tmp_path / "model.safetensors")
    assert artifact.dtype == {"bf16": "bfloat16", "fp16": "float16"}[number]
    assert TOLERANCES["fp32"] < artifact.parity.max_rel < TOLERANCES[number]
    assert runtime.session(artifact, model=trained())(INPUTS)[0].dtype.name in ("float32", "float16")
    assert next(trained().parameters()).dtype == torch.float32


def test_a_compiled_module_computes_the_same(tmp_path: Path) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    runtime, model = backends.load("pytorch"), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    profile = profile_of("pytorch", "fp32", mode="compile")
    artifact = runtime.build(model, (torch.zeros(2, 4),), profile, tmp_path / "model.safetensors")
    assert artifact.parity.max_rel <= TOLERANCES["fp32"]
    drawn = torch.randn(2, 4)
    found = runtime.session(artifact, model=model)((drawn,))[0]
    np.testing.assert_allclose(found, model(drawn).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_two_of_four_is_recognised() -> None:
    pattern = torch.tensor([[1.0, 0, 2, 0, 0, 0, 3, 4], [0, 0, 0, 0, 1, 0, 0, 0]])
    assert is_two_of_four(pattern)
    assert not is_two_of_four(pattern + torch.tensor([[0.0, 1, 0, 0, 0, 0, 0, 0], [0.0] * 8]))
    assert not is_two_of_four(pattern[:, :6])
    assert is_two_of_four(pattern.view(2, 8, 1, 1).expand(2, 8, 3, 3))  # along the inputs of a convolution
    assert not is_two_of_four(torch.ones(2, 4, 3, 3))
    assert not is_two_of_four(torch.ones(4))


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((32, 64), torch.float16, True),
        ((64, 128), torch.bfloat16, True),
        ((16, 64), torch.float16, False),
        ((32, 96), torch.float16, False),
        ((32, 64), torch.float32, False),
    ],
)
def test_only_shapes_that_the_kernels_take_are_sparsified(
    shape: tuple[int, int], dtype: torch.dtype, fits: bool
) -> None:
    assert shape_fits(torch.zeros(shape, dtype=dtype)) == fits


def test_without_a_layer_that_qualifies_sparse_is_refused() -> None:
    with pytest.raises(BuildError, match="no linear layer has 2:4 weights"):
        sparsified_(nn.Linear(64, 32).half())


def test_planned_patterns_are_computed_as_such_where_a_profile_does_not_say() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(64, 32))
    gpu = profile_of("pytorch", "fp16", kind="gpu")

    def sparse(profile: Profile) -> bool:
        return _sparse_where_planned(options_for(profile, "fp16"), profile, model).sparse

    assert not qualifies(model, torch.float16)
    assert not sparse(gpu)
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        assert has_two_of_four(model, (nn.Conv2d,))
        assert not has_two_of_four(model, (nn.Linear,))
        assert not qualifies(model, torch.float16)  # only linear layers are converted
        model[1].weight[:, 1::4] = 0
        model[1].weight[:, 2::4] = 0
    assert qualifies(model, torch.float16)
    assert not qualifies(model, torch.float32)
    assert sparse(gpu)
    assert not sparse(profile_of("pytorch", "fp16", kind="gpu", sparse=False))
    assert not sparse(profile_of("pytorch", "fp16"))


def test_cuda_options_are_refused_elsewhere_and_usual_there() -> None:
    gpu = options_for(profile_of("pytorch", "fp16", kind="gpu", arch="sm_90"), "fp16")
    assert (gpu.device, gpu.layout, gpu.graphs, gpu.sparse) == ("cuda", "channels_last", True, False)
    assert options_for(profile_of("pytorch", "fp16", kind="gpu", graphs=False, sparse=True), "fp16").sparse
    for option in ("graphs", "sparse"):
        with pytest.raises(BuildError, match=f"the option {option} is for CUDA devices, not for cpu"):
            options_for(profile_of("pytorch", "fp16", **{option: True}), "fp16")
    with pytest.raises(BuildError, match="2:4 weights are computed in fp16 or bf16, not in fp32"):
        options_for(profile_of("pytorch", "fp32", kind="gpu", sparse=True), "fp32")


def test_the_profile_of_a_gpu_is_built_on_one(tmp_path: Path) -> None:
    runtime, profile = backends.load("pytorch"), profile_of("pytorch", "fp16", kind="gpu", arch="sm_90")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="pytorch on a GPU needs a CUDA device"):
            runtime.build(trained(), INPUTS, profile, tmp_path / "x.safetensors")
        assert list(tmp_path.iterdir()) == []
        pytest.skip("there is no CUDA device to measure on")
    artifact = runtime.build(trained(), INPUTS, profile, tmp_path / "x.safetensors")
    image, _ = stripes(1, 7)
    bound = runtime.session(artifact, model=trained()).bind((image,))
    bound.run()
    first = bound.outputs()[0]
    bound.run()
    np.testing.assert_array_equal(first, bound.outputs()[0])
    np.testing.assert_allclose(first, trained()(image).detach().numpy(), atol=0.1)
