"""A network whose file is narrowed from the dense one's is the network that is lowered anew, step by step."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import profiles
from backends.contract import Narrows
from backends.executorch import Family
from backends.pte import Pte
from planner.operations import Choice
from profiles.errors import BuildError
from tools import calibrate as calibration
from tools.calibrate import Bench, bench
from tools.examples.imagenet import InvertedResidual, VisionTransformer
from tools.examples.resnet import ResNet
from tools.networks import network, present

pytest.importorskip("executorch", reason="executorch is not installed: pip install 'espalier[executorch]'")
PROFILE = profiles.load("x86_64_v4.xnnpack.fp32")
LONG = pytest.mark.skipif(os.environ.get("ESPALIER_LONG") != "1", reason="some 20 s: ESPALIER_LONG=1 runs it")


def resnet() -> nn.Module:
    return ResNet(2, (8, 16, 24))


def mobile() -> nn.Module:
    blocks = [InvertedResidual(8, out, expansion=3, stride=stride) for out, stride in ((8, 1), (8, 1), (16, 2))]
    stem = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def transformer() -> nn.Module:
    return VisionTransformer(24, heads=3, depth=2, image=16, patch=8)


@dataclass(frozen=True)
class Case:
    """A model, and what it becomes: a share of each width that can be cut, and blocks that leave."""

    make: Callable[[], nn.Module]
    share: float
    removed: tuple[str, ...]

    def place(self) -> Bench:
        torch.manual_seed(0)
        model = self.make().eval()
        for norm in (each for each in model.modules() if isinstance(each, nn.BatchNorm2d)):
            assert norm.running_var is not None
            assert norm.running_mean is not None
            norm.running_var.uniform_(0.5, 2)
            norm.running_mean.uniform_(-0.3, 0.3)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
        size = 16 if self.make is transformer else 12
        return bench(model, (torch.randn(1, 3, size, size),), PROFILE)

    def choice(self, place: Bench) -> Choice:
        keep = {w.name: max(1, int(self.share * w.size)) for w in place.graph.cuttable}
        return place.graph.choice(keep, frozenset(self.removed))


def described(content: bytes) -> Iterator[Any]:
    """Yield everything of a program that decides what it computes and how fast: its steps, shapes and constants."""
    pte = Pte.load(content)
    for step in pte.steps:
        reads, makes = ([pte.values[key].shape for key in keys] for keys in (step.reads, step.makes))
        held = [data.tobytes() for key in step.reads if (data := pte.values[key].data) is not None]
        yield step.kind, step.scope, reads, makes, dict(step.literals), step.bounds, held
    yield [pte.values[key].shape for key in pte.outputs]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(resnet, 0.6, ("layer1.1", "layer2.0")), id="a projection is bounded by what was behind it"),
        pytest.param(Case(resnet, 1.0, ("layer1.0", "layer1.1")), id="the stem remains", marks=LONG),
        pytest.param(Case(mobile, 0.6, ("3",)), id="depthwise"),
        pytest.param(Case(mobile, 0.9, ("3", "4")), id="depthwise, two blocks", marks=LONG),
        pytest.param(Case(transformer, 0.7, ("encoders.0.add_2",)), id="heads", marks=LONG),
    ],
)
def test_a_narrowed_file_is_that_of_the_network_lowered_anew(case: Case, tmp_path: Path) -> None:
    place = case.place()
    choice = case.choice(place)
    assert isinstance(place.family, Family)
    small, kept = network(place.model, place.graph, choice), present(place.graph, choice)
    fast = place.family.build(small, tmp_path / "fast.pte", kept=kept, removed=choice.removed)
    slow = place.runtime.build(small, place.inputs, place.profile, tmp_path / "slow.pte")
    pairs = zip(described(fast.content()), described(slow.content()), strict=True)
    for narrowed, lowered in pairs:
        assert narrowed == lowered
    outputs = [place.runtime.session(each)(place.inputs)[0] for each in (fast, slow)]
    np.testing.assert_array_equal(*outputs)
    np.testing.assert_allclose(outputs[0], small(*place.inputs).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert fast.built_from == slow.built_from


def test_what_cannot_be_narrowed_is_built_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Case(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), 0.5, ()).place()
    choice = place.graph.choice({"0": 2})
    small = network(place.model, place.graph, choice)
    assert place.family is not None

    def refused(*_: object, **__: object) -> None:
        raise BuildError("no")

    monkeypatch.setattr(Family, "build", refused)
    caplog.set_level(logging.INFO, logger="tools")
    artifact = calibration._built(place, choice, small, tmp_path / "small.pte")
    assert "small is built, not narrowed: no" in caplog.text
    output = place.runtime.session(artifact)(place.inputs)[0]
    np.testing.assert_allclose(output, small(*place.inputs).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_integers_are_built_and_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tools")
    place = Case(resnet, 1.0, ()).place()
    assert isinstance(place.runtime, Narrows)
    assert replace(place, profile=profiles.load("x86_64_v4.xnnpack.int8-vnni")).family is None
    assert "each network is built, which takes longer than to narrow one: " in caplog.text
