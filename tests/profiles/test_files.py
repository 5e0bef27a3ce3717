"""Every profile file that is shipped is a case."""

import re
import tomllib
from datetime import date
from pathlib import Path

import pytest

import profiles
from profiles import lint

DATA = Path(profiles.__file__).parent / "data"
FILES = sorted(DATA.glob("*.toml"))
TABLES = {file.name.removesuffix(".toml"): tomllib.loads(file.read_text()) for file in FILES}
IDS = sorted(name for name, table in TABLES.items() if not table.get("abstract"))
UNPROVEN = {"inferred", "folklore"}

# id, op, axis, quantum: the published table, one line for each number that the planner relies on.
QUANTA = [
    ("x86_64.onnxruntime.fp32", "conv2d", "out_channels", 8),
    ("x86_64_v3.onnxruntime.fp32", "conv2d", "out_channels", 8),
    ("x86_64_v3.onnxruntime.fp32", "conv2d", "in_channels", 8),
    ("x86_64_v4.onnxruntime.fp32", "conv2d", "out_channels", 16),
    ("x86_64_v4.onnxruntime.fp32", "linear", "out_channels", 1),
    ("aarch64.onnxruntime.fp32", "linear", "out_channels", 16),
    ("aarch64.onnxruntime.fp32", "conv2d", "out_channels", 1),
    ("x86_64_v3.openvino.fp32", "conv2d", "out_channels", 8),
    ("x86_64_v4.openvino.fp32", "conv2d", "in_channels", 1),
    ("x86_64_v4.openvino.fp32", "conv2d", "out_channels", 16),
    ("x86_64_v4.openvino.fp32", "linear", "hidden", 16),
    ("x86_64_v4.openvino.int8-vnni", "conv2d", "out_channels", 16),
    ("x86_64_v4.openvino.int8-vnni", "grouped_conv2d", "in_channels", 4),
    ("sapphirerapids.openvino.int8-amx", "conv2d", "in_channels", 64),
    ("sapphirerapids.openvino.bf16-amx", "conv2d", "in_channels", 32),
    ("x86_64_v4.pytorch.fp32", "conv2d", "out_channels", 1),
    ("x86_64.xnnpack.fp32", "conv2d", "out_channels", 8),
    ("x86_64_v3.xnnpack.fp32", "conv2d", "out_channels", 16),
    ("x86_64_v4.xnnpack.fp32", "conv2d", "out_channels", 32),
    ("x86_64_v4.xnnpack.fp32", "linear", "out_channels", 16),
    ("x86_64_v4.xnnpack.fp32", "depthwise_conv2d", "out_channels", 16),
    ("x86_64_v4.xnnpack.fp32", "conv2d", "in_channels", 1),
    ("x86_64_v3.xnnpack.int8", "conv2d", "out_channels", 8),
    ("x86_64_v4.xnnpack.int8-vnni", "conv2d", "out_channels", 16),
    ("x86_64_v4.xnnpack.int8-vnni", "conv2d", "in_channels", 8),
    ("sapphirerapids.xnnpack.int8-amx", "conv2d", "out_channels", 64),
    ("sapphirerapids.xnnpack.int8-amx", "conv2d", "in_channels", 4),
    ("aarch64.xnnpack.fp32", "conv2d", "out_channels", 8),
    ("aarch64.xnnpack.fp32", "linear", "hidden", 8),
    ("aarch64-fp16.xnnpack.fp16", "conv2d", "out_channels", 16),
    ("aarch64-dotprod.xnnpack.int8", "conv2d", "in_channels", 4),
    ("aarch64-i8mm.xnnpack.int8", "conv2d", "in_channels", 8),
    ("nvidia-v100.cudnn.fp16", "conv2d", "in_channels", 8),
    ("nvidia-a100.cublas.fp16", "linear", "out_channels", 8),
    ("nvidia-a100.cublas.fp16", "linear", "hidden", 64),
    ("nvidia-a100.cublas.fp16", "matmul", "head_dim", 8),
    ("nvidia-a100.cublas.tf32", "linear", "out_channels", 4),
    ("nvidia-h100.cublas.fp16", "linear", "hidden", 64),
    ("nvidia-h200.cublas.fp16", "linear", "hidden", 64),
    ("nvidia-h200.cublas.fp16", "matmul", "heads", 1),
    ("nvidia-ampere.tensorrt.int8", "conv2d", "out_channels", 32),
    ("nvidia-ampere.tensorrt.fp16", "conv2d", "out_channels", 8),
    ("nvidia-simt.cudnn.fp32", "linear", "out_channels", 1),
    ("jetson-agx-orin-64gb.tensorrt-dla.int8", "conv2d", "in_channels", 32),
    ("jetson-agx-orin-64gb.tensorrt-dla.fp16", "conv2d", "in_channels", 16),
    ("ethos-u55-32.vela.int8", "conv2d", "out_channels", 4),
    ("ethos-u55-128.vela.int8", "conv2d", "out_channels", 16),
    ("ethos-u55-128.vela.int8", "conv2d", "in_channels", 8),
    ("ethos-u65-512.vela.int8", "conv2d", "out_channels", 16),
    ("ethos-u85-256.vela.int8", "conv2d", "out_channels", 8),
    ("ethos-u85-2048.vela.int8", "conv2d", "in_channels", 16),
    ("qualcomm-htp.qnn.int8", "conv2d", "out_channels", 32),
    ("rk3588.rknn.int8", "matmul", "out_channels", 32),
    ("rk3588.rknn.int8", "conv2d", "out_channels", 1),
    ("rk3566.rknn.fp16", "matmul", "in_channels", 16),
    ("intel-npu.openvino.fp16", "conv2d", "out_channels", 16),
    ("sony-imx500.mct.int4", "conv2d", "out_channels", 64),
    ("ascend-310.cann.int8", "conv2d", "in_channels", 32),
    ("ascend-310.cann.fp16", "matmul", "tokens", 16),
    ("ti-tinynpu.nnc.int8", "conv2d", "out_channels", 4),
    ("axis-artpec9.tflite.int8", "conv2d", "out_channels", 16),
    ("coral-edgetpu.tflite.int8", "conv2d", "out_channels", 1),
]

PARTS = """
x86_64 x86_64_v3 x86_64_v4 sapphirerapids aarch64 aarch64-fp16 aarch64-dotprod aarch64-i8mm
nvidia-v100 nvidia-a100 nvidia-h100 nvidia-h200 nvidia-ampere nvidia-simt jetson-agx-orin-64gb
ethos-u55-32 ethos-u55-64 ethos-u55-128 ethos-u55-256 ethos-u65-256 ethos-u65-512
ethos-u85-128 ethos-u85-256 ethos-u85-512 ethos-u85-1024 ethos-u85-2048
qualcomm-htp qualcomm-htp-v68 rk3588 rk3576 rk3566 rk3562 intel-npu intel-ncs2 apple-ane
sony-imx500 amd-dpu ascend-310 ti-tinynpu axis-artpec9 nxp-neutron-n3 coral-edgetpu
"""
NO_WIDTH_IS_KNOWN = {"nvidia-simt.cudnn.fp32", "nxp-neutron-n3.executorch.int8", "x86_64_v3.onnxruntime.int8"}


def test_names_are_the_files_that_are_not_abstract() -> None:
    assert profiles.names() == tuple(IDS)
    assert len(IDS) >= 30
    assert {name.partition(".")[0] for name in IDS} == set(PARTS.split())


def test_every_file_is_clean() -> None:
    assert [str(finding) for finding in lint.lint()] == []


def test_the_device_of_the_readme_is_clean(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (DATA.parent.parent / "README.md").read_text(), re.S)
    path = tmp_path / "my-board.onnxruntime.fp32.toml"
    path.write_text(block)
    assert [str(finding) for finding in lint.lint(path)] == []


def test_every_file_is_a_profile_or_extended_by_one() -> None:
    extended = {parent for table in TABLES.values() for parent in table.get("extends", [])}
    assert {name for name, table in TABLES.items() if table.get("abstract")} <= extended


@pytest.mark.parametrize("profile_id", IDS)
def test_profile_loads_under_its_file_name(profile_id: str) -> None:
    assert profiles.load(profile_id).id == profile_id


@pytest.mark.parametrize("profile_id", IDS)
def test_every_statement_is_sourced_with_a_quote_and_a_date(profile_id: str) -> None:
    profile = profiles.load(profile_id)
    sources = {source.id: source for source in profile.source}
    for statement in profile.cited():
        for name in statement.sources:
            assert len(sources[name].quote) > 10
            assert sources[name].retrieved >= date(2026, 1, 1)


@pytest.mark.parametrize("profile_id", IDS)
def test_profile_survives_json(profile_id: str) -> None:
    profile = profiles.load(profile_id)
    assert profiles.Profile.model_validate_json(profile.model_dump_json(by_alias=True)) == profile


@pytest.mark.parametrize("profile_id", IDS)
def test_only_evidence_forbids_a_width(profile_id: str) -> None:
    rules = profiles.load(profile_id).granularity
    assert bool(rules) is (profile_id not in NO_WIDTH_IS_KNOWN)
    assert not [rule for rule in rules if rule.mode in ("cliff", "reject") and rule.confidence in UNPROVEN]


@pytest.mark.parametrize("profile_id", IDS)
@pytest.mark.parametrize("kind", ["filters", "in_channels", "depth"])
def test_removing_filters_and_layers_pays_everywhere(profile_id: str, kind: str) -> None:
    known = profiles.load(profile_id).pays(kind)
    assert known is not None
    assert known.pays == "yes"


@pytest.mark.parametrize(("profile_id", "op", "axis", "quantum"), QUANTA)
def test_quantum_is_the_published_one(profile_id: str, op: str, axis: str, quantum: int) -> None:
    assert profiles.load(profile_id).quantum(op, axis) == quantum


def test_unstructured_zeros_pay_only_where_a_mechanism_was_found() -> None:
    verdicts = {}
    for profile_id in IDS:
        known = profiles.load(profile_id).pays("unstructured")
        assert known is not None, profile_id
        verdicts[profile_id] = known.pays
    conditional = {profile_id for profile_id, pays in verdicts.items() if pays == "conditional"}
    sparse = {name for name in verdicts if ".vela." in name or (".xnnpack.fp" in name)}
    assert conditional == sparse | {"sapphirerapids.openvino.int8-amx", "apple-ane.coreml.fp16"}
    assert "yes" not in verdicts.values()


def test_onnxruntime_leaves_the_blocked_layout_beside_multiples_of_four() -> None:
    rules = profiles.load("x86_64_v4.onnxruntime.fp32").rules("conv2d", "in_channels")
    cliffs = [(r.kernel, r.quantum, r.at_least, r.penalty) for r in rules if r.mode == "cliff"]
    assert cliffs == [(None, 4, 16, 1.9), ("1x1", 4, 16, 1.1)]


@pytest.mark.parametrize(
    ("kernel", "paid"),
    [((3, 3), {8: 16, 16: 16, 17: 32, 32: 32, 33: 64, 48: 64}), ((1, 1), {16: 16, 17: 32, 33: 48, 48: 48, 49: 64})],
)
def test_xnnpack_pays_for_whole_tiles_as_measured(kernel: tuple[int, int], paid: dict[int, int]) -> None:
    rules = profiles.load("x86_64_v4.xnnpack.fp32").proven("conv2d", "out_channels", kernel)
    for width, tiles in paid.items():
        assert {rule.effective(width) for rule in rules if rule.about(width)} == {(tiles, tiles)}, width


def test_the_sparse_peak_of_the_dla_is_not_a_dense_one() -> None:
    peak = profiles.load("jetson-agx-orin-64gb.tensorrt-dla.int8").peak
    assert peak is not None
    assert set(peak.ops_per_s) == {"int8_sparse"}


def test_every_source_of_an_abstract_file_reaches_a_profile() -> None:
    used = {source.id for profile_id in IDS for source in profiles.load(profile_id).source}
    defined = {source["id"] for table in TABLES.values() for source in table.get("source", [])}
    assert defined == used
