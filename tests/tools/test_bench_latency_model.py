"""The benchmark of predictions draws what it says, scores as it says, and goes on where it was interrupted."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import profiles
from planner.candidates import candidates
from planner.graph import Graph, trace
from planner.latency import LatencyTable, Probe, Rules, keys
from planner.operations import Choice
from profiles.errors import EspalierError
from tests.planner.nets import table_of
from tools import bench_latency_model as bench
from tools.calibrate import Bench
from tools.examples.resnet import ResNet

PROFILE = profiles.load("x86_64_v4.onnxruntime.fp32")


@cache
def small() -> Graph:
    return trace(ResNet(1, (16, 32, 32)).eval(), (torch.ones(1, 3, 8, 8),))


def true_s(graph: Graph, choice: Choice) -> float:
    """Return a latency that is nearly what the rules say."""
    return 1e-6 + 1.1 * Rules(PROFILE).latency(graph, choice)


@dataclass
class Device:
    """Stands for the machine: what it was asked to measure."""

    asked: list[int] = field(default_factory=list)

    def calibrate(self, place: Bench, *, progress: object, limit_s: float) -> LatencyTable:
        """Return a table of what the rules say."""
        rules, operation = Rules(PROFILE), {o.signature: o for o in place.graph.operations}
        wanted = keys(place.graph, {name: range(1, w.size + 1) for name, w in place.graph.width.items()})
        cost = {key: 1.1 * rules.cost(operation[key[0]], key[1], key[2]) for key in wanted}
        return table_of(place.graph, cost, profile=PROFILE.id, overhead_s=1e-6)

    def measure_choices(self, place: Bench, wanted: Sequence[Choice], *, progress: object) -> list[Probe]:
        """Return exact latencies."""
        self.asked.append(len(wanted))
        dense_s = true_s(place.graph, place.graph.dense)
        return [
            Probe(
                keep=dict(choice.keep), removed=tuple(sorted(choice.removed)), latency_s=true_s(place.graph, choice),
                relative=true_s(place.graph, choice) / dense_s,
                ci95_s=(true_s(place.graph, choice),) * 2, runs=len(self.asked),
            )
            for choice in wanted
        ]  # fmt: skip


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A machine that measures exactly, with one small network."""
    found = Device()
    monkeypatch.setattr(bench, "calibrate", found.calibrate)
    monkeypatch.setattr(bench, "measure_choices", found.measure_choices)
    monkeypatch.setattr(bench, "profile_for", lambda runtime: PROFILE)
    monkeypatch.setattr(bench, "NETWORKS", {"small": (lambda: ResNet(1, (16, 32, 32)), (3, 8, 8))})
    return found


def run(file: Path | None, **options: Any) -> int:
    given = {"networks": "small", "runtimes": "onnxruntime", "batches": "1", "configurations": 8, "seconds": 0.01}
    with pytest.raises(SystemExit) as ended:
        bench.main(**{**given, "seed": 1, "file": file, **options})
    return int(ended.value.code or 0)


# --- what is drawn ------------------------------------------------------------------------------------------------


def test_configurations_lie_on_the_grid_and_off_it_with_blocks_and_without() -> None:
    graph = small()
    drawn = bench.configurations(graph, PROFILE, 40, seed=0)
    grid = candidates(graph, PROFILE)
    on = [all(choice.keep[name] in counts for name, counts in grid.items()) for choice in drawn]
    assert on[::2] == [True] * 20
    assert on[1::2].count(False) >= 18
    gone = [bool(choice.removed) for choice in drawn]
    assert not any(gone[0::4] + gone[1::4])
    assert sum(gone) >= 10
    streams = [width for width in graph.cuttable if width.is_stream]
    assert streams
    whole = [all(choice.keep[w.name] == w.size for w in streams) for choice in drawn]
    assert [index % 8 for index in range(40) if not whole[index]] == [1, 6] * 5
    assert all(1 <= kept <= graph.width[name].size for choice in drawn for name, kept in choice.keep.items())
    assert len({(tuple(choice.keep.items()), choice.removed) for choice in drawn}) > 30


def test_the_same_seed_draws_the_same_and_more_only_add() -> None:
    few, many, other = (bench.configurations(small(), PROFILE, n, seed=s) for n, s in ((5, 3), (9, 3), (9, 4)))
    assert many[:5] == few
    assert other != many


# --- scores -------------------------------------------------------------------------------------------------------


def test_a_score_is_the_errors_and_the_ranks() -> None:
    found = bench.score("net b1 onnxruntime", "table", [0.50, 0.36, 0.80], [0.5, 0.4, 0.8])
    assert (found.mape, found.worst, found.tau) == pytest.approx((0.1 / 3, 0.1, 1.0))
    assert found.networks == 3


@pytest.mark.parametrize(
    ("runtime", "basis", "predicted", "holds"),
    [
        ("onnxruntime", "table", [0.50, 0.40, 0.80], True),
        ("onnxruntime", "table", [0.60, 0.40, 0.80], False),  # worst 20 %
        ("onnxruntime", "table", [0.40, 0.41, 0.80], False),  # the ranks differ
        ("onnxruntime", "rules", [5.0, 4.0, 8.0], True),  # only ranks count
        ("onnxruntime", "rules", [4.0, 5.0, 8.0], False),
        ("onnxruntime", "macs", [9.0, 1.0, 0.1], True),  # for information
        ("pytorch", "table", [0.44, 0.45, 0.80], True),  # noisier by nature
        ("pytorch", "table", [0.70, 0.40, 0.80], False),
    ],
)
def test_limits_are_those_of_the_runtime(runtime: str, basis: str, predicted: list[float], *, holds: bool) -> None:
    assert bench.score(f"net b1 {runtime} 1.0 seed 1", basis, predicted, [0.5, 0.4, 0.8]).holds is holds


# --- the whole ----------------------------------------------------------------------------------------------------


def test_table_rules_and_macs_are_scored_beside_each_other(
    device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "scores.json"
    assert run(file, batches="1,2") == 0
    rows = json.loads(file.read_text())["scores"]
    assert [row["basis"] for row in rows] == ["table", "rules", "macs", "again"] * 2
    assert rows[0]["mape"] < 0.02
    assert rows[1]["tau"] > 0.9
    assert rows[2]["mape"] > rows[1]["mape"]
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("table", "rules", "macs", "MAPE", "tau"))


def test_an_interrupted_run_goes_on_with_what_is_missing(device: Device, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    run(file, configurations=6)
    run(file, configurations=8)
    assert device.asked == [6, 6, 2, 2]
    run(file, configurations=8)
    assert device.asked == [6, 6, 2, 2]
    run(file, configurations=8, seed=2)
    assert device.asked == [6, 6, 2, 2, 8, 8]


def test_two_measurements_count_by_their_mean_and_tell_how_alike_they_are(device: Device, tmp_path: Path) -> None:
    graph = small()
    choices = bench.configurations(graph, PROFILE, 6, seed=0)
    table = device.calibrate(SimpleNamespace(graph=graph), progress=None, limit_s=1.0)
    first, second = (
        [
            Probe(
                keep=dict(c.keep), removed=tuple(c.removed), latency_s=1.0,
                relative=by * true_s(graph, c) / true_s(graph, graph.dense), ci95_s=(1.0, 1.0), runs=1,
            )
            for c in choices
        ]
        for by in (0.9, 1.1)
    )  # fmt: skip
    case = bench.Case("small", "onnxruntime", "1", 1, 0)
    once = {row.basis: row for row in bench.scores(case, graph, PROFILE, table, [first])}
    twice = {row.basis: row for row in bench.scores(case, graph, PROFILE, table, [first, second])}
    assert once.keys() == {"table", "rules", "macs"}
    assert once["table"].mape == pytest.approx(1 / 0.9 - 1, rel=0.05)
    assert twice["table"].mape < 0.01
    assert twice["again"].mape == pytest.approx(1 - 0.9 / 1.1, rel=1e-6)
    assert twice["again"].tau == pytest.approx(1.0)


@pytest.mark.parametrize(("content", "said"), [("[]", "holds no measurements"), ("{", "is not JSON")])
def test_another_file_is_refused(device: Device, tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(EspalierError, match=f"other.json {said}.*another --json FILE"):
        bench.stored(file)


def test_a_runtime_that_is_not_here_is_left_out_visibly(device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(None, runtimes="tensorflow") == 1
    assert "tensorflow is left out: unknown runtime" in capsys.readouterr().err


def test_an_unknown_network_is_refused(device: Device) -> None:
    with pytest.raises(bench.typer.BadParameter, match="unknown network 'vgg'; known are small"):
        bench.main(
            networks="vgg", runtimes="onnxruntime", batches="1", configurations=3, seconds=0.1, seed=1, file=None
        )
