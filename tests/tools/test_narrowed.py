"""A program that was made narrower is estimated as the smaller network is that was quantised and lowered anew."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import profiles
from backends.ethos_u import estimated
from planner.search import candidates
from profiles.errors import BackendUnavailable
from tools.calibrate import Bench, bench
from tools.examples.resnet import ResNet
from tools.networks import network

estimates = pytest.importorskip("tools.estimates", reason="pip install 'espalier[ethos-u]'")
pytest.importorskip("ethosu.vela", reason="Vela is not installed: pip install 'espalier[ethos-u]'")
PROFILES = [profiles.load(f"{name}.vela.int8") for name in ("ethos-u55-128", "ethos-u65-512")]  # of one dialect
ALIKE = 0.02  # the weights are quantised in other ranges, and Vela packs them
pytestmark = pytest.mark.skipif(
    os.environ.get("ESPALIER_LONG") != "1", reason="two networks are lowered, some 20 s: ESPALIER_LONG=1 runs it"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(estimates, "user_cache_path", lambda name: tmp_path / name)
    try:
        return bench(ResNet(1, (16, 16, 32)).eval(), (torch.ones(1, 3, 16, 16),), PROFILES[0])
    except BackendUnavailable as error:
        pytest.skip(str(error))


def test_a_narrowed_program_is_estimated_as_one_that_is_lowered_anew(place: Bench, tmp_path: Path) -> None:
    estimator, graph = estimates.Estimator.of(place), place.graph
    keep = {name: 3 * counts[-1] // 4 - 1 for name, counts in candidates(graph, place.profile).items()}
    choice = graph.choice(keep, frozenset({next(block.name for block in graph.blocks if not block.frozen)}))
    anew = tmp_path / "anew.tosa"
    small = replace(place, model=network(place.model, graph, choice))
    anew.write_bytes(estimates._lower(small, estimator.options))
    for profile in PROFILES:
        here = replace(estimator, options=estimates.options_for(profile))
        expected = estimated(anew, *estimates._target(here.options)).latency_s
        assert here(choice).latency_s == pytest.approx(expected, rel=ALIKE)
        assert expected < 0.95 * here(graph.dense).latency_s
