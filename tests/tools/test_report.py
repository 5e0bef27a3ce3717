"""A report says everything that its outcome holds, harms nobody, and needs nothing but itself."""

import re
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from planner.latency import Entry, LatencyTable
from profiles.errors import EspalierError
from tools import report
from tools.figures import elapsed, training
from tools.outcome import Accuracy, Interval, Outcome, Row, Step, Try, Verdict, WidthRow
from tools.pipeline import verdicts

HOSTILE = '<script>alert("1")</script> & $\\frac{1$ | [bold] __x'


def _interval(value: float, spread: float = 0.02) -> Interval:
    return Interval(value=value, low=value * (1 - spread), high=value * (1 + spread))


def _row(label: str, *, predicted: float | None, gain: float, macs: int) -> Row:
    measured = {"openvino": _interval(1.37e-3 / gain), "onnxruntime": _interval(1.104e-3 / gain)}
    dense = label == "dense"
    return Row(
        label=label,
        params=macs // 40,
        macs=macs,
        accuracy=None if label == "random" else 0.9893 - 0.003 * gain,
        predicted_s=None if predicted is None else _interval(predicted, 0.07),
        measured=measured,
        speedup={} if dense else {runtime: _interval(gain, 0.03) for runtime in measured},
        efficiency={} if dense else dict.fromkeys(measured, gain * macs / 93_440_000),
    )


def _history() -> list[Step]:
    phases: list[Any] = ["dense", "dense", "sparse", "sparse", "finetune"]
    return [
        Step(
            epoch=epoch,
            loss=2.31 / epoch**2,
            accuracy=None if epoch == 2 else 0.7 + 0.05 * epoch,
            nonzero_groups=0 if phase == "dense" else 1104 - 117 * epoch,
            budget_groups=0 if phase == "dense" else 519,
            phase=phase,
        )
        for epoch, phase in enumerate(phases, 1)
    ]


@pytest.fixture
def outcome() -> Outcome:
    widths = [
        WidthRow(name="layer1.0.conv1", dense=48, kept=32, removed=False, considered=[0, 16, 32, 48]),
        WidthRow(name="layer2.1.conv1", dense=96, kept=0, removed=True, considered=[0, 96]),
    ]
    return Outcome(
        model="a residual network",
        profile="x86_64_v4.onnxruntime.fp32",
        profile_why="this CPU has AVX-512",
        created="2026-01-02 03:04 UTC",
        budget="50 % of dense",
        budget_s=0.552e-3,
        accuracy=Accuracy(dense=0.9893, sparse=0.9862, rebuilt=0.9861),
        rows=[
            _row("dense", predicted=1.091e-3, gain=1.0, macs=93_440_000),
            _row("espalier", predicted=0.538e-3, gain=2.12, macs=38_210_000),
            _row("random", predicted=None, gain=1.71, macs=37_000_000),
        ],
        widths=widths,
        history=_history(),
        equivalence=1.34e-6,
        parity={"onnxruntime": 3.17e-7, "openvino": 8.71e-7},
        verdicts=[
            Verdict(what="budget met", ok=True, detail="0.521 ms of 0.552 ms"),
            Verdict(what="no accuracy lost", ok=False, detail="0.32 points"),
        ],
        environment={"cpu": "a CPU", "threads": "1"},
        phases_s={"calibrate": 21.3, "train": 109.4},
    )


@pytest.fixture
def latency_table() -> LatencyTable:
    entries = tuple(
        Entry(operation="conv2d 3x3", inputs=inputs, outputs=width, latency_s=1e-6 * width, probes=width % 16)
        for inputs in (16, 48)
        for width in (8, 16, 24)
    )
    return LatencyTable(
        profile="x86_64_v4.onnxruntime.fp32",
        runtime="onnxruntime",
        runtime_version="1.31.1",
        device="some device",
        threads=3,
        created="2026-01-01",
        fingerprint="",
        overhead_s=0.0,
        entries=entries,
        probes=(),
        rates={},
        errors=(0.0312, -0.0845),
    )


@pytest.mark.parametrize(
    ("faster", "measured_s", "ok"), [(1.0, 0.54e-3, True), (1.2, 0.54e-3, True), (1.0, 0.64e-3, False)]
)
def test_a_prediction_is_judged_as_a_share_of_the_dense_latency(
    outcome: Outcome, faster: float, measured_s: float, ok: bool
) -> None:
    rows = {row.label: row for row in outcome.rows}
    dense_s = rows["dense"].predicted_s
    assert dense_s
    times = {"dense": dense_s.value / faster, "espalier": measured_s / faster}
    measured = [
        rows[label].model_copy(update={"measured": {"onnxruntime": _interval(s)}}) for label, s in times.items()
    ]
    judged = outcome.model_copy(update={"rows": measured})
    plan = SimpleNamespace(target_fraction=0.5, lossless=True)
    (found,) = [own for own in verdicts(judged, plan, 0.01) if own.what == "latency predicted"]
    assert found.ok is ok
    assert f"dense was 1.09 ms when calibrated and is {times['dense'] * 1e3:.3g} ms" in found.detail


def _without_drawings(html: str) -> str:
    body = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", html, flags=re.DOTALL)
    return unescape(re.sub(r"<[^>]*>", " ", body))


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def _ascii(text: str) -> str:
    return text.replace("\N{MULTIPLICATION SIGN}", "x").replace("\N{EN DASH}", "-")


class _Attributes(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [(name, value or "") for name, value in attrs]


def _parsed(html: str) -> _Attributes:
    parser = _Attributes()
    parser.feed(html)
    return parser


def test_every_number_of_the_outcome_is_in_the_page(outcome: Outcome) -> None:
    text = _without_drawings(report.render(outcome))
    found = [float(token.replace(",", "")) for token in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-\d+)?", text)]
    wanted = _numbers(outcome.model_dump(exclude={"schema_version", "phases_s"}))
    units = (1.0, 100.0, 1e3, 1e-6)
    absent = [
        number
        for number in wanted
        if not any(abs(token - number * unit) <= 0.005 * number * unit for token in found for unit in units)
    ]
    assert absent == []


WRITTEN = [
    "98.93 %",
    "98.62 %",
    "98.61 %",
    "2,336,000",
    "93.4 M",
    "0.538",
    "0.521",
    "0.510-0.531",
    "2.12x",
    "2.06-2.18",
    "0.87x",
    "1.34e-06",
    "8.71e-07",
    "0.552 ms",
    "21.3 s",
    "1 min 49 s",
    "2 min 11 s",
    "0.257",
    "636",
    "519",
    "removed",
    "0, 16, 32, 48",
    "✓ passed",
    "✗ failed",
    "0.32 points",
    "this CPU has AVX-512",
    "a CPU",
    "ONNX Runtime",
    "OpenVINO",
]


def test_page_writes_values_as_people_do(outcome: Outcome) -> None:
    text = _ascii(_without_drawings(report.render(outcome)))
    assert [written for written in WRITTEN if written not in text] == []


def test_page_has_all_drawings_in_its_own_colours(outcome: Outcome, latency_table: LatencyTable) -> None:
    page = report.render(outcome, table=latency_table)
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawing))
        assert {colour for colour in colours if not colour.startswith("var(--")} <= {"none"}
    ids = [value for name, value in _parsed(page).values if name == "id"]
    references = {value[1:] for name, value in _parsed(page).values if name.endswith("href")}
    assert len(ids) == len(set(ids))
    assert references <= set(ids)


def test_page_is_small_and_repeatable(outcome: Outcome) -> None:
    steps = [outcome.history[0].model_copy(update={"epoch": i / 100, "loss": 1 / (i + 1)}) for i in range(4567)]
    page = report.render(outcome.model_copy(update={"history": steps, "widths": outcome.widths * 40}))
    assert len(page.encode()) < 1_500_000
    assert "one step of 5" in page
    assert "<td>45.66</td>" in page
    assert report.render(outcome) == report.render(outcome)


def test_page_loads_and_runs_nothing(outcome: Outcome, latency_table: LatencyTable) -> None:
    page = report.render(outcome, table=latency_table)
    parsed = _parsed(page)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(parsed.tags)
    assert not [value for name, value in parsed.values if name in ("src", "srcset", "action", "data")]
    assert all(value.startswith("#") for name, value in parsed.values if name.endswith("href"))
    assert not re.search(r"@import|url\((?!#)", page)


def test_hostile_names_stay_text(outcome: Outcome) -> None:
    hostile = outcome.model_copy(
        update={
            "model": HOSTILE,
            "rows": [*outcome.rows, outcome.rows[1].model_copy(update={"label": HOSTILE})],
            "widths": [outcome.widths[0].model_copy(update={"name": HOSTILE})],
            "verdicts": [Verdict(what=HOSTILE, ok=True, detail=HOSTILE)],
            "environment": {HOSTILE: HOSTILE},
            "parity": {HOSTILE: 0.5},
        }
    )
    page = report.render(hostile)
    parsed = _parsed(page)
    assert "script" not in parsed.tags
    assert not [name for name, _ in parsed.values if name.startswith("on")]
    assert unescape(page).count(HOSTILE) >= 6
    assert r"\[bold\] \_\_x" in report.markdown(hostile)
    assert "[bold]" in _printed(hostile, 200)


def _printed(outcome: Outcome, width: int) -> str:
    console = Console(width=width, file=None, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(report.table(outcome))
    return _ascii(capture.get())


@pytest.mark.parametrize("width", [100, 120])
def test_terminal_table_fits(outcome: Outcome, width: int) -> None:
    printed = _printed(outcome, width)
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed
    lines = [line.split() for line in printed.splitlines()]
    ours = next(line for line in lines if line[:1] == ["espalier"])
    assert " ".join(ours) == "espalier 98.29 % 955 k 38.2 M 0.538 ONNX Runtime 0.521 (0.510-0.531) 2.12x 0.87x"
    following = lines[lines.index(ours) + 1]
    assert " ".join(following) == "(0.500-0.576) OpenVINO 0.646 (0.633-0.659) 2.12x 0.87x"
    assert "accuracy: dense " in printed


def test_markdown_table_is_rectangular(outcome: Outcome) -> None:
    *lines, blank, below = _ascii(report.markdown(outcome)).splitlines()
    assert blank == ""
    assert below.startswith("accuracy: dense ")
    assert len(lines) == 2 + 3 * 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {10}
    measured = "ONNX Runtime | 0.521 (0.510-0.531) | 2.12x | 0.87x"
    assert lines[4] == f"| espalier | 98.29 % | 955 k | 38.2 M | 0.538 | {measured} |"


def test_missing_values_are_dashes(outcome: Outcome) -> None:
    bare = outcome.model_copy(
        update={
            "accuracy": Accuracy(dense=None, sparse=None, rebuilt=None),
            "rows": [row.model_copy(update={"accuracy": None, "predicted_s": None}) for row in outcome.rows],
            "history": [],
            "widths": [],
        }
    )
    page = _ascii(report.render(bare))
    assert "<svg" not in page
    assert "%" not in "".join(re.findall(r"<td>[^<]*</td>", page))
    assert re.search(r">espalier</th><td>-</td><td>955,250</td><td>38\.2 M</td><td>-</td>", page)
    assert "| espalier | - | 955 k | 38.2 M | - | ONNX Runtime |" in _ascii(report.markdown(bare))
    assert "accuracy" not in report.headline(bare)


def test_unmeasured_models_are_reported(outcome: Outcome) -> None:
    empty: dict[str, Any] = {"measured": {}, "speedup": {}, "efficiency": {}}
    bare = outcome.model_copy(update={"rows": [row.model_copy(update=empty) for row in outcome.rows]})
    assert "No runtime measured these models" in report.render(bare)
    assert report.headline(bare).startswith("Nothing was measured")
    assert "| - | - | - | - |" in _ascii(report.markdown(bare))


def test_headline_is_the_result_in_the_runtime_of_the_profile(outcome: Outcome) -> None:
    told = "2.1x faster in ONNX Runtime (0.521 ms against 1.10 ms), accuracy 98.6 % against 98.9 %"
    assert _ascii(report.headline(outcome)) == told
    elsewhere = outcome.model_copy(update={"profile": "x86_64_v4.openvino.fp32"})
    assert _ascii(report.headline(elsewhere)).startswith("2.1x faster in OpenVINO (0.646 ms against 1.37 ms)")


GAINS = [
    ((0.5, 0.4, 0.6), "2.0x slower"),
    ((1.01, 0.98, 1.03), "No faster and no slower"),
    ((1.05, 1.01, 1.1), "1.05x faster"),
]


@pytest.mark.parametrize(("gain", "words"), GAINS)
def test_headline_does_not_call_noise_a_gain(outcome: Outcome, gain: tuple[float, float, float], words: str) -> None:
    interval = Interval(value=gain[0], low=gain[1], high=gain[2])
    rows = [row.model_copy(update={"speedup": {"onnxruntime": interval}}) for row in outcome.rows]
    told = report.headline(outcome.model_copy(update={"rows": rows}))
    assert _ascii(told).startswith(f"{words} in ONNX Runtime")


def test_epochs_of_later_phases_follow_the_earlier_ones(outcome: Outcome) -> None:
    steps = [outcome.history[0].model_copy(update={"epoch": epoch}) for epoch in (1.0, 2.0, 0.5, 1.5, 1.0)]
    assert elapsed(steps) == [1.0, 2.0, 2.5, 3.5, 4.5]
    again = outcome.history[2].model_copy(update={"epoch": 1.0})
    assert elapsed([steps[0], again, again]) == [1.0, 2.0, 2.0]


def test_groups_are_drawn_only_where_there_are_some(outcome: Outcome) -> None:
    dense = [step for step in outcome.history if step.phase == "dense"]
    figure, without = training(outcome.history), training(dense)
    assert figure is not None
    assert without is not None
    assert [axes.get_ylabel() for axes in without.axes] == ["loss", "accuracy, %"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy, %", "non-zero groups"]
    groups, budget, *_ = figure.axes[-1].lines
    assert list(groups.get_xdata()) == list(budget.get_xdata()) == [3, 4, 5]
    assert list(groups.get_ydata()) == [753, 636, 519]
    assert set(budget.get_ydata()) == {519}


def test_outcome_survives_the_disk(outcome: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    outcome.save(path)
    assert Outcome.load(path) == outcome


@pytest.mark.parametrize("content", ["{", "{}", '{"schema_version": 2}'])
def test_foreign_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "measurements.json"
    path.write_text(content)
    with pytest.raises(EspalierError, match=r"measurements\.json"):
        Outcome.load(path)
    with pytest.raises(EspalierError, match="absent"):
        Outcome.load(tmp_path / "absent")


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"surprise": 1},
        {"equivalence": float("nan")},
        {"budget_s": "0.5"},
        {"rows": []},
        {"accuracy": {"dense": 98.9, "sparse": None, "rebuilt": None}},
    ],
)
def test_malformed_outcome_is_refused(outcome: Outcome, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Outcome.model_validate(outcome.model_dump() | change)


def test_labels_are_distinct(outcome: Outcome) -> None:
    with pytest.raises(ValidationError, match="distinct labels"):
        Outcome.model_validate(outcome.model_dump() | {"rows": [outcome.rows[0].model_dump()] * 2})


def test_interval_holds_its_value() -> None:
    with pytest.raises(ValidationError, match="outside its interval"):
        Interval(value=3.0, low=1.0, high=2.0)


def test_tries_are_told_in_the_report_and_the_terminal(outcome: Outcome) -> None:
    tries = [
        Try(budget=0.5, predicted=0.5, measured=0.55, corrected=True, changes=[]),
        Try(budget=0.5, predicted=0.49, measured=0.495, corrected=False, changes=["a: 16 -> 8"]),
    ]
    assert tries[0].told.endswith("predicted 0.500, measured 0.550 of dense (+10.0%); table corrected, planned again")
    assert tries[1].told == "budget 0.500, predicted 0.490, measured 0.495 of dense (+1.0%)"
    outcome = outcome.model_copy(update={"tries": tries, "notes": ["why <not>"]})
    assert report.way(outcome) == [*(f"plan {n}: {own.told}" for n, own in enumerate(tries, 1)), "note: why <not>"]
    page = report.render(outcome)
    assert f"<li>plan 1: {tries[0].told}</li>" in page
    assert "why &lt;not&gt;" in page
    assert Outcome.model_validate_json(outcome.model_dump_json()) == outcome
