"""One outcome told three ways: a web page that needs nothing else, a table for the terminal, a table for a README."""

import math
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from planner.latency import LatencyTable
from tools import figures
from tools.outcome import Interval, Outcome, Row

MISSING = DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
MODEL_COLUMNS = ("model", "accuracy", "params", "MACs", "predicted")
RUNTIME_COLUMNS = ("runtime", "measured (95 %)", "speed-up", "efficiency")
LEFT_COLUMNS = ("model", "runtime")
STEPS_SHOWN = 1000  # a longer history is thinned: the page stays small, and no screen shows more
NOTES = "times in ms with 95 % intervals; predicted for {}; efficiency = speed-up / MAC speed-up"
RUNTIMES = {
    "executorch": "ExecuTorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "pytorch": "PyTorch",
    "tensorrt": "TensorRT",
}


def render(outcome: Outcome, *, table: LatencyTable | None = None) -> str:
    """The report as one HTML page that loads nothing and runs nothing; with `table`, also what widths cost."""
    runtime = outcome.profile_runtime
    thinning = max(1, math.ceil(len(outcome.history) / STEPS_SHOWN))
    history = outcome.history[::-thinning][::-1]  # from the end: the last step stays
    drawings = {
        "widths": figures.widths(outcome.widths) if outcome.widths else None,
        "latency": figures.latency(outcome.rows, runtime) if runtime else None,
        "training": figures.training(history),
        "staircases": figures.staircases(table) if table else None,
    }
    template = _environment().from_string(files("tools").joinpath("report.html.jinja").read_text("utf-8"))
    return template.render(
        outcome=outcome,
        table=table,
        headline=headline(outcome),
        predicted_for=_predicted_for(outcome),
        drawings={name: _drawing(figure, name) for name, figure in drawings.items()},
        colours=figures.COLOURS,
        steps=list(zip(figures.elapsed(history), history, strict=True)),
        thinning=thinning,
        way=way(outcome),
    )


def headline(outcome: Outcome) -> str:
    """The result in one sentence: speed in the profile's runtime, or else the first, then accuracy."""
    accuracy = outcome.accuracy
    if accuracy.rebuilt is None or accuracy.dense is None:
        return _speed(outcome)
    return f"{_speed(outcome)}, accuracy {100 * accuracy.rebuilt:.1f} % against {100 * accuracy.dense:.1f} %"


def table(outcome: Outcome) -> Table:
    """The measurements for a terminal of 100 columns or more, one line per model and runtime."""
    caption = Text(f"{_accuracies(outcome)}\n{NOTES.format(_predicted_for(outcome))}", style="dim")
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption=caption, caption_justify="left")
    for name in MODEL_COLUMNS + RUNTIME_COLUMNS:
        shown.add_column(name, justify="left" if name in LEFT_COLUMNS else "right", no_wrap=name != "model")
    for row in outcome.rows:
        columns = zip(*_lines(row, outcome.runtimes), strict=True)
        cells = (Text("\n".join(column).rstrip("\n")) for column in columns)
        shown.add_row(*cells, style="bold" if row.label == "espalier" else None)
    return shown


def way(outcome: Outcome) -> list[str]:
    """How the plan came about: the networks that were measured on the way, and what the plan notes."""
    tries = [f"plan {number}: {own.told}" for number, own in enumerate(outcome.tries, start=1)]
    return [*tries, *(f"note: {note}" for note in outcome.notes)]


def markdown(outcome: Outcome) -> str:
    """The measurements as a GitHub table, one line per model and runtime; times in ms."""
    columns = MODEL_COLUMNS + RUNTIME_COLUMNS
    rules = [":--" if name in LEFT_COLUMNS else "--:" for name in columns]
    body = [[_unmarked(cell) for cell in line] for row in outcome.rows for line in _lines(row, outcome.runtimes)]
    rows = "".join(f"| {' | '.join(cells)} |\n" for cells in [columns, rules, *body])
    return f"{rows}\n{_unmarked(_accuracies(outcome))}; {_unmarked(NOTES.format(_predicted_for(outcome)))}\n"


def _predicted_for(outcome: Outcome) -> str:
    return f"{outcome.profile} ({outcome.trust})" if outcome.trust else outcome.profile


def _accuracies(outcome: Outcome) -> str:
    found = outcome.accuracy
    told = (("dense", found.dense), ("trained to exact zeros", found.sparse), ("rebuilt", found.rebuilt))
    return "accuracy: " + ", ".join(f"{name} {_percent(value)}" for name, value in told)


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "count": _count,
        "duration": _duration,
        "milliseconds": _milliseconds,
        "percent": _percent,
        "ratios": _ratios,
        "runtime": _runtime,
        "significant": _significant,
        "span": _span,
        "times": _times,
    }
    return environment


def _drawing(figure: Figure | None, name: str) -> Markup | None:
    return None if figure is None else Markup(figures.svg(figure, name))


def _speed(outcome: Outcome) -> str:
    dense, ours = outcome.row("dense"), outcome.row("espalier")
    runtime = next(iter(outcome.runtimes), None)
    if dense is None or ours is None or runtime not in ours.speedup or runtime not in dense.measured:
        return "Nothing was measured against the dense model"
    gain = ours.speedup[runtime]
    change = "No faster and no slower"
    if gain.low > 1:
        change = f"{_brief(gain.value)}{TIMES} faster"
    elif gain.high < 1:
        change = f"{_brief(1 / gain.value)}{TIMES} slower"
    times = " ms against ".join(_milliseconds(row.measured[runtime].value) for row in (ours, dense))
    return f"{change} in {_runtime(runtime)} ({times} ms)"


def _lines(row: Row, runtimes: list[str]) -> list[list[str]]:
    predicted = _milliseconds(row.predicted_s.value if row.predicted_s else None)
    model = [row.label, _percent(row.accuracy), _count(row.params), _count(row.macs), predicted]
    lines = [
        [
            _runtime(runtime),
            _with_span(row.measured.get(runtime)),
            _times(row.speedup[runtime].value if runtime in row.speedup else None),
            _times(row.efficiency.get(runtime)),
        ]
        for runtime in runtimes
    ] or [[MISSING] * len(RUNTIME_COLUMNS)]
    below = [*[""] * (len(model) - 1), f"({_span(row.predicted_s)})" if row.predicted_s else ""]
    return [
        (model if place == 0 else below if place == 1 else [""] * len(model)) + line for place, line in enumerate(lines)
    ]


def _unmarked(cell: str) -> str:
    plain = " ".join(cell.split())
    for mark in "\\|`*_[]":
        plain = plain.replace(mark, "\\" + mark)
    return plain.replace("<", "&lt;")


def _runtime(name: str) -> str:
    return RUNTIMES.get(name, name)


def _significant(value: float | None, digits: int = 3) -> str:
    """`value` with so many digits, never in scientific notation unless it is tiny."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def _milliseconds(seconds: float | None) -> str:
    return MISSING if seconds is None else _significant(1e3 * seconds)


def _span(interval: Interval | None) -> str:
    """The ends of an interval of seconds, in ms."""
    return MISSING if interval is None else f"{_milliseconds(interval.low)}{DASH}{_milliseconds(interval.high)}"


def _ratios(interval: Interval | None) -> str:
    return MISSING if interval is None else f"{interval.low:.2f}{DASH}{interval.high:.2f}"


def _with_span(interval: Interval | None) -> str:
    return MISSING if interval is None else f"{_milliseconds(interval.value)} ({_span(interval)})"


def _percent(fraction: float | None) -> str:
    return MISSING if fraction is None else f"{100 * fraction:.2f} %"


def _times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f}{TIMES}"


def _brief(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio >= 1.2 else f"{ratio:.2f}"


def _count(number: int) -> str:
    for factor, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return _significant(number / factor) + suffix
    return str(number)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)} min {rest:.0f} s" if minutes else f"{_significant(seconds)} s"
