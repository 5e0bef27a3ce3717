"""ExecuTorch: threads that may change, layers left behind by name, and Ethos-U files with Vela's estimate."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import backends
from backends.artifact import Artifact
from backends.estimate import Estimate
from backends.latency import Measurement
from profiles.errors import BackendUnavailable, BuildError

from .nets import IMAGE, Residual, profile_of, samples, stripes, trained

pytest.importorskip("executorch", reason="executorch is not installed: pip install 'espalier[executorch]'")

INPUTS = (torch.zeros(IMAGE),)
CLOCK_HZ = {"ethos-u55-128": 500e6, "ethos-u65-512": 1e9, "ethos-u85-256": 1e9}


def for_ethos(accelerator: str, folder: Path, model: nn.Module | None = None, **options: object) -> Artifact:
    pytest.importorskip("ethosu.vela", reason="Vela is not installed: pip install 'espalier[ethos-u]'")
    pytest.importorskip("tosa_reference_model", reason="tosa-tools is not installed: pip install 'espalier[ethos-u]'")
    profile = profile_of("executorch", "int8", kind="npu", arch=accelerator, **options)
    return backends.load("executorch").build(
        model or trained(), INPUTS, profile, folder / "model.pte", samples=samples()
    )


def test_programs_with_different_threads_take_turns(tmp_path: Path) -> None:
    runtime = backends.load("executorch")
    artifact = runtime.build(trained(), INPUTS, None, tmp_path / "model.pte")
    image, _ = stripes(1, 7)
    expected = trained()(image).detach().numpy()
    bound = [runtime.session(artifact, threads=threads).bind((image,)) for threads in (1, 2, 1)]
    for turn in (0, 1, 2, 1, 0, 0, 2, 1):
        bound[turn].run()
        np.testing.assert_allclose(bound[turn].outputs()[0], expected, rtol=1e-4, atol=1e-5)


class WithEmbedding(nn.Module):
    """An operation that XNNPACK does not know, in a layer with a name."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens))


def test_what_xnnpack_does_not_take_is_told_by_layer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="backends")
    inputs = (torch.tensor([[0, 6]]),)
    artifact = backends.load("executorch").build(WithEmbedding(), inputs, None, tmp_path / "model.pte")
    assert artifact.remarks == ("words: aten::embedding runs on ExecuTorch's portable kernels, which are slow",)
    assert "1 operations are not taken by XNNPACK: words: aten::embedding" in caplog.text
    whole = backends.load("executorch").build(trained(), INPUTS, None, tmp_path / "whole.pte")
    assert whole.remarks == ()


def test_a_file_that_is_no_program_is_one_clear_error(tmp_path: Path) -> None:
    runtime = backends.load("executorch")
    artifact = runtime.build(trained(), INPUTS, None, tmp_path / "model.pte")
    content = (tmp_path / "model.pte").read_bytes()[:1000]
    (tmp_path / "model.pte").write_bytes(content)
    from backends.artifact import sha256_of

    with pytest.raises(BuildError, match=r"refuses the file: .*; build it again"):
        runtime.session(artifact.model_copy(update={"sha256": sha256_of(content)}))


@pytest.mark.parametrize("accelerator", CLOCK_HZ)
def test_ethos_u_is_compiled_and_estimated(accelerator: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = for_ethos(accelerator, tmp_path)
    estimate = artifact.estimate
    assert estimate is not None
    assert (artifact.dtype, artifact.settings["accelerator"]) == ("int8", accelerator)
    assert estimate.accelerator == accelerator.replace("ethos-u", "Ethos_U").replace("-", "_")
    assert estimate.clock_hz == CLOCK_HZ[accelerator]
    assert estimate.latency_s == pytest.approx(estimate.cycles / estimate.clock_hz)
    assert max(estimate.bound_cycles.values()) <= estimate.cycles <= sum(each.cycles for each in estimate.operators)
    assert sum(each.macs for each in estimate.operators) == estimate.macs
    assert estimate.macs > 0.95 * 16 * 16 * (9 * 16 + 9 * 256 + 256)  # the three convolutions; the U85 skips padding
    assert estimate.sram_bytes > 16 * 16 * 16  # one activation
    assert estimate.flash_bytes + estimate.dram_bytes + estimate.sram_bytes > 9 * 256
    # Arm's own model of the operations computes what PyTorch does, and nothing of it was printed.
    assert artifact.parity_real is not None
    assert artifact.parity_real.max_rel < 0.15
    assert artifact.accuracy is not None
    assert artifact.accuracy.compiled > 0.9
    assert capfd.readouterr().out == ""

    artifact.save(tmp_path / "record.json")
    assert Artifact.load(tmp_path / "record.json").estimate == estimate
    with pytest.raises(BackendUnavailable, match=rf"runs on an {accelerator} only, and there is none here"):
        backends.load("executorch").session(artifact)


def test_a_wider_net_has_a_higher_estimate_and_options_reach_vela(tmp_path: Path) -> None:
    wide = copy.deepcopy(trained())
    wide.body[0], wide.body[1], wide.body[3] = (
        nn.Conv2d(16, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.Conv2d(64, 16, 1),
    )
    small, large, slow = (
        for_ethos("ethos-u55-128", tmp_path / "a").estimate,
        for_ethos("ethos-u55-128", tmp_path / "b", wide).estimate,
        for_ethos("ethos-u55-128", tmp_path / "c", system_config="Ethos_U55_Deep_Embedded").estimate,
    )
    assert small is not None
    assert large is not None
    assert slow is not None
    assert large.cycles > 1.5 * small.cycles
    assert (slow.clock_hz, slow.system_config) == (200e6, "Ethos_U55_Deep_Embedded")
    assert slow.latency_s > 2 * small.latency_s


@pytest.mark.parametrize(
    ("accelerator", "options", "pattern"),
    [
        ("ethos-u55-128", {"memory_mode": "Nowhere"}, "."),
        ("ethos-u99-1", {}, "cannot be compiled for"),
        ("dla-2", {}, "of NPUs, executorch is compiled here for ethos-u only"),
    ],
)
def test_what_vela_does_not_know_is_one_clear_error(
    accelerator: str, options: dict[str, str], pattern: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=pattern):
        for_ethos(accelerator, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_npu_computes_in_int8_only(tmp_path: Path) -> None:
    profile = profile_of("executorch", "fp32", kind="npu", arch="ethos-u55-128")
    with pytest.raises(BuildError, match="wants fp32, but executorch makes int8 here"):
        backends.load("executorch").build(trained(), INPUTS, profile, tmp_path / "model.pte", samples=samples())


class TwoParts(Residual):
    """Sorting between the convolutions and the classifier, which no Ethos-U does."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pool((x + self.body(x)).relu()).flatten(1)
        return self.head(x.sort(1).values)


def test_a_net_in_two_parts_is_checked_and_estimated_as_a_whole(tmp_path: Path) -> None:
    model = TwoParts()
    model.load_state_dict(trained().state_dict())
    artifact = for_ethos("ethos-u55-128", tmp_path, model.eval())
    assert any("sort runs on the CPU beside the ethos-u55-128" in remark for remark in artifact.remarks)
    assert artifact.parity_real is not None
    assert artifact.parity_real.max_rel < 0.15
    assert artifact.estimate is not None
    assert artifact.estimate.macs >= 16 * 16 * (9 * 16 + 9 * 256 + 256) + 3 * 16


def report(**changed: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return Vela's report of one program, as its CSV files hold it."""
    summary: dict[str, Any] = dict.fromkeys(_COLUMNS, "0")
    summary |= {"accelerator_configuration": "Ethos_U55_128", "system_config": "s", "memory_mode": "m"}
    summary |= {"core_clock": "500000000.0", "inference_time": "0.001", "cycles_total": "500000", "nn_macs": "7"}
    summary |= {"sram_memory_used": "2.5", "off_chip_flash_memory_used": "1.0", "on_chip_flash_memory_used": "0.5"}
    return summary | changed, [{"Name": "a", "NNG Operator": "Conv2D", "Op Cycles": "12", "MAC Count": "7"}]


_COLUMNS = (
    *(f"{part}_memory_used" for part in ("sram", "dram", "on_chip_flash", "off_chip_flash")),
    *(f"{part}_total_bytes" for part in ("sram", "dram", "on_chip_flash", "off_chip_flash")),
    *(f"cycles_{part}_access" for part in ("sram", "dram", "on_chip_flash", "off_chip_flash")),
    *("cycles_npu", "cycles_total", "nn_macs", "inference_time", "core_clock"),
)


def test_times_of_several_programs_add_up_and_sram_is_shared() -> None:
    from backends.ethos_u import estimate_of

    found = estimate_of([report(), report(sram_memory_used="4.0", inference_time="0.003")], compiler="Vela 5")
    assert found.latency_s == pytest.approx(0.004)
    assert (found.sram_bytes, found.flash_bytes, found.macs) == (4096, 2 * 1536, 14)
    assert [each.cycles for each in found.operators] == [12, 12]


def test_an_estimate_cannot_pass_for_a_measurement() -> None:
    from backends.ethos_u import estimate_of

    found = estimate_of([report()], compiler="Vela 5")
    assert found.kind == "compiler's estimate"
    assert not issubclass(Estimate, Measurement)
    assert not set(Estimate.model_fields) & {"p50", "runs", "rounds", "samples_s", "environment"}
    with pytest.raises(ValueError, match="validation error"):
        Measurement.model_validate(found.model_dump())
    with pytest.raises(AttributeError):
        backends.ratio(found, found)  # type: ignore[arg-type]
    assert not re.search("measur", found.model_dump_json())
