"""The command line: bad input is one message and exit 2, verbs work file to file, an interrupted run continues."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from backends import Artifact
from backends.weights import save
from planner import Plan
from profiles import BuildError
from tools import calibrate, cli, pipeline
from tools.outcome import Outcome

from . import tiny

HERE = Path(__file__).parent
MODEL, DATA = "tests.tools.tiny:model", "tests.tools.tiny:data"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Run `espalier` with arguments in an empty folder; return its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE.parent.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    for module in (calibrate, pipeline):  # the tests judge what is measured, not how well
        monkeypatch.setattr(module, "bench", partial(calibrate.bench, seconds=0.03))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["espalier", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def truncated(path: Path) -> Path:
    path.write_text('{"schema_version": 1, "profi')
    return path


SHAPE = ("--inputs", "1x1x8x8")
BAD = {
    "unknown profile": (["profiles", "show", "x86_64_v4.onnxruntim.fp32"], "x86_64_v4.onnxruntime.fp32"),
    "unknown profile to detect": (["detect", "--why-not", "x86_v4"], "x86_64_v4"),
    "factory without colon": (["groups", "--model", "tests.tools.tiny", *SHAPE], "package.module:factory"),
    "module that does not import": (["groups", "--model", "no.such:model", *SHAPE], "No module named 'no'"),
    "factory that is not there": (["groups", "--model", "tests.tools.tiny:modell", *SHAPE], "mean model"),
    "factory of no model": (["groups", "--model", "tests.tools.tiny:text", *SHAPE], "torch.nn.Module"),
    "shape that is none": (["groups", "--model", MODEL, "--inputs", "1xax8"], "1x3x32x32"),
    "shape that does not fit": (
        ["groups", "--model", MODEL, "--inputs", "1x3x8x8"],
        "not run on inputs of shape 1x3x8x8",
    ),
    "no shape": (["groups", "--model", MODEL], "--inputs"),
    "model that branches": (["groups", "--model", "tests.tools.tiny:branching", *SHAPE], "tiny.py:"),
    "unknown group": (["groups", "--model", MODEL, *SHAPE, "--why", "layer1.0.conv9"], "layer1.0.conv1"),
    "latency in words": (["plan", "--model", MODEL, *SHAPE, "--latency", "fast"], "'fast'"),
    "milliseconds without table": (["plan", "--model", MODEL, *SHAPE, "--latency", "1 ms"], "calibrate"),
    "unreachable latency": (["plan", "--model", MODEL, *SHAPE, "--latency", "0.01"], "below the floor"),
    "no plan": (["train", "--model", MODEL, "--data", DATA, "--plan", "none.json"], "espalier plan"),
    "no runtime": (["compile", "--model", MODEL, *SHAPE, "--out", "m.x", "--runtime", "tvm"], "onnxruntime"),
    "no measurements": (["report", "none.json"], "none.json"),
    "calibrate without a model": (["calibrate"], "--model"),
    "written without a check": (["calibrate", "--model", MODEL, *SHAPE, "--write"], "--check"),
    "import without a kit": (["calibrate", "--model", MODEL, *SHAPE, "--import", "results.json"], "--kit"),
    "layer that is not there": (["plan", "--model", MODEL, *SHAPE, "--op-names", "conv9"], "no layer 'conv9'"),
    "type that is not there": (["plan", "--model", MODEL, *SHAPE, "--op-types", "Conv7d"], "Conv2d"),
    "unknown option": (["plan", "--budget", "1"], "--budget"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_exit_2(call: Call, case: str) -> None:
    arguments, told = BAD[case]
    code, out, err = call(*arguments)
    assert code == 2
    assert told in err
    assert "Traceback" not in err + out


def test_a_scope_keeps_what_it_leaves_out(call: Call, tmp_path: Path) -> None:
    scope = ("--ignored-layers", "layer1", "--keep-blocks", "--min-width", "4")
    code, out, _ = call("plan", "--model", MODEL, *SHAPE, "--latency", "0.8", "--json", *scope)
    assert code == 0
    plan = json.loads(out)
    assert plan["widths"]
    assert not any(width["name"].startswith("layer1.") for width in plan["widths"])
    assert min(width["keep"] for width in plan["widths"]) >= 4
    assert not any(block["removed"] for block in plan["blocks"])


def test_damaged_files_are_refused(call: Call, tmp_path: Path) -> None:
    assert call("plan", "--model", MODEL, *SHAPE, "--latency", "0.6", "--out", "plan.json")[0] == 0
    good = (tmp_path / "plan.json").read_text()
    cases = {
        "truncated": (good[: len(good) // 2], "truncated"),
        "edited": (good.replace('"keep": 16', '"keep": 15', 1), "edited"),
        "of another version": (good.replace('"schema_version": 1', '"schema_version": 9'), "schema_version"),
    }
    for name, (text, told) in cases.items():
        assert text != good, name
        (tmp_path / "plan.json").write_text(text)
        code, _, err = call("train", "--model", MODEL, "--data", DATA)
        assert (code, told in err, "Traceback" in err) == (2, True, False), name
    table = truncated(tmp_path / "table.json")
    code, _, err = call("plan", "--model", MODEL, *SHAPE, "--table", table)
    assert code == 2
    assert "espalier calibrate" in err
    (tmp_path / "plan.json").write_text(good)
    code, _, err = call("train", "--model", "tests.tools.tiny:other", "--data", DATA)
    assert code == 2
    assert "another model" in err
    (tmp_path / "w.safetensors").write_bytes(b"not safetensors")
    code, _, err = call("rebuild", "--model", MODEL, "--weights", "w.safetensors")
    assert code == 2
    assert "w.safetensors" in err


def test_rebuild_before_training_says_no(call: Call, tmp_path: Path) -> None:
    call("plan", "--model", MODEL, *SHAPE, "--latency", "0.6")
    save(tiny.model(), tmp_path / "dense.safetensors")
    code, _, err = call("rebuild", "--model", MODEL, "--weights", "dense.safetensors")
    assert code == 1
    assert "do not meet the plan" in err
    assert not (tmp_path / "small.safetensors").exists()


def test_every_verb_works_file_to_file(call: Call, tmp_path: Path) -> None:
    def json_of(*arguments: object) -> object:
        code, out, err = call(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    shape = ("--inputs", "1x1x8x8")
    assert any(row["id"] == "x86_64_v4.onnxruntime.fp32" for row in json_of("profiles", "list"))
    assert json_of("profiles", "show", "x86_64_v3.onnxruntime.fp32")["id"] == "x86_64_v3.onnxruntime.fp32"
    assert json_of("detect")
    profile = ("--profile", "x86_64_v3.onnxruntime.fp32")
    assert json_of("calibrate", "--model", MODEL, *shape, *profile)["entries"] > 10
    first = (tmp_path / "table.json").read_bytes()
    assert json_of("calibrate", "--model", MODEL, *shape, *profile)  # from the cache: the same table to the byte
    assert (tmp_path / "table.json").read_bytes() == first
    assert any(row["name"] == "layer1.0.conv1" for row in json_of("groups", "--model", MODEL, *shape))
    assert "layer1.0.bn1.bias" in str(json_of("groups", "--model", MODEL, *shape, "--why", "layer1.0.conv1"))
    plan = json_of("plan", "--model", MODEL, "--data", DATA, "--table", "table.json", "--latency", "60 %", *profile)
    assert plan["predicted"]["fraction"] <= 0.6
    trained = json_of("train", "--model", MODEL, "--data", DATA, "--epochs", 3)
    whole = sum(width.dense for width in Plan.load(tmp_path / "plan.json").widths)
    assert trained["groups"] == trained["budget"] < whole + 3  # and three blocks
    rebuilt = json_of("rebuild", "--model", MODEL, "--weights", "sparse.safetensors")
    assert rebuilt["params"] < rebuilt["dense_params"]
    small = ("--model", MODEL, "--plan", "plan.json", "--weights", "small.safetensors")
    built = json_of("compile", *small, "--out", "small.onnx")
    assert built["parity"]["max_rel"] <= 1e-4
    assert built["plan_sha256"] == Plan.load(tmp_path / "plan.json").sha256
    assert json_of("compile", "--model", MODEL, *shape, "--out", "dense.onnx")["plan_sha256"] is None
    assert json_of("compile", *small, "--out", "small.pt.safetensors", "--runtime", "pytorch")["runtime"] == "pytorch"
    records = ("dense.onnx.json", "small.onnx.json")
    measured = json_of("measure", *records, "--seconds", "0.05", "--streams", "2", "--memory", "--out", "raw.json")
    assert {what: len(found) for what, found in measured.items()} == {"latency": 2, "throughput": 2, "memory": 2}
    assert all(found["streams"] == 2 and found["examples_per_s"] > 0 for found in measured["throughput"])
    of_pytorch = ("small.pt.safetensors.json", "--model", MODEL, "--plan", "plan.json")
    pytorch = json_of("measure", *of_pytorch, "--seconds", "0.05")
    assert pytorch["latency"][0]["runtime"] == "pytorch"
    assert json.loads((tmp_path / "raw.json").read_text()) == measured
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no half-written file


EPOCHS = ("--epochs", "3", "--dense-epochs", "2")
RUN = ["run", "--model", MODEL, "--data", DATA, "--out", "out", *EPOCHS, "--latency", "0.6"]


def test_interrupted_run_continues(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import console

    def interrupting(self: console.Phase, what: str, done: int, total: int) -> None:
        if "groups" in what and done > total // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "runtimes", lambda profile: [profile.runtime.name, "pytorch"])
    with monkeypatch.context() as patch:
        patch.setattr(console.Phase, "step", interrupting)
        code, _, err = call(*RUN)
    assert code == 130
    assert "continues" in err
    plan = Plan.load(tmp_path / "out" / "plan.json")
    code, out, err = call(*RUN)
    assert code in (0, 1), err  # 1: a claim about latency may fail on a busy machine; the files say so
    outcome = Outcome.load(tmp_path / "out" / "measurements.json")
    assert (code == 0) == all(verdict.ok for verdict in outcome.verdicts)
    assert Plan.load(tmp_path / "out" / "plan.json") == plan
    assert "espalier" in out
    assert outcome.tries
    assert outcome.tries[0].budget == pytest.approx(0.6)
    assert f"plan 1: {outcome.tries[0].told}" in out
    assert any(note.startswith("control: cut at once") for note in plan.notes)
    assert outcome.notes == list(plan.notes)
    assert outcome.accuracy.rebuilt == outcome.accuracy.sparse
    assert outcome.equivalence < 1e-4
    assert max(outcome.parity.values()) < 1e-4
    assert [row.label for row in outcome.rows] == ["dense", "espalier", "uniform, same MACs"]
    made_by = {path.name: Artifact.load(path).plan_sha256 for path in (tmp_path / "out").glob("*.onnxruntime.json")}
    assert set(made_by.values()) == {None, plan.sha256}, made_by
    assert outcome.history[-1].nonzero_groups == outcome.history[-1].budget_groups
    sparse = load_file(tmp_path / "out" / "sparse.safetensors")
    for width in plan.widths:
        weight = sparse[f"{width.name}.weight"]
        if width.keep:
            assert int((weight.flatten(1).norm(dim=1) > 0).sum()) == width.keep
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    code, _, err = call(*RUN)
    assert "nothing left to do" in err
    code, _, err = call(*RUN[:-1], "0.7")
    assert code == 2
    assert "another run" in err


def test_one_budget_for_all_widths_ends_on_the_last_plan(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "LIMIT_S", 5.0)
    monkeypatch.setattr(pipeline, "runtimes", lambda profile: [profile.runtime.name])
    shared = ("--global-budget", "--every", "1", "--keep-blocks")  # a plan that only removes blocks shares nothing
    code, out, err = call(*RUN[:7], "--epochs", "6", "--latency", "0.8", *shared, "--json")
    assert code in (0, 1), err  # 1: as above, and a model that was never trained densely
    outcome = Outcome.model_validate_json(out)
    first, plan = (Plan.load(tmp_path / "out" / name) for name in ("plan.first.json", "plan.json"))
    assert first.importance in ("measured", "measured^0.5", "measured^2")
    assert plan.importance == "norms in training"
    assert plan.predicted.fraction <= 0.8 * (1 + 0.03)
    assert all(len(pool.members) == 1 for pool in plan.pools)
    assert outcome.notes == list(plan.notes)
    assert "one budget for all widths, solved again" in outcome.notes[-1]
    assert outcome.notes[0] in first.notes  # the control, of the plan that training began with
    assert "with random channels" in outcome.notes[0]
    assert {row.name: row.kept for row in outcome.widths} == plan.choice.keep
    assert outcome.accuracy.rebuilt == outcome.accuracy.sparse
    sparse = load_file(tmp_path / "out" / "sparse.safetensors")
    kept = {w.name: int((sparse[f"{w.name}.weight"].flatten(1).norm(dim=1) > 0).sum()) for w in plan.widths if w.keep}
    assert kept == {name: count for name, count in plan.choice.keep.items() if count}


def test_missing_runtime_names_the_pip_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    code, _, err = call("compile", "--model", MODEL, *SHAPE, "--out", "m.onnx", "--runtime", "openvino")
    assert code == 2
    assert "pip install 'espalier[openvino]'" in err


def test_refused_model_is_exit_1_and_the_files_say_so(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: object) -> None:
        raise BuildError("the rebuilt model differs")

    monkeypatch.setattr(pipeline, "rebuild", refusing)
    code, _, err = call(*RUN[:-1], "0.7")
    assert code == 1
    assert "the rebuilt model differs" in err
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert verdict["ok"] is False
    assert verdict["claims"][0]["detail"] == "the rebuilt model differs"
    assert not (tmp_path / "out" / "small.onnx").exists()


SHORT = """
from tools import calibrate, cli, pipeline
calibrate.LIMIT_S, calibrate._TIMED_S = 20.0, 0.0
pipeline.runtimes = lambda profile: [profile.runtime.name, "pytorch"]
cli.main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_killed_run_continues(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(HERE.parent.parent)
    command = [sys.executable, "-c", SHORT, *RUN, "--json"]
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "out" / "dense.training.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    first.communicate()
    assert checkpoint.exists()
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode in (0, 1), second.stderr
    assert json.loads(second.stdout)["accuracy"]["rebuilt"] > 0.5
    assert torch.isfinite(load_file(tmp_path / "out" / "small.safetensors")["fc.weight"]).all()
