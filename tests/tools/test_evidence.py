"""Tables of the README come from the files of evidence, and from nowhere else."""

import json
from pathlib import Path

import pytest

from profiles.errors import EspalierError
from tools.evidence import record, render
from tools.evidence.fronts import fronts

SCORE = {"case": "net b1 onnxruntime 1.31.1 seed 3", "networks": 25, "mape": 0.012, "worst": 0.21, "tau": 0.96}
ROWS = [
    {**SCORE, "basis": basis, "missed": ["worst"] if basis == "table" else []} for basis in ("table", "rules", "macs")
]


def added(folder: Path, rows: list[dict[str, object]]) -> record.Evidence:
    record.add("latency", rows, command="python -m bench", key=("case", "basis"), folder=folder)
    return record.read("latency", folder)


def test_rows_of_the_same_key_are_replaced_and_others_stay(tmp_path: Path) -> None:
    assert len(added(tmp_path, ROWS).rows) == 3
    found = added(tmp_path, [{**ROWS[1], "tau": 0.5}, {**ROWS[1], "case": "other"}])
    assert [(row["case"][:3], row["basis"], row["tau"]) for row in found.rows] == [
        ("net", "table", 0.96),
        ("net", "rules", 0.5),
        ("net", "macs", 0.96),
        ("oth", "rules", 0.96),
    ]
    assert all(len(row["date"]) == 10 for row in found.rows)


def test_a_table_is_one_machines(tmp_path: Path) -> None:
    added(tmp_path, ROWS)
    path = tmp_path / "latency.json"
    content = json.loads(path.read_text())
    content["machine"]["cpu"] = "Another"
    path.write_text(json.dumps(content))
    with pytest.raises(EspalierError, match=r"found on another machine \(Another\)"):
        added(tmp_path, ROWS)
    assert json.loads(path.read_text()) == content


def test_rows_of_another_build_of_the_system_say_so(tmp_path: Path) -> None:
    added(tmp_path, ROWS)
    path = tmp_path / "latency.json"
    content = json.loads(path.read_text())
    here, content["machine"]["platform"] = content["machine"]["platform"], "Another"
    path.write_text(json.dumps(content))
    found = added(tmp_path, [{**ROWS[1], "case": "other"}])
    assert found.machine.platform == "Another"
    assert [row.get("platform") for row in found.rows] == [None, None, None, here]


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), ("{", "no table of this version")])
def test_what_is_no_table_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "latency.json").write_text(content)
    with pytest.raises(EspalierError, match=said):
        record.read("latency", tmp_path)


def test_a_table_is_written_between_its_marks_and_bold_is_what_missed(tmp_path: Path) -> None:
    added(tmp_path, ROWS)
    text = "before\n<!-- evidence: latency -->\nold\n<!-- end of evidence -->\nafter\n"
    once = render.rendered(text, tmp_path)
    like = "| 1.2 % | 0.960 | 1.2 % | 0.960 |\n"
    assert f"| net, 1, onnxruntime | 3 | 1.2 % | **21.0 %** | 0.960 | - | - | - {like}" in once
    assert "old" not in once
    assert once.startswith("before\n")
    assert once.endswith("-->\nafter\n")
    assert render.rendered(once, tmp_path) == once


def test_gains_are_shown_by_target_and_estimates_are_told_apart(tmp_path: Path) -> None:
    dense = {"network": "net", "plan": "dense", "target": "cpu", "mac_speedup": 1.0, "accuracy": 0.9}
    dense |= {"measured_s": {"value": 0.002, "low": 0.0019, "high": 0.0021}, "speedup": None, "estimated_s": None}
    half = {**dense, "plan": "cpu", "mac_speedup": 1.9, "speedup": {"value": 2.04, "low": 2.0, "high": 2.1}}
    npu = {**half, "target": "npu", "speedup": None, "estimated_speedup": 1.7, "accuracy": None}
    record.add("targets", [dense, half, npu], command="c", key=("network", "plan", "target"), folder=tmp_path)
    text = render.rendered("<!-- evidence: targets -->\n<!-- end of evidence -->", tmp_path)
    assert "| net, dense | 1.00x | 2 ms, 90.0 % | - |\n" in text
    assert "| net, half for cpu | 1.90x | 2.04x, 90.0 % | 1.70x (estimated) |\n" in text


def test_what_a_rival_keeps_more_is_bold(tmp_path: Path) -> None:
    row = {"network": "net", "profile": "cpu", "budget": 0.5, "ours": 0.8, "latency": 0.493}
    rows = [{**row, "rival": name, "theirs": kept} for name, kept in (("one", 0.64), ("two", 0.81), ("far", None))]
    record.add("rivals", rows, command="c", key=("network", "budget", "rival"), folder=tmp_path)
    text = render.rendered("<!-- evidence: rivals -->\n<!-- end of evidence -->", tmp_path)
    assert "| importance kept | net at 0.49 |\n" in text
    assert "| espalier | 80.0 % |\n| more than one | +25.0 % |\n| more than two | **-1.2 %** |\n" in text
    assert "| more than far | - |\n" in text


def test_a_missed_budget_is_bold_and_further_plans_are_counted(tmp_path: Path) -> None:
    case = {"network": "net", "runtime": "openvino"}
    good, bad = ({"planned": 0.5, "measured": m, "of_budget": m / 0.5} for m in (0.52, 0.56))
    rows = [
        {**case, "budget": 0.5, "tries": [bad, good]},
        {**case, "budget": 0.8, "tries": [{**bad, "of_budget": 0.7}]},
    ]
    record.add("budget", rows, command="c", key=("network", "runtime", "budget"), folder=tmp_path)
    text = render.rendered("<!-- evidence: budget -->\n<!-- end of evidence -->", tmp_path)
    assert "| measured / dense at a budget of | 0.5 | 0.8 |\n" in text
    assert "| net, openvino | 0.520 (2 plans) | **0.560** |\n" in text


def test_accuracies_are_means_over_seeds_the_best_method_first(tmp_path: Path) -> None:
    row = {"network": "net", "runtime": "onnxruntime", "budget": 0.5, "epochs": 4, "sparse": 0.2, "total": 6.0}
    row |= {
        "anneal": 0.0,
        "lr": 0.04,
        "distil": False,
        "dense": 0.926,
        "recalibrated": 0.7,
        "params": 135_914,
        "macs": 18_400_000,
    }
    row |= {"speedup": {"onnxruntime": {"value": 2.04}}}
    sparse = {**row, "method": "WGSEF de-biased", "before": 0.6, "at_cut": 0.6, "zeroed": 0}
    rows = [{**row, "method": "uniform", "seed": 0, "before": 0.926, "at_cut": 0.1, "after": 0.83, "zeroed": None}]
    rows += [{**sparse, "seed": seed, "after": after} for seed, after in enumerate((0.88, 0.9))]
    record.add("accuracy", rows, command="c", key=("method", "seed"), folder=tmp_path)
    text = render.rendered("<!-- evidence: accuracy -->\n<!-- end of evidence -->", tmp_path)
    place = "| net (92.60), 0.5 in onnxruntime, 4 epochs"
    how = "WGSEF de-biased, shrinking 0.2, strength 6, annealed 0, lr 0.04"
    lines = [line for line in text.splitlines() if line.startswith(place)]
    assert lines == [
        f"{place} | {how} | 60.00 | 60.00 | 70.00 | 89.00 ± 1.41 | 2 | 0.136 M | 18.4 M | 2.04x |",
        f"{place} | uniform, lr 0.04 | 92.60 | 10.00 | 70.00 | 83.00 | 1 | 0.136 M | 18.4 M | 2.04x |",
    ]
    (axes,) = fronts(record.read("accuracy", tmp_path)).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}  # type: ignore[union-attr]
    assert drawn["uniform"] == [[pytest.approx(1 / 2.04), pytest.approx(83.0)]]
    assert drawn["WGSEF de-biased"] == [[pytest.approx(1 / 2.04), pytest.approx(89.0)]]


def test_an_unknown_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EspalierError, match="no table is called 'nothing'"):
        render.rendered("<!-- evidence: nothing -->\n<!-- end of evidence -->", tmp_path)


def test_the_readme_holds_what_was_found() -> None:
    text = render.README.read_text()
    assert "<!-- evidence: latency -->" in text
    assert render.rendered(text) == text


def test_a_log_keeps_rows_as_they_come(tmp_path: Path) -> None:
    log = record.Log(tmp_path / "log.json")
    assert log.rows() == {}
    for key, value in (("a", 1), ("b", 2), ("a", 3)):
        log.keep(key, {"value": value})
    assert record.Log(tmp_path / "log.json").rows() == {"a": {"value": 3}, "b": {"value": 2}}


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_another_file_is_no_log(content: str, tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(content)
    with pytest.raises(EspalierError, match=r"log.json .*; give another --log FILE"):
        record.Log(tmp_path / "log.json").rows()
