"""Rules of a profile against measured staircases: verdicts, pictures, and the overlay that wins on this machine."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import archspec.cpu
import pytest
import torch

import profiles
from profiles import BackendUnavailable, Machine, PlanError, Profile
from profiles.lint import lint
from tools.check import Check, check, drawn, overlay
from tools.rewriting import Moves, measured, network
from tools.staircase import Measure, Point

pytest.importorskip("onnxruntime")
PROFILE = "x86_64_v4.onnxruntime.fp32"


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


class Device:
    """A device that rounds as it is told: {(op, axis): (quantum, cliff)}, else as ONNX Runtime does with AVX-512."""

    KNOWN: ClassVar = {
        ("conv2d", "out_channels"): (16, 1),
        ("conv2d", "in_channels"): (16, 4),
        ("depthwise_conv2d", "out_channels"): (16, 4),
        ("grouped_conv2d", "out_channels"): (1, 16),
        ("grouped_conv2d", "in_channels"): (1, 16),
    }

    def __init__(self, **habits: tuple[int, int]) -> None:
        self.habits = self.KNOWN | {tuple(key.split("__")): value for key, value in habits.items()}
        self.measured: list[tuple[str, str]] = []

    def __call__(self, op: str, axis: str) -> Measure:
        """Return what measures one axis."""
        quantum, cliff = self.habits[op, axis]

        def point(width: int) -> Point:
            units = 1.9 * width if width % cliff else math.ceil(width / quantum) * quantum
            seconds = (5 + units) * 1e-6
            return Point(width, seconds, (0.99 * seconds, 1.01 * seconds), 30)

        def measure(widths: Sequence[int]) -> list[Point]:
            self.measured.append((op, axis))
            return list(map(point, widths))

        return measure


STAYS = Moves(ratio=3.6, ci95=(3.5, 3.7), latency_s=1e-3, spread_s=1e-5, runs=100)
MOVES = STAYS.model_copy(update={"ratio": 1.02, "ci95": (1.0, 1.05)})


def checked(device: Device, profile: Profile | None = None, moves: Moves = STAYS) -> Check:
    return check(profile or profiles.load(PROFILE), maker=device, mover=lambda: moves)


def test_rules_that_are_confirmed_agree() -> None:
    found = checked(Device())
    assert found.ok
    other = [verdict for verdict in found.verdicts if verdict.verdict != "agree"]
    assert [str(verdict) for verdict in other] == [
        "conv2d in_channels, cliff (looked at for NCHWc, pointwise): documented 4: not checked, "
        "the networks have other kernels than 1x1"
    ]
    told = list(map(str, found.verdicts))
    assert "conv2d out_channels, pad (in NCHWc): documented 16, measured 16: agree" in told
    assert "conv2d in_channels, cliff (looked at for NCHWc): documented 4, measured 4: agree" in told


def test_a_rule_that_is_contradicted_is_told() -> None:
    found = checked(Device(conv2d__out_channels=(8, 1), conv2d__in_channels=(16, 1)))
    assert not found.ok
    told = [str(verdict) for verdict in found.verdicts if verdict.verdict == "disagree"]
    assert told == [
        "conv2d out_channels, pad (in NCHWc): documented 16, measured 8: disagree",
        "conv2d in_channels, cliff (looked at for NCHWc): documented 4, measured none: disagree",
    ]


def test_rules_of_other_conditions_and_without_a_network_are_not_checked() -> None:
    profile = profiles.load("x86_64_v4.onnxruntime.fp32")
    first = profile.rules("conv2d", "out_channels")[0]
    more = (
        first.model_copy(update={"quantum": 64, "when": "on Sundays"}),
        first.model_copy(update={"op": "matmul", "axis": "heads"}),
    )
    wider = profile.model_copy(update={"granularity": (*profile.granularity, *more)})
    told = [str(verdict) for verdict in checked(Device(), wider).verdicts if verdict.verdict == "unchecked"]
    assert [line for line in told if "1x1" not in line] == [
        "conv2d out_channels, pad (on Sundays): documented 64: not checked, the networks met another condition "
        "(in NCHWc)",
        "matmul heads, pad (in NCHWc): documented 16: not checked, there is no network that shows matmul by heads",
    ]


def test_an_interrupted_check_goes_on() -> None:
    class Breaking(Device):
        def __call__(self, op: str, axis: str) -> Measure:
            if len(set(self.measured)) == 2:
                raise KeyboardInterrupt
            return super().__call__(op, axis)

    broken, again = Breaking(), Device()
    with pytest.raises(KeyboardInterrupt):
        checked(broken)
    assert len(checked(again).curves) == 5
    assert len(set(broken.measured)) == 2
    assert len(set(again.measured)) == 3
    assert not set(again.measured) & set(broken.measured)
    assert len(check(profiles.load(PROFILE), maker=again, fresh=True).curves) == 5
    assert len(set(again.measured)) == 5


def test_a_check_is_written_with_its_pictures(tmp_path: Path) -> None:
    profile = profiles.load(PROFILE)
    saved = checked(Device()).save(tmp_path / "check.json", profile)
    assert Check.model_validate_json((tmp_path / "check.json").read_text()) == saved
    assert len(saved.curves) == 5
    for curve in saved.curves:
        assert "<svg" in (tmp_path / str(curve.picture)).read_text()
    title = drawn(saved.curves[0], ()).axes[0].get_title(loc="left")
    assert "beside the multiples of 4" in title or "steps of 16" in title


def test_the_overlay_wins_on_this_machine(tmp_path: Path) -> None:
    profile = profiles.load(PROFILE)
    found = checked(Device(conv2d__out_channels=(8, 1), conv2d__in_channels=(16, 1)), profile)
    path = overlay(found, profile)
    assert path == tmp_path / "config" / "espalier" / "profiles" / "x86_64_v4-here.onnxruntime.fp32.toml"
    mine = profiles.load("x86_64_v4-here.onnxruntime.fp32")
    assert mine.quantum("conv2d", "out_channels") == 8
    assert profile.quantum("conv2d", "out_channels") == 16
    assert [r.quantum for r in mine.rules("conv2d", "in_channels") if r.kernel is None] == [16, 1]
    (cliff,) = (rule for rule in mine.rules("depthwise_conv2d", "out_channels") if rule.mode == "cliff")
    assert (cliff.quantum, cliff.confidence) == (4, "measured-here")
    assert cliff.penalty == pytest.approx(1.5, abs=0.3)  # what the documents do not say
    assert len(mine.rules("conv2d", "out_channels")) == 1
    (source,) = (each for each in mine.source if each.id == "here-conv2d-out_channels")
    assert source.measurement is not None
    assert source.measurement.runtime_version == found.place.runtime_version
    assert lint(path) == []
    ranked = [each.id for each in profiles.detect()]
    if PROFILE in ranked:
        assert ranked.index(mine.id) < ranked.index(PROFILE)


def test_an_overlay_is_checked_and_written_again() -> None:
    profile = profiles.load(PROFILE)
    overlay(checked(Device(conv2d__out_channels=(8, 1)), profile), profile)
    mine = profiles.load("x86_64_v4-here.onnxruntime.fp32")
    again = checked(Device(), mine)
    assert not again.ok  # it says 8
    overlay(again, mine)
    assert profiles.load(mine.id).quantum("conv2d", "out_channels") == 16
    assert profiles.load(mine.id).extends == (PROFILE,)


def test_strides_that_move_are_told_and_written(tmp_path: Path) -> None:
    profile = profiles.load(PROFILE)
    assert checked(Device()).rewrites[0].verdict == "agree"
    assert not profile.moves_strides
    found = checked(Device(), profile, MOVES)
    assert not found.ok
    (told,) = map(str, found.rewrites)
    assert told.startswith("rewrite strides: documented no, measured yes (1.02 times as long")
    path = overlay(found, profile)
    assert lint(path) == []
    mine = profiles.load("x86_64_v4-here.onnxruntime.fp32")
    assert mine.moves_strides
    again = checked(Device(), mine, MOVES)
    assert again.ok
    overlay(again, mine)
    assert profiles.load(mine.id).moves_strides


def test_strides_that_stay_are_taken_from_the_profile_that_moves_them(tmp_path: Path) -> None:
    other = profiles.load("x86_64_v4.openvino.fp32")
    pytest.importorskip("openvino")
    assert other.moves_strides
    axes = ("conv2d__out_channels", "depthwise_conv2d__out_channels", "linear__out_channels", "linear__hidden")
    device = Device(**dict.fromkeys(axes, (16, 1)))
    assert checked(device, other, MOVES).ok
    found = checked(device, other, STAYS)
    assert not found.ok
    path = overlay(found, other)
    assert lint(path) == []
    assert not profiles.load("x86_64_v4-here.openvino.fp32").moves_strides


def test_what_lies_between_is_no_verdict() -> None:
    unclear = STAYS.model_copy(update={"ratio": 1.7, "ci95": (1.4, 2.2)})
    found = checked(Device(), None, unclear)
    assert found.ok
    assert found.rewrites[0].verdict == "unchecked"


def test_the_networks_compute_the_same() -> None:
    x = torch.randn(2, 64, 28, 28, dtype=torch.float64)
    late, early = network(late=True).double(), network(late=False).double()
    torch.testing.assert_close(late(x), early(x))


def test_it_is_measured_in_the_runtime() -> None:
    found = measured(profiles.load(PROFILE), seconds=0.05)
    assert 0 < found.ci95[0] <= found.ratio <= found.ci95[1]
    assert found.runs > 0


def test_what_cannot_be_checked_is_refused() -> None:
    bare = profiles.load(PROFILE).model_copy(update={"granularity": ()})
    with pytest.raises(PlanError, match="nothing to check"):
        checked(Device(), bare)
    gpu = profiles.load("nvidia-a100.tensorrt.int8")
    with pytest.raises(BackendUnavailable, match="no CPU"):
        overlay(checked(Device()), gpu)


def test_numbers_in_the_json_are_whole(tmp_path: Path) -> None:
    saved = checked(Device()).save(tmp_path / "check.json", profiles.load(PROFILE))
    content = json.loads((tmp_path / "check.json").read_text())
    assert content["schema_version"] == 1
    assert content["place"]["device"] in (Machine.here().cpu, *archspec.cpu.TARGETS)
    assert all(point["latency_s"] > 0 for curve in content["curves"] for point in curve["points"])
    assert len(saved.curves) == len({(curve.op, curve.axis) for curve in saved.curves})
