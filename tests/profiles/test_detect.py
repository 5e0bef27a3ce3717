"""Which profiles fit is decided on recorded machines, so that every kind of machine is a case everywhere."""

import importlib
import logging
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import archspec.cpu
import pytest

from profiles import Machine, cuda, detect, fit, load, why, why_not
from profiles.cuda import CudaDevice

Gpus = tuple[tuple[str, int, int], ...]  # name, compute capability
BOTH = {"onnxruntime": "1.31.1", "openvino": "2026.4.1"}
here = importlib.import_module("profiles.machine")


def machine(cpu: str, runtimes: dict[str, str] | None = None, *, cuda: Gpus = ()) -> Machine:
    """Record what archspec says of a CPU, with the runtimes and GPUs given."""
    target = archspec.cpu.TARGETS[cpu]
    return Machine(
        cpu=cpu,
        cpu_ancestors=tuple(ancestor.name for ancestor in target.ancestors),
        features=frozenset(target.features),
        cuda=tuple(CudaDevice(name=name, compute_capability=(major, minor)) for name, major, minor in cuda),
        runtimes=BOTH if runtimes is None else runtimes,
        os="Linux",
        cores=8,
    )


RECORDINGS = Path(__file__).parent / "machines"
DATA = Path(cuda.__file__).parent / "data"
EAGER = '[runtime]\nname = "pytorch"\nversions = ">=2.8"\n'
BASE = ["x86_64.onnxruntime.fp32"]
V3 = ["x86_64_v3.onnxruntime.fp32", "x86_64_v3.openvino.fp32"]
V4 = ["x86_64_v4.onnxruntime.fp32", "x86_64_v4.openvino.fp32"]
VNNI = ["x86_64_v4.openvino.int8-vnni"]
INT8 = ["x86_64_v3.onnxruntime.int8"]  # no width is known, so it comes last
ARM = ["aarch64.xnnpack.fp32", "aarch64-fp16.xnnpack.fp16"]
ARM_INT8 = ["aarch64-dotprod.xnnpack.int8", "aarch64-i8mm.xnnpack.int8", "aarch64.xnnpack.int8"]
SIMT = "nvidia-simt.cudnn.fp32"
A100 = (("NVIDIA A100-SXM4-80GB", 8, 0),)
CUDA_TORCH = {"pytorch": "2.13.0+cu130"}

MACHINES = [
    ("a Haswell laptop", machine("haswell"), V3 + BASE + INT8),
    ("a Skylake server", machine("skylake_avx512"), V4 + V3 + BASE + INT8),
    ("a Zen 4 server", machine("zen4"), V4 + V3 + BASE + VNNI + INT8),
    ("a CPU newer than archspec", machine("x86_64_v4"), V4 + V3 + BASE + INT8),
    ("a CPU before AVX2", machine("ivybridge"), BASE),
    ("only OpenVINO", machine("zen4", {"openvino": "2025.1.0"}), [V4[1], V3[1], *VNNI]),
    ("only an old ONNX Runtime", machine("zen4", {"onnxruntime": "1.16.3"}), []),
    ("no runtime", machine("zen4", {}), []),
    ("an Arm core that archspec does not know", machine("aarch64", {"executorch": "1.0.1"}), [ARM[0], ARM_INT8[2]]),
    ("a Graviton 3 without ExecuTorch", machine("neoverse_v1"), ["aarch64.onnxruntime.fp32"]),
    ("an A100 box with the CPU build of PyTorch", machine("ivybridge", {"pytorch": "2.13.0+cpu"}, cuda=A100), []),
    ("a GPU of another capability under the name", machine("ivybridge", CUDA_TORCH, cuda=(("A100X", 8, 6),)), [SIMT]),
    ("an H200 box", machine("ivybridge", CUDA_TORCH, cuda=(("NVIDIA H200", 9, 0),)), ["nvidia-h200.cublas.fp16"]),
    ("an H100 box", machine("ivybridge", CUDA_TORCH, cuda=(("NVIDIA H100 PCIe", 9, 0),)), ["nvidia-h100.cublas.fp16"]),
]

# Recorded machines: what must come first, and in this order; and what must not be offered.
RECORDED = [
    ("laptop-x86-64-v2", BASE, [*V3, *V4]),
    ("desktop-zen3", [*V3, "x86_64_v3.pytorch.fp32", *BASE], [*V4, SIMT]),
    ("server-sapphire-rapids", V4, ["aarch64.onnxruntime.fp32"]),
    ("apple-m3", ["apple-ane.coreml.fp16", "aarch64.onnxruntime.fp32"], BASE),
    ("raspberry-pi-5", ["aarch64.xnnpack.fp32", "aarch64.onnxruntime.fp32", ARM[1]], ["aarch64-i8mm.xnnpack.int8"]),
    (
        "graviton-3",
        [ARM[0], "aarch64.onnxruntime.fp32", ARM[1], *ARM_INT8],
        ["apple-ane.coreml.fp16"],
    ),
    ("box-a100", ["nvidia-a100.cublas.tf32", "nvidia-a100.cublas.fp16"], ["nvidia-h100.cublas.fp16", *V4]),
    ("box-two-gpus", ["nvidia-h100.cublas.fp16", "nvidia-ampere.tensorrt.fp16"], ["nvidia-a100.cublas.fp16"]),
    ("jetson-agx-orin", ["jetson-agx-orin-64gb.tensorrt.fp16"], ["nvidia-a100.tensorrt.int8", *BASE]),
    ("board-rk3588", ["rk3588.rknn.fp16", "rk3588.rknn.int8"], ["rk3566.rknn.int8", "aarch64.onnxruntime.fp32"]),
    ("laptop-core-ultra", ["intel-npu.openvino.fp16", "intel-npu.openvino.int8", V3[1]], V4),
    ("server-without-runtimes", [], [*V4, *V3, *BASE]),
]


def recorded(name: str) -> Machine:
    return Machine.model_validate_json((RECORDINGS / f"{name}.json").read_bytes())


@pytest.mark.parametrize(("name", "first", "never"), RECORDED, ids=[case[0] for case in RECORDED])
def test_recorded_machines_are_offered_what_fits_them(name: str, first: list[str], never: list[str]) -> None:
    found = recorded(name)
    ranked = [profile.id for profile in detect(found)]
    assert ranked[: len(first)] == first
    assert not set(never) & set(ranked)
    assert bool(ranked) is bool(first)
    for profile_id in never:
        assert why_not(profile_id, found).startswith(f"{profile_id} does not fit this machine: wants ")


def test_every_recording_is_a_case() -> None:
    assert {file.stem for file in RECORDINGS.iterdir()} == {name for name, *_ in RECORDED}


def test_amx_is_offered_before_vnni_where_both_run() -> None:
    ranked = [profile.id for profile in detect(recorded("server-sapphire-rapids"))]
    order = ["sapphirerapids.xnnpack.int8-amx", "x86_64_v4.xnnpack.int8-vnni", "x86_64_v4.xnnpack.int8"]
    assert sorted(order, key=ranked.index) == order
    assert ranked.index("sapphirerapids.openvino.bf16-amx") > ranked.index(V3[0]), "fp32 keeps the model as it is"


def test_both_gpus_of_a_box_are_seen() -> None:
    found = recorded("box-two-gpus")
    assert "found NVIDIA H100 80GB HBM3 (9.0)" in why(load("nvidia-h100.cublas.fp16"), found)
    assert "found NVIDIA GeForce RTX 3090 (8.6)" in why(load("nvidia-ampere.tensorrt.int8"), found)
    unfit = why_not("nvidia-a100.cublas.fp16", found)
    assert "found NVIDIA H100 80GB HBM3 (9.0), NVIDIA GeForce RTX 3090 (8.6)" in unfit


def test_a_profile_that_knows_no_width_comes_last_of_its_kind() -> None:
    ranked = [profile.id for profile in detect(recorded("box-a100"))]
    assert ranked.index(SIMT) == ranked.index(V3[0]) - 1


@pytest.mark.parametrize(("found", "ranked"), [case[1:] for case in MACHINES], ids=[case[0] for case in MACHINES])
def test_detect_ranks_the_profiles_that_fit(found: Machine, ranked: list[str]) -> None:
    assert [profile.id for profile in detect(found)] == ranked


def test_levels_are_known_by_their_features_too() -> None:
    bare = machine("zen4").model_copy(update={"cpu": "x86_64", "cpu_ancestors": ()})
    assert [profile.id for profile in detect(bare)] == V4 + V3 + BASE + VNNI + INT8
    assert not bare.model_copy(update={"features": bare.features - {"avx512vl"}}).descends_from("x86_64_v4")
    assert not bare.descends_from("aarch64"), "that no feature is asked for does not make it an Arm"


def test_a_profile_may_ask_for_features(write: Callable[..., Path]) -> None:
    extra = '[device.match]\narchspec = "x86_64_v3"\nfeatures = ["avx512_vnni"]\n'
    text = write("anvil.onnxruntime.int8", extra).read_text()
    write("anvil.onnxruntime.int8", whole=text.replace('kind = "npu"', 'kind = "cpu"'))
    profile = load("anvil.onnxruntime.int8")
    assert fit(profile, machine("cascadelake")).ok
    assert fit(profile, machine("haswell")).reasons[0] == (
        "wants the CPU features avx512_vnni, and haswell lacks avx512_vnni"
    )
    ranked = [other.id for other in detect(machine("cascadelake"))]
    assert ranked[0] == V4[0], "int8 rounds the model, so it comes after fp32"
    assert ranked[-2:] == ["anvil.onnxruntime.int8", *INT8], "they know no width"


def test_equal_devices_are_ranked_by_runtime_not_by_name(write: Callable[..., Path]) -> None:
    text = (DATA / "x86_64_v4.onnxruntime.fp32.toml").read_text()
    write("a.eager.fp32", whole=text.replace('"x86_64_v4.onnxruntime.fp32"', '"a.eager.fp32"') + EAGER)
    ranked = [profile.id for profile in detect(machine("zen4", BOTH | CUDA_TORCH))]
    assert ranked[:3] == [*V4, "a.eager.fp32"]


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
    (
        "nvidia-a100.cublas.fp16",
        machine("zen3"),
        "A100 of compute capability 8.0, found none: neither nvidia-smi",
    ),
    ("nvidia-h200.cublas.fp16", machine("zen3", cuda=A100), "found NVIDIA A100-SXM4-80GB (8.0)"),
    ("rk3588.rknn.int8", machine("aarch64"), "a board whose device tree names rockchip,rk3588, found none"),
    ("intel-npu.openvino.int8", machine("zen4"), "an accelerator with the kernel driver intel_vpu, found none"),
    ("apple-ane.coreml.fp16", machine("m1", {"coreml": "9.0"}), "wants Darwin, found Linux"),
    (SIMT, machine("zen3", CUDA_TORCH, cuda=(("B200", 10, 0),)), "of compute capability from 6.0 to 8.9, found B200"),
    ("amd-dpu.vitis.int8", machine("zen3"), "wants vitis, which is no package that can be looked for"),
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
    assert why_not(V4[0], machine("zen4")) == f"{V4[0]} does fit this machine, at place 1 of 7."
    assert why_not(V3[0], machine("zen4")).endswith(f"at place 3 of 7, after {V4[0]}, {V4[1]}.")


def test_fit_lists_the_unmet_requirements_first() -> None:
    found = fit(load(V4[0]), machine("haswell"))
    assert not found.ok
    assert found.reasons == [*found.unmet, *found.met]
    assert (len(found.unmet), len(found.met)) == (1, 1)


def test_a_broken_file_is_skipped_with_a_warning(write: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    path = write("anvil.onnxruntime.int8", whole="schema = = 1")
    with caplog.at_level(logging.WARNING):
        assert [profile.id for profile in detect(machine("haswell"))] == V3 + BASE + INT8
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
    nvidia_smi('echo "NVIDIA A100-SXM4-80GB, 8.0, 81920"\necho "NVIDIA H200, 9.0, [N/A]"')
    found = Machine.here().cuda
    assert [str(device) for device in found] == ["NVIDIA A100-SXM4-80GB (8.0)", "NVIDIA H200 (9.0)"]
    assert [device.memory_bytes for device in found] == [81920 * 2**20, None]


@pytest.mark.parametrize("script", ["exit 9", 'echo "No devices were found"', 'echo "NVIDIA T4, [N/A]"'])
def test_nvidia_smi_that_fails_is_no_gpu_and_a_warning(
    nvidia_smi: Callable[[str], None],
    script: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvidia_smi(script)
    monkeypatch.setattr(cuda.ctypes.util, "find_library", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert Machine.here().cuda == ()
    assert "nvidia-smi" in caplog.text


def test_neither_nvidia_smi_nor_a_driver_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cuda.ctypes.util, "find_library", lambda name: None)
    assert Machine.here().cuda == ()


class Driver:
    """The CUDA driver of a Jetson, as ctypes calls it."""

    @staticmethod
    def _set(pointer: Any, value: int) -> int:
        pointer._obj.value = value
        return 0

    def cuInit(self, flags: int) -> int:
        return flags

    def cuDeviceGetCount(self, count: Any) -> int:
        return self._set(count, 1)

    def cuDeviceGet(self, handle: Any, index: int) -> int:
        return self._set(handle, index)

    def cuDeviceGetName(self, name: Any, size: int, handle: Any) -> int:
        assert size >= 5
        name.value = b"Orin"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: Any) -> int:
        return self._set(value, {75: 8, 76: 7}[attribute])

    def cuDeviceTotalMem_v2(self, size: Any, handle: Any) -> int:
        return self._set(size, 62841 * 2**20)


def test_gpus_of_a_board_without_nvidia_smi_are_asked_of_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cuda.ctypes.util, "find_library", lambda name: f"lib{name}.so.1")
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver())
    assert Machine.here().cuda == recorded("jetson-agx-orin").cuda


def test_a_driver_that_does_not_load_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cuda.ctypes.util, "find_library", lambda name: str(tmp_path / "libnone.so"))
    with caplog.at_level(logging.WARNING):
        assert Machine.here().cuda == ()
    assert "the CUDA driver cannot be loaded" in caplog.text


def test_a_board_is_known_by_its_device_tree_and_its_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compatible").write_bytes(b"radxa,rock-5b\0rockchip,rk3588\0")
    (tmp_path / "drivers" / "intel_vpu").mkdir(parents=True)
    (tmp_path / "accel0" / "device").mkdir(parents=True)
    (tmp_path / "accel0" / "device" / "driver").symlink_to(tmp_path / "drivers" / "intel_vpu")
    monkeypatch.setattr(here, "_DEVICE_TREE", tmp_path / "compatible")
    monkeypatch.setattr(here, "_DRIVERS", (f"{tmp_path}/accel*/device/driver",))
    found = Machine.here()
    assert found.device_tree == ("radxa,rock-5b", "rockchip,rk3588")
    assert found.accelerators == ("intel_vpu",)
