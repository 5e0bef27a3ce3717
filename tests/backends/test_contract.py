"""Every runtime keeps the same promises: parity with PyTorch, verified files, one clear error, nothing half done."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import backends
from backends.artifact import Artifact
from backends.contract import Runtime, flattened
from backends.export import _constants
from backends.parity import CASES, RELATIVE_TOLERANCE
from backends.quiet import quietly
from backends.registry import known
from profiles.errors import BackendUnavailable, BuildError
from profiles.schema import Device, Dtype, Match, Profile
from profiles.schema import Runtime as RuntimeTable

NAMES = ("executorch", "onnxruntime", "openvino", "pytorch", "tensorrt")
IMAGE = (2, 3, 12, 12)


def conv_net(seed: int = 0) -> nn.Module:
    """Return a small net in training mode whose normalisations look trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.BatchNorm2d(8),
            nn.Hardswish(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.BatchNorm2d(16),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 5),
        )
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model


class Tied(nn.Module):
    """Token ids in, two named outputs out, one weight and one integer buffer in two places each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("version", torch.tensor([1, 2]))
        self.register_buffer("same_version", self.version)

    def forward(self, tokens: Tensor, scale: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.embed(tokens) * scale)
        return {"hidden": hidden, "logits": self.head(hidden)}


class OneOfTwo(nn.Module):
    """A model that ignores its second input, which an export then drops."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, used: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(used), self.linear(used).softmax(-1)


CASES_TABLE = {
    "convolutions": (conv_net, (torch.zeros(IMAGE),)),
    "tokens": (Tied, (torch.tensor([[0, 10, 3]]), torch.zeros(1, 3, 8))),
    "ignored input": (OneOfTwo, (torch.zeros(2, 4), torch.zeros(2))),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep PyTorch on one thread: two, on a busy machine, wait for each other far longer than these nets run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=NAMES)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    if request.param == "tensorrt" and not torch.cuda.is_available():
        pytest.skip("tensorrt needs a CUDA device, and PyTorch sees none")
    try:
        return backends.load(request.param)
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def model() -> nn.Module:
    return conv_net()


@pytest.fixture
def inputs() -> tuple[Tensor, ...]:
    return (torch.randn(IMAGE, generator=torch.Generator().manual_seed(7)),)


def file_of(runtime: Runtime, folder: Path) -> Path:
    return folder / f"model{runtime.SUFFIX}"


def profile_for(name: str, versions: str | None = None) -> Profile:
    device = Device(vendor="test", kind="cpu", arch="x86-64", match=Match(archspec="x86_64"))
    return Profile(
        id=f"x.{name}.fp32",
        device=device,
        runtime=RuntimeTable(name=name, versions=versions),
        dtype=Dtype(weights="fp32", activations="fp32"),
    )


def test_the_known_runtimes_are_the_cases_of_this_file() -> None:
    assert known() == NAMES


def test_importing_backends_imports_no_runtime() -> None:
    heavy = {"onnx", "onnxruntime", "openvino", "executorch", "tensorrt", "torchao", "nncf"}
    code = f"import sys, backends; backends.installed; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", ["tensorflow", "measure", "", "os", "../onnxruntime"])
def test_an_unknown_runtime_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(BackendUnavailable, match="known are executorch, onnxruntime, openvino, pytorch"):
        backends.load(name)


@pytest.mark.parametrize("name", ["executorch", "onnxruntime", "openvino", "tensorrt"])
def test_a_missing_runtime_is_named_with_its_pip_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.version", None)
    with pytest.raises(BackendUnavailable, match=rf"pip install 'espalier\[{name}\]'"):
        backends.load(name)
    assert name not in backends.installed()
    assert backends.installed()["pytorch"] == torch.__version__


@pytest.mark.parametrize("case", CASES_TABLE)
def test_every_runtime_computes_what_pytorch_computes(runtime: Runtime, case: str, tmp_path: Path) -> None:
    make, inputs = CASES_TABLE[case]
    model = make()
    artifact = runtime.build(model, inputs, None, file_of(runtime, tmp_path))
    assert artifact.parity.cases == CASES
    assert artifact.parity.max_rel <= RELATIVE_TOLERANCE

    drawn = tuple(torch.randn(x.shape) if x.is_floating_point() else torch.ones_like(x) for x in inputs)
    expected = flattened(model.eval()(*drawn))
    for a, b in zip(runtime.session(artifact, model=model)(drawn), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 3, 8, 8)])
def test_the_layout_of_inputs_changes_nothing(runtime: Runtime, shape: tuple[int, ...], tmp_path: Path) -> None:
    model = conv_net().to(memory_format=torch.channels_last).eval()
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    artifact = runtime.build(model, (x,), None, tmp_path / f"model{runtime.SUFFIX}")
    expected = model(x).detach().numpy()
    for given in (x, x.contiguous()):
        np.testing.assert_allclose(runtime.session(artifact, model=model)((given,))[0], expected, rtol=1e-3, atol=1e-4)


def test_build_leaves_the_model_as_it_was(
    runtime: Runtime, model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    model.train()
    model[1].eval()  # a frozen normalisation, as in fine-tuning
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    runtime.build(model, inputs, None, file_of(runtime, tmp_path))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_artifact_survives_json_and_a_moved_folder(
    runtime: Runtime, model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    artifact = runtime.build(model, inputs, None, file_of(runtime, tmp_path / "a"), threads=2)
    artifact.save(tmp_path / "a" / "model.json")
    assert Artifact.load(tmp_path / "a" / "model.json") == artifact
    assert (artifact.runtime, artifact.runtime_version) == (runtime.NAME, runtime.version())
    assert (artifact.threads, artifact.dtype, artifact.size_bytes) == (2, "float32", Path(artifact.path).stat().st_size)

    (tmp_path / "a").rename(tmp_path / "b")
    moved = Artifact.load(tmp_path / "b" / "model.json")
    assert moved.model_copy(update={"path": artifact.path}) == artifact
    assert runtime.session(moved, model=model).threads == 2


def test_a_changed_or_missing_file_is_refused(
    runtime: Runtime, model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    artifact = runtime.build(model, inputs, None, file_of(runtime, tmp_path))
    artifact.save(tmp_path / "model.json")
    file = Path(artifact.path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BuildError, match="changed since it was built"):
        Artifact.load(tmp_path / "model.json")
    with pytest.raises(BuildError, match="changed since it was built"):
        runtime.session(artifact, model=model)
    file.unlink()
    with pytest.raises(BuildError, match="build it again"):
        Artifact.load(tmp_path / "model.json")


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 2}'])
def test_what_is_not_an_artifact_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(BuildError, match="not an artifact"):
        Artifact.load(tmp_path / "model.json")
    with pytest.raises(BuildError, match="cannot read"):
        Artifact.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "wrong", [(torch.zeros(1, 3, 12, 12),), (torch.zeros(IMAGE), torch.zeros(1)), (torch.zeros(IMAGE).double(),), ()]
)
def test_wrong_inputs_are_one_clear_error(
    runtime: Runtime, model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path, wrong: tuple[Tensor, ...]
) -> None:
    session = runtime.session(runtime.build(model, inputs, None, file_of(runtime, tmp_path)), model=model)
    with pytest.raises(BuildError, match=r"was built for \(input_0: float32 \[2, 3, 12, 12\]\)"):
        session(wrong)


def test_a_bound_model_repeats_itself_and_keeps_its_own_inputs(
    runtime: Runtime, model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    session = runtime.session(runtime.build(model, inputs, None, file_of(runtime, tmp_path)), model=model)
    strided = np.asfortranarray(inputs[0].numpy())
    bound = session.bind((strided,))
    bound.run()
    first = bound.outputs()
    strided[...] = np.nan
    other = session.bind((np.zeros_like(strided),))
    other.run()
    bound.run()
    np.testing.assert_array_equal(first[0], bound.outputs()[0])
    np.testing.assert_array_equal(first[0], session(inputs)[0])
    assert not np.array_equal(first[0], other.outputs()[0])


def falsify(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Make every exporter write one weight wrongly."""
    export, program, save = torch.onnx.export, torch.export.export, safetensors.torch.save

    def scaled(weights: dict[str, Tensor]) -> bytes:
        return save({**weights, "11.weight": weights["11.weight"] * factor})

    def exported(model: nn.Module, *args: object, **settings: object) -> object:
        true = model[11].weight.data
        model[11].weight.data = true * factor
        done = export(model, *args, **settings)
        model[11].weight.data = true
        return done

    def traced(model: nn.Module, *args: object, **settings: object) -> object:
        if isinstance(model, nn.Sequential):  # a copy, and not the graph that is lowered later
            model[11].weight.data = model[11].weight.data * factor
        return program(model, *args, **settings)

    monkeypatch.setattr(torch.onnx, "export", exported)
    monkeypatch.setattr(torch.export, "export", traced)
    monkeypatch.setattr(safetensors.torch, "save", scaled)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_falsified_export_is_refused_and_leaves_no_file(
    runtime: Runtime, inputs: tuple[Tensor, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    path = file_of(runtime, tmp_path)
    healthy = runtime.build(conv_net(), inputs, None, path)
    falsify(monkeypatch, factor)
    with pytest.raises(BuildError, match=rf"{runtime.NAME} does not compute .* relative error .* tolerance 0.0001"):
        runtime.build(conv_net(), inputs, None, file_of(runtime, tmp_path / "fresh"))
    assert list((tmp_path / "fresh").iterdir()) == []
    with pytest.raises(BuildError):
        runtime.build(conv_net(), inputs, None, path)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]
    assert healthy.content()  # a failed build does not touch the file that was there


def test_a_model_that_returns_nan_is_refused(runtime: Runtime, inputs: tuple[Tensor, ...], tmp_path: Path) -> None:
    model = conv_net()
    model[11].bias.data[0] = float("nan")
    with pytest.raises(BuildError, match="returns NaN or infinity"):
        runtime.build(model, inputs, None, file_of(runtime, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_profile_is_recorded_and_one_of_another_runtime_refused(
    runtime: Runtime, model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    path = file_of(runtime, tmp_path)
    assert runtime.build(model, inputs, profile_for(runtime.NAME), path).profile == f"x.{runtime.NAME}.fp32"
    with pytest.raises(BuildError, match=r"x\.tensorrt\.fp32 describes tensorrt, not"):
        runtime.build(model, inputs, profile_for("tensorrt"), path)


def test_a_profile_of_other_versions_is_said_aloud(
    runtime: Runtime, model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime.build(model, inputs, profile_for(runtime.NAME, "<0.1"), file_of(runtime, tmp_path))
    assert f"was made for {runtime.NAME} <0.1, this is {runtime.version()}" in caplog.text


def test_an_artifact_opens_only_where_its_parity_was_shown(
    model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    for name in ("onnxruntime", "openvino"):
        pytest.importorskip(name)
    artifact = backends.load("onnxruntime").build(model, inputs, None, tmp_path / "model.onnx")
    with pytest.raises(BuildError, match="built and checked with onnxruntime, not openvino"):
        backends.load("openvino").session(artifact)


def test_an_artifact_opens_only_with_the_version_that_it_was_checked_with(
    runtime: Runtime, model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    artifact = runtime.build(model, inputs, None, file_of(runtime, tmp_path))
    older = artifact.model_copy(update={"runtime_version": "0.1"})
    with pytest.raises(BuildError, match=rf"checked with {runtime.NAME} 0\.1, but .* is installed; build it again"):
        runtime.session(older, model=model)


def test_both_onnx_runtimes_may_share_one_file(model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path) -> None:
    for name in ("onnxruntime", "openvino"):
        pytest.importorskip(name)
    first, second = (
        backends.load(name).build(model, inputs, None, tmp_path / "model.onnx") for name in ("onnxruntime", "openvino")
    )
    assert first.sha256 == second.sha256
    assert first.content() == second.content()


def test_a_file_that_is_already_there_is_not_taken_for_the_new_model(
    runtime: Runtime, model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    stale = runtime.build(conv_net(1), inputs, None, file_of(runtime, tmp_path))
    fresh = runtime.build(model, inputs, None, file_of(runtime, tmp_path))
    assert stale.sha256 != fresh.sha256
    with pytest.raises(BuildError, match="changed since it was built"):
        stale.content()


def floats_of(name: str, content: bytes) -> np.ndarray:
    """Return the bits of the fp32 constants in a file of a runtime."""
    if name == "pytorch":
        arrays = [value.numpy() for value in safetensors.torch.load(content).values()]
    else:
        onnx = pytest.importorskip("onnx")
        arrays = [onnx.numpy_helper.to_array(value) for value in _constants(onnx.load_from_string(content).graph)]
    return np.concatenate([each.ravel().view(np.uint32) for each in arrays if each.dtype == np.float32])


def test_no_constant_of_a_file_is_subnormal(
    runtime: Runtime, model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        model[0].weight[:3] = 1e-30
        model[1].weight[:3] = 1e-10  # folded into the convolution: 1e-40, a subnormal
        model[11].weight[0, :5] = 1e-41
    stored: list[bytes] = []
    if runtime.NAME == "executorch":  # what its file holds is packed by XNNPACK's own serialiser
        with quietly():
            from executorch.exir._serialize._named_data_store import NamedDataStore

        add = NamedDataStore.add_named_data

        def noted(self: object, key: str, data: object, *rest: object, **more: object) -> None:
            stored.append(data.numpy().tobytes() if isinstance(data, Tensor) else bytes(data))
            add(self, key, data, *rest, **more)

        monkeypatch.setattr(NamedDataStore, "add_named_data", noted)
    artifact = runtime.build(model, inputs, None, file_of(runtime, tmp_path))
    if runtime.NAME == "tensorrt":
        pytest.skip("an engine cannot be read; the ONNX file that it is made of is the one of onnxruntime")
    found = np.frombuffer(b"".join(stored), np.uint32) if stored else floats_of(runtime.NAME, artifact.content())
    assert len(found) >= 3 * 8 * 9 + 16 * 8 * 9 + 16 * 5
    assert not (((found & 0x7F800000) == 0) & ((found & 0x007FFFFF) != 0)).any()
    folded = 3 * 27 if runtime.NAME != "pytorch" else 0  # eager PyTorch runs the module as it is: not folded
    assert artifact.subnormals_flushed >= 5 + folded


class Spy(nn.Module):
    """A module that notes how many threads it runs with."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.seen = seen

    def __deepcopy__(self, memo: dict[int, object]) -> "Spy":
        copied = Spy(self.seen)
        copied.linear.load_state_dict(self.linear.state_dict())
        return copied

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.get_num_threads())
        return self.linear(x)


def test_eager_pytorch_runs_with_its_own_threads_and_gives_them_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    runtime, model = backends.load("pytorch"), Spy(seen := [])
    artifact = runtime.build(model, (torch.zeros(1, 2),), None, tmp_path / "spy.safetensors")
    session = runtime.session(artifact, threads=before + 1, model=model)
    seen.clear()
    session((torch.zeros(1, 2),))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_eager_pytorch_needs_a_module_that_its_weights_fit(
    model: nn.Module, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    runtime = backends.load("pytorch")
    artifact = runtime.build(model, inputs, None, tmp_path / "model.safetensors")
    with pytest.raises(BuildError, match="holds weights only"):
        runtime.session(artifact)
    with pytest.raises(BuildError, match="do not fit the module"):
        runtime.session(artifact, model=nn.Linear(2, 2))
    other = conv_net(1)
    found = runtime.session(artifact, model=other)(inputs)[0]
    np.testing.assert_array_equal(found, model.eval()(*inputs).detach().numpy())


def test_eager_pytorch_is_measured_contiguous_whatever_it_was_trained_in(
    inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    runtime, model = backends.load("pytorch"), conv_net().to(memory_format=torch.channels_last)
    seen: list[bool] = []
    model[6].register_forward_hook(lambda module, *_: seen.append(module.weight.is_contiguous()))
    artifact = runtime.build(model, inputs, None, tmp_path / "model.safetensors")
    session = runtime.session(artifact, model=model)
    seen.clear()
    session(inputs)
    assert seen == [True]
    assert not model[6].weight.is_contiguous()
