"""Which profiles fit is decided on recorded machines, so that every kind of machine is a case everywhere."""

import importlib
import logging
import stat
from collections.abc import Callable
from pathlib import Path

import archspec.cpu
import pytest

from profiles import Machine, detect, fit, load, why, why_not

Gpus = tuple[tuple[str, int, int], ...]  # name, compute capability
BOTH = {"onnxruntime": "1.31.1", "openvino": "2026.4.1"}
here = importlib.import_module("profiles.detect")  # `profiles.detect` itself is the function


def machine(cpu: str, runtimes: dict[str, str] | None = None, *, cuda: Gpus = ()) -> Machine:
    """Record what archspec says of a CPU, with the runtimes and GPUs given."""
    target = archspec.cpu.TARGETS[cpu]
    return Machine(
        cpu=cpu,
        cpu_ancestors=tuple(ancestor.name for ancestor in target.ancestors),
        features=frozenset(target.features),
        cuda=tuple(here.CudaDevice(name=name, compute_capability=(major, minor)) for name, major, minor in cuda),
        runtimes=BOTH if runtimes is None else runtimes,
        os="Linux",
        cores=8,
    )


V3 = ["x86_64_v3.onnxruntime.fp32", "x86_64_v3.openvino.fp32"]
V4 = ["x86_64_v4.onnxruntime.fp32", "x86_64_v4.openvino.fp32"]
A100 = (("NVIDIA A100-SXM4-80GB", 8, 0),)
CUDA_TORCH = {"pytorch": "2.13.0+cu130"}

MACHINES = [
    ("a Haswell laptop", machine("haswell"), V3),
    ("a Zen 3 desktop", machine("zen3"), V3),
    ("a Skylake server", machine("skylake_avx512"), V4 + V3),
    ("a Zen 4 server", machine("zen4"), V4 + V3),
    ("a CPU newer than archspec", machine("x86_64_v4"), V4 + V3),
    ("a CPU before AVX2", machine("ivybridge"), []),
    ("only OpenVINO", machine("zen4", {"openvino": "2025.1.0"}), [V4[1], V3[1]]),
    ("only an old ONNX Runtime", machine("zen4", {"onnxruntime": "1.16.3"}), []),
    ("no runtime", machine("zen4", {}), []),
    ("a Graviton 3", machine("neoverse_v1", {"executorch": "1.0.1"}), ["aarch64.xnnpack.fp32"]),
    ("an Arm core that archspec does not know", machine("aarch64", {"executorch": "1.0.1"}), ["aarch64.xnnpack.fp32"]),
    ("a Graviton 3 without ExecuTorch", machine("neoverse_v1"), []),
    ("an A100 box", machine("zen3", BOTH | CUDA_TORCH, cuda=A100), ["nvidia-a100.cublas.fp16", *V3]),
    ("an A100 box with the CPU build of PyTorch", machine("zen3", {"pytorch": "2.13.0+cpu"}, cuda=A100), []),
    ("a GPU of another capability under the name", machine("zen3", CUDA_TORCH, cuda=(("NVIDIA A100X", 8, 6),)), []),
    ("an H200 box", machine("sapphirerapids", CUDA_TORCH, cuda=(("NVIDIA H200", 9, 0),)), ["nvidia-h200.cublas.fp16"]),
    ("an H100 box", machine("sapphirerapids", CUDA_TORCH, cuda=(("NVIDIA H100 80GB HBM3", 9, 0),)), []),
]


@pytest.mark.parametrize(("found", "ranked"), [case[1:] for case in MACHINES], ids=[case[0] for case in MACHINES])
def test_detect_ranks_the_profiles_that_fit(found: Machine, ranked: list[str]) -> None:
    assert [profile.id for profile in detect(found)] == ranked


def test_levels_are_known_by_their_features_too() -> None:
    bare = machine("zen4").model_copy(update={"cpu": "x86_64", "cpu_ancestors": ()})
    assert [profile.id for profile in detect(bare)] == V4 + V3
    assert not bare.model_copy(update={"features": bare.features - {"avx512vl"}}).descends_from("x86_64_v4")
    assert not bare.descends_from("aarch64"), "that no feature is asked for does not make it an Arm"


def test_a_profile_may_ask_for_features(write: Callable[..., Path]) -> None:
    extra = '[device.match]\narchspec = "x86_64_v3"\nfeatures = ["avx512_vnni"]\n'
    write("anvil.onnxruntime.int8", extra)
    profile = load("anvil.onnxruntime.int8")
    assert fit(profile, machine("cascadelake")).ok
    assert fit(profile, machine("haswell")).reasons[0] == (
        "wants the CPU features avx512_vnni, and haswell lacks avx512_vnni"
    )
    assert detect(machine("cascadelake"))[0].id == V4[0], "a deeper ISA goes before more features"


def test_equal_devices_are_ranked_by_runtime_not_by_name(write: Callable[..., Path]) -> None:
    text = write("x86_64_v4.eager.fp32", '[device.match]\narchspec = "x86_64_v4"\n').read_text()
    write("x86_64_v4.eager.fp32", whole=text.replace('"onnxruntime"', '"pytorch"'))
    ranked = [profile.id for profile in detect(machine("zen4", BOTH | CUDA_TORCH))]
    assert ranked == [*V4, "x86_64_v4.eager.fp32", *V3]


def test_why_names_what_was_wanted_and_what_was_found() -> None:
    assert why(load(V4[0]), machine("zen4")) == (
        "x86_64_v4.onnxruntime.fp32 fits this machine: wants a CPU that is x86_64_v4 or descends from it, and zen4 is;"
        " wants onnxruntime >=1.20, found 1.31.1."
    )


EXPLAINED = [
    (V4[0], machine("haswell"), "x86_64_v4 or descends from it, and haswell is not"),
    (V4[0], machine("zen4", {}), "found none: pip install 'espalier[onnxruntime]'"),
    (V4[1], machine("zen4", {}), "found none: pip install 'espalier[openvino]'"),
    (V4[0], machine("zen4", {"onnxruntime": "1.16.3"}), "found 1.16.3: pip install --upgrade 'espalier[onnxruntime]'"),
    ("aarch64.xnnpack.fp32", machine("neoverse_v1"), "wants executorch, found none: pip install executorch"),
    ("nvidia-a100.cublas.fp16", machine("zen3"), "named A100 of compute capability 8.0, found none: nvidia-smi"),
    ("nvidia-h200.cublas.fp16", machine("zen3", cuda=A100), "found NVIDIA A100-SXM4-80GB (8.0)"),
    ("nvidia-a100.cublas.fp16", machine("zen3", {"pytorch": "2.13.0+cpu"}, cuda=A100), "2.13.0+cpu, which was built w"),
    ("ethos-u55-128.vela.int8", machine("zen3"), "cannot be seen from a host; choose the profile by its id"),
]


@pytest.mark.parametrize(("profile_id", "found", "sentence"), EXPLAINED)
def test_why_not_says_what_is_lacking(profile_id: str, found: Machine, sentence: str) -> None:
    text = why_not(profile_id, found)
    assert text.startswith(f"{profile_id} does not fit this machine: ")
    assert sentence in text
    assert why(load(profile_id), found) == text


def test_why_not_of_a_profile_that_fits_tells_its_place() -> None:
    assert why_not(V4[0], machine("zen4")) == f"{V4[0]} does fit this machine, at place 1 of 4."
    assert why_not(V3[0], machine("zen4")).endswith(f"at place 3 of 4, after {V4[0]}, {V4[1]}.")


def test_fit_lists_the_unmet_requirements_first() -> None:
    found = fit(load(V4[0]), machine("haswell"))
    assert not found.ok
    assert found.reasons == [*found.unmet, *found.met]
    assert (len(found.unmet), len(found.met)) == (1, 1)


def test_a_broken_file_is_skipped_with_a_warning(write: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    path = write("anvil.onnxruntime.int8", whole="schema = = 1")
    with caplog.at_level(logging.WARNING):
        assert [profile.id for profile in detect(machine("haswell"))] == V3
    assert str(path) in caplog.text


def test_this_machine_is_described_and_survives_json() -> None:
    found = Machine.here()
    assert found.cores >= 1
    assert found.cpu in archspec.cpu.TARGETS
    assert Machine.model_validate_json(found.model_dump_json()) == found


def test_features_of_a_cpu_newer_than_archspec_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    generic, raw = archspec.cpu.TARGETS["x86_64_v4"], archspec.cpu.TARGETS["zen5"]
    monkeypatch.setattr(here.archspec.cpu, "host", lambda: generic)
    monkeypatch.setattr(here.archspec_detect, "detected_info", lambda: raw)
    found = Machine.here()
    assert (found.cpu, found.cpu_ancestors) == ("x86_64_v4", ("x86_64_v3", "x86_64_v2", "x86_64"))
    assert "avx512_vnni" in found.features


def test_here_is_what_detect_asks_by_default() -> None:
    found = Machine.here()
    assert detect() == detect(found)
    if found.descends_from("x86_64_v4") and "onnxruntime" in found.runtimes and not found.cuda:
        assert detect()[0].id == V4[0]


def test_installed_runtimes_are_asked_of_the_package_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime-gpu": "1.24.0", "torch": "2.9.1+cpu"}

    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(here.importlib.metadata, "version", version)
    assert Machine.here().runtimes == {"onnxruntime": "1.24.0", "pytorch": "2.9.1+cpu"}


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def install(script: str) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))

    return install


def test_gpus_are_read_from_nvidia_smi(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi('echo "NVIDIA A100-SXM4-80GB, 8.0"\necho "NVIDIA H200, 9.0"')
    assert [str(device) for device in Machine.here().cuda] == ["NVIDIA A100-SXM4-80GB (8.0)", "NVIDIA H200 (9.0)"]


@pytest.mark.parametrize("script", ["exit 9", 'echo "No devices were found"', 'echo "NVIDIA T4, [N/A]"'])
def test_nvidia_smi_that_fails_is_no_gpu_and_a_warning(
    nvidia_smi: Callable[[str], None], script: str, caplog: pytest.LogCaptureFixture
) -> None:
    nvidia_smi(script)
    with caplog.at_level(logging.WARNING):
        assert Machine.here().cuda == ()
    assert "nvidia-smi" in caplog.text


def test_no_nvidia_smi_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Machine.here().cuda == ()
