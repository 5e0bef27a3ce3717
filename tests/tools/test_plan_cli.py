"""The verbs `plan` and `sensitivity`: any mix of budgets, reasons, changes, many budgets at once, and refusals."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from backends.weights import save
from planner import Plan
from profiles.errors import EspalierError
from tools import cli, sweep

from . import tiny

ROOT = Path(__file__).parents[2]
MODEL = ("--model", "tests.tools.tiny:model", "--inputs", "1x1x16x16")
X86, ARM = "x86_64_v4.onnxruntime.fp32", "aarch64.xnnpack.fp32"
Call = Callable[..., Result]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run `espalier` with arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda *arguments: CliRunner().invoke(cli.app, [str(own) for own in arguments])


def test_any_mix_of_budgets_is_met(call: Call) -> None:
    budgets = ("--latency", f"{X86}=0.8", "--latency", f"{ARM}=70 %", "--parameters", "0.5", "--macs", "0.6")
    done = call("plan", *MODEL, *budgets, "--model-bytes", "1 MB", "--activation-bytes", "0.9", "--profile", X86)
    assert done.exit_code == 0, done.output
    plan = Plan.load("plan.json")
    assert [own.name for own in plan.limits] == [
        *(X86, ARM),
        *("parameters", "model_bytes", "activation_bytes", "macs"),
    ]
    assert all(own.planned <= own.budget * (1 + 1e-6) for own in plan.limits)
    assert plan.limits[3].budget == 1e6
    assert plan.target_fraction == pytest.approx(0.8)
    assert "parameters:" in done.output


def test_explained_swept_and_planned_again(call: Call) -> None:
    done = call("plan", *MODEL, "--profile", X86, "--latency", "0.6", "--explain", "layer3.0.conv1")
    assert done.exit_code == 0, done.output
    plan = Plan.load("plan.json")
    width = next(own for own in plan.widths if own.name == "layer3.0.conv1")
    assert width.quantum == 16
    assert f"keeps {width.keep} of 64; {X86} computes it in steps of 16" in done.output
    below = max(count for count in width.considered if count < width.keep)
    assert f"{below + 1} costs as much as {below + 16}; {below} is the next useful width" in done.output
    assert f"{width.keep:>5}: latency {plan.predicted.fraction:.3f} of dense" in done.output
    again = call("plan", *MODEL, "--replan", "plan.json", "--out", "again.json")
    assert again.exit_code == 0, again.output
    assert Plan.load("again.json").diff(plan) == ()
    assert "changed" not in again.output
    call("plan", *MODEL, "--replan", "plan.json", "--latency", "0.4", "--out", "less.json")
    changes = plan.diff(Plan.load("less.json"))
    assert any(line.startswith("latency of dense: 0.") for line in changes)
    swept = call("plan", *MODEL, "--profile", X86, "--sweep", "0.3:0.9:4", "--json")
    rows = json.loads(swept.stdout)
    assert [row["budget"] for row in rows] == [0.3, 0.5, 0.7, 0.9]
    assert all(row["latency_of_dense"] <= row["budget"] + 1e-6 for row in rows)
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    with Path("plan.sweep.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == losses
    assert Path("plan.sweep.png").stat().st_size > 1000


def test_a_forced_crop_goes_from_plan_to_file(call: Call, tmp_path: Path) -> None:
    model = tiny.model()
    with torch.no_grad():  # nothing but the centre matters in one layer
        centre = model.layer3[0].conv2.weight[..., 1:2, 1:2].clone()
        model.layer3[0].conv2.weight.mul_(0.01)[..., 1:2, 1:2] = centre
    save(model, tmp_path / "dense.safetensors")
    net, layer = ("--model", "tests.tools.tiny:model"), "layer3.0.conv2"
    source = ("--data", "tests.tools.tiny:data", "--weights", "dense.safetensors")
    forced = ("--force", "--op-names", layer, "--latency", "0.97", "--importance", "magnitude")
    done = call("plan", *net, *source, "--profile", X86, *forced, "--explain", layer)
    assert done.exit_code == 0, done.output
    assert f"{layer}.weight kernel keeps 1 of 9 positions of its kernel" in done.output
    assert f"whether cutting kernel_shape pays on {X86} is not known" in " ".join(done.output.split())
    plan = Plan.load("plan.json")
    assert [(own.name, own.structure, own.budget) for own in plan.pools] == [(f"{layer}.weight 1x1", "kernel", 0.0)]
    assert call("train", *net, *source, "--epochs", 1).exit_code == 0
    assert call("rebuild", *net, "--weights", "sparse.safetensors").exit_code == 0
    assert load_file("small.safetensors")[f"{layer}.weight"].shape == (64, 64, 1, 1)
    small = ("--plan", "plan.json", "--weights", "small.safetensors", "--out", "small.onnx")
    built = call("compile", *net, *small, "--json")
    assert built.exit_code == 0, built.output
    assert json.loads(built.stdout)["parity"]["max_rel"] <= 1e-4


REFUSED = {
    "gains too little": (("--latency", "0.97"), "this budget gains less than 5%: not worth a training"),
    "several budgets without names": (("--latency", "0.5", "--latency", "0.4"), "say for which profile each is"),
    "nobody's width": (("--tied", "conv1=layer9"), "'layer9' is tied, but is no width"),
    "no pair": (("--tied", "conv1"), "--tied 'conv1' does not name two widths"),
    "no capacity": (("--activation-bytes", "on-chip"), "states no on-chip capacity"),
    "no amount": (("--parameters", "many"), "parameters 'many' is not a fraction of the dense parameters"),
    "below the floor": (("--parameters", "0.0001"), "parameters budget 0.0001 of dense"),
    "no range": (("--sweep", "0.9:0.3"), "write LOW:HIGH"),
    "no such layer": (("--explain", "layer3.0.conv9"), "near it: layer3.0.conv2, layer3.0.conv1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_planned_says_why(case: str, call: Call) -> None:
    options, expected = REFUSED[case]
    refused = call("plan", *MODEL, "--profile", X86, *options)
    assert expected in str(refused.exception)
    assert not Path("plan.json").exists()


def test_sensitivity_is_drawn_and_kept(call: Call) -> None:
    options = ("--model", "tests.tools.tiny:model", "--data", "tests.tools.tiny:data", "--profile", X86)
    done = call("sensitivity", *options)
    assert done.exit_code == 0, done.output
    assert "block layer1.0 removed, loss" in done.output
    with Path("sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == {"filter", "depth"}
    assert all(float(row["loss"]) == 0 for row in rows if row["keep"] == row["size"])
    assert Path("sensitivity.png").stat().st_size > 1000
    (kept,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("sensitivity/*.json")
    answers = json.loads(kept.read_text())
    question = next(iter(answers))
    kept.write_text(json.dumps({**answers, question: 123.0}))
    assert "123.0" in call("sensitivity", *options).output  # nothing is measured twice


def test_ranges_are_read() -> None:
    assert sweep.budgets("0.3:0.9") == [round(0.3 + 0.05 * i, 6) for i in range(13)]
    with pytest.raises(EspalierError, match="is not a range"):
        sweep.budgets("1")
