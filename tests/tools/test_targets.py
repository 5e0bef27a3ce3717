"""`compile --targets` and `verify`: one table of what was measured and estimated; nothing is built twice."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import planner
import profiles
from backends import Artifact, onnxruntime
from backends.estimate import Estimate
from backends.rebuild import rebuild
from backends.weights import save
from profiles.errors import BackendUnavailable, BuildError, EspalierError
from tools import cli, targets, verifying
from tools.targets import Gains, Target, labels

from . import tiny

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
MODEL, DATA = ("--model", "tests.tools.tiny:model"), ("--data", "tests.tools.tiny:data")
Call = Callable[..., tuple[int, str, str]]
QUICK = ("--seconds", "0.02")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plans, the weights that were rebuilt with each, and the dense ones."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model, profile = tiny.model().eval(), profiles.load("x86_64_v3.onnxruntime.fp32")
    save(model, folder / "dense.safetensors")
    for name, latency in (("half", 0.6), ("third", 0.4)):
        plan, sparse = planner.plan(model, (torch.ones(1, 1, 8, 8),), profile, latency=latency), copy.deepcopy(model)
        planner.harden_(plan, sparse)
        plan.save(folder / name / "plan.json")
        save(rebuild(plan, sparse), folder / name / "small.safetensors")
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Run `espalier` in an empty folder; return its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")

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


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that ONNX Runtime's build is asked for."""
    asked, build = [], onnxruntime.build

    def counted(model: object, inputs: object, profile: object, path: Path, **settings: object) -> Artifact:
        asked.append(path.name)
        return build(model, inputs, profile, path, **settings)

    monkeypatch.setattr(onnxruntime, "build", counted)
    return asked


def compiling(made: Path, *names: str, on: str = "onnxruntime,pytorch") -> list[object]:
    plans = [made / name / "plan.json" for name in names]
    dense = ("--dense-weights", made / "dense.safetensors")
    return ["compile", *plans, *MODEL, *dense, "--targets", on, "--out", "out", *QUICK]


def test_several_plans_for_several_targets_are_one_table(call: Call, made: Path, tmp_path: Path) -> None:
    code, out, err = call(*compiling(made, "half", "third"), "--json")
    assert code == 0, err
    found = Gains.model_validate_json(out)
    assert [(row.plan, row.target) for row in found.rows] == [
        (plan, target) for target in ("onnxruntime", "pytorch") for plan in ("dense", "half", "third")
    ]
    for row in found.rows:
        assert row.speedup is not None
        assert row.efficiency == pytest.approx(row.speedup.value / row.mac_speedup)
        assert row.mac_speedup == pytest.approx(found.rows[0].macs / row.macs)
        assert row.estimated_s is None
        artifact = Artifact.load(tmp_path / "out" / row.record)
        assert (artifact.runtime, artifact.plan_sha256 is None) == (row.target, row.plan == "dense")
    for index, name in enumerate(("half", "third"), 1):  # what was compiled has the operations that were planned
        assert found.rows[index].macs == planner.Plan.load(made / name / "plan.json").predicted.macs
    assert [row.speedup.value for row in found.rows if row.plan == "dense"] == [1.0, 1.0]
    assert Gains.model_validate_json((tmp_path / "out" / "targets.json").read_text()) == found
    code, out, _ = call(*compiling(made, "half", "third"))
    assert code == 0
    assert all(word in out for word in ("MAC speed-up", "efficiency", "third"))
    assert "estimated" not in out


def test_nothing_is_built_twice_and_an_interruption_loses_nothing(
    call: Call, made: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = compiling(made, "half", "third", on="onnxruntime")
    build = onnxruntime.build

    def interrupted(model: object, inputs: object, profile: object, path: Path, **settings: object) -> Artifact:
        if "third" in path.name:
            raise KeyboardInterrupt
        return build(model, inputs, profile, path, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "build", interrupted)
        assert call(*command)[0] == 130
    assert len(builds) == 2
    assert call(*command)[0] == 0
    assert builds[2:] == ["third.onnxruntime.onnx"]
    assert call(*command)[0] == 0
    assert len(builds) == 3
    whole = (tmp_path / "out" / "half.onnxruntime.onnx").read_bytes()
    (tmp_path / "out" / "half.onnxruntime.onnx").write_bytes(whole[:-1])
    (tmp_path / "out" / "third.onnxruntime.onnx.json").write_text("{")
    assert call(*command)[0] == 0
    assert builds[3:] == ["half.onnxruntime.onnx", "third.onnxruntime.onnx"]
    assert call(*command, "--fresh")[0] == 0
    assert len(builds) == 8


def test_other_weights_inputs_or_data_are_built_anew(call: Call, made: Path, builds: list[str], tmp_path: Path) -> None:
    plan, weights = made / "half" / "plan.json", tmp_path / "other.safetensors"
    small = targets.load_rebuilt(planner.Plan.load(plan), tiny.model(), made / "half" / "small.safetensors")
    with torch.no_grad():
        small.fc.bias += 1
    save(small, weights)
    command = compiling(made, "half", on="onnxruntime")
    assert call(*command)[0] == 0
    builds.clear()
    assert call(*command, "--weights", weights)[0] == 0
    assert builds == ["half.onnxruntime.onnx"]
    assert call(*command, "--weights", weights, "--inputs", "2x1x8x8")[0] == 0
    assert len(builds) == 3
    assert call(*command, "--weights", weights, "--inputs", "2x1x8x8", *DATA)[0] == 0
    assert len(builds) == 5


def test_what_was_measured_is_kept_until_a_file_changes(
    call: Call, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, timed, compare = compiling(made, "half", on="onnxruntime"), [], targets.compare

    def counted(candidates: list, **settings: object) -> list:
        timed.append([each.label for each in candidates])
        found = compare(candidates, **settings)
        # A disturbed one is measured again, which a busy machine would make of every one.
        return [m.model_copy(update={"disturbed_rounds": 0, "cpu_share": 1.0}) for m in found]

    monkeypatch.setattr(targets, "compare", counted)
    assert call(*command)[0] == 0
    assert call(*command)[0] == 0
    assert timed == [["dense", "half"]]
    assert call(*compiling(made, "half", "third", on="onnxruntime"))[0] == 0
    assert timed[1:] == [["dense", "half", "third"]]


def test_a_missing_runtime_is_named_and_the_others_run(call: Call, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    code, out, err = call(*compiling(made, "half", on="openvino,onnxruntime"), "--json")
    assert code == 2
    assert "pip install 'espalier[openvino]'" in err
    assert [row["target"] for row in json.loads(out)["rows"]] == ["onnxruntime"] * 2
    assert list(json.loads(out)["absent"]) == ["openvino"]


def test_a_refused_model_is_named_and_the_others_run(
    call: Call, made: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = onnxruntime.build

    def refusing(model: object, inputs: object, profile: object, path: Path, **settings: object) -> Artifact:
        if "half" in path.name:
            raise BuildError("it computes something else")
        return build(model, inputs, profile, path, **settings)

    monkeypatch.setattr(onnxruntime, "build", refusing)
    code, out, err = call(*compiling(made, "half", "third", on="onnxruntime"), "--json")
    assert code == 1
    assert "half for onnxruntime: it computes something else" in err
    assert [row["plan"] for row in json.loads(out)["rows"]] == ["dense", "third"]


def estimate(latency_s: float) -> Estimate:
    return Estimate(
        compiler="Vela 0",
        accelerator="x",
        system_config="x",
        memory_mode="x",
        clock_hz=1.0,
        latency_s=latency_s,
        cycles=1,
        bound_cycles={},
        sram_bytes=0,
        dram_bytes=0,
        flash_bytes=0,
        macs=1,
        bandwidth_bytes={},
        operators=(),
    )


def test_an_estimate_is_never_measured_nor_called_so(call: Call, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = onnxruntime.build

    def estimating(model: object, inputs: object, profile: object, path: Path, **settings: object) -> Artifact:
        artifact = build(model, inputs, None, path, **settings)
        return artifact.model_copy(update={"estimate": estimate(4e-3 if "dense" in path.name else 1e-3)})

    monkeypatch.setattr(onnxruntime, "build", estimating)
    command = compiling(made, "half", on="onnxruntime")
    code, out, err = call(*command, "--json")
    assert code == 0, err
    for row, gain in zip(json.loads(out)["rows"], (1.0, 4.0), strict=True):
        assert row["estimated_speedup"] == pytest.approx(gain)
        assert (row["estimated_by"], row["measured_s"], row["speedup"], row["efficiency"]) == ("Vela 0", *[None] * 3)
    assert "estimated by Vela 0: nothing ran on the device" in call(*command)[1]


def test_a_device_that_is_not_here_is_compiled_for_but_not_measured(call: Call, made: Path) -> None:
    absent = "aarch64.onnxruntime.fp32"
    if not Target.of(absent).elsewhere:
        pytest.skip("this machine is an aarch64")
    code, out, err = call(*compiling(made, "half", on=absent), "--json")
    assert code == 0, err
    for row in json.loads(out)["rows"]:
        assert row["measured_s"] is None
        assert "not measured: wants a CPU that is aarch64" in row["remark"]


WRONG = {
    "an unknown target": (["--targets", "onnxruntim"], "a target is a profile or one of the runtimes"),
    "no target": (["--targets", " , "], "--targets is empty"),
    "int8 without data": (["--targets", "x86_64_v3.xnnpack.int8"], "give --data"),
    "a runtime beside targets": (["--targets", "onnxruntime", "--runtime", "openvino"], "leave --runtime"),
    "too many weights": (["--targets", "onnxruntime", "--weights", "a", "--weights", "b"], "one for each plan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_message_before_anything_is_built(call: Call, made: Path, tmp_path: Path, case: str) -> None:
    arguments, told = WRONG[case]
    code, _, err = call("compile", made / "half" / "plan.json", *MODEL, "--out", "out", *arguments)
    assert (code, told in err, "Traceback" in err) == (2, True, False), err
    assert not (tmp_path / "out").exists()


def test_plans_without_targets_or_weights_are_refused(call: Call, made: Path, tmp_path: Path) -> None:
    plans = [made / name / "plan.json" for name in ("half", "third")]
    assert "--targets a,b,c" in call("compile", *plans, *MODEL, "--out", "x.onnx")[2]
    assert call("compile", *MODEL, "--targets", "pytorch", "--out", "out")[0] == 2
    (tmp_path / "plan.json").write_bytes(plans[0].read_bytes())
    code, _, err = call("compile", "plan.json", *MODEL, "--targets", "pytorch", "--out", "out")
    assert code == 2
    assert "plan.json has no small.safetensors or weights.safetensors beside it; give --weights" in err


def test_plans_are_called_by_their_file_or_folder() -> None:
    assert labels([Path("/x/a.json"), Path("/x/b/plan.json")]) == ["a", "b"]
    for twice in (["/x/a.json", "/y/a.json"], ["/x/dense.json"]):
        with pytest.raises(EspalierError, match="rename the file or folder"):
            labels([Path(path) for path in twice])


@pytest.fixture
def built(call: Call, made: Path, tmp_path: Path) -> Path:
    assert call(*compiling(made, "half"))[0] == 0
    return tmp_path / "out"


def verifying_of(made: Path, *records: Path) -> list[object]:
    dense = ("--dense-weights", made / "dense.safetensors")
    return ["verify", *records, *MODEL, *dense, "--plan", made / "half" / "plan.json"]


def test_verify_compares_with_pytorch_on_inputs_not_seen(call: Call, made: Path, built: Path) -> None:
    names = ("dense.onnxruntime.onnx", "half.onnxruntime.onnx", "half.pytorch.safetensors")
    command = verifying_of(made, *(built / f"{name}.json" for name in names))
    code, out, err = call(*command, *DATA, "--json")
    assert code == 0, err
    first = json.loads(out)
    assert [(each["inputs"], each["cases"]) for each in first["artifacts"]] == [("random", 8), ("real", 32)] * 3
    assert all(each["ok"] and each["max_rel"] <= each["tolerance"] == 1e-4 for each in first["artifacts"])
    second = json.loads(call(*command, "--cases", "9", "--json")[1])
    assert second["seed"] != first["seed"]
    assert {each["cases"] for each in second["artifacts"]} == {9}
    again = json.loads(call(*command, *DATA, "--json", "--seed", first["seed"])[1])
    assert again == first
    code, out, _ = call(*command)
    assert code == 0
    assert "max rel" in out


def test_verify_says_no_to_what_computes_something_else(call: Call, made: Path, built: Path) -> None:
    record = built / "dense.onnxruntime.onnx.json"
    other = tiny.model()
    with torch.no_grad():
        other.fc.bias += 1
    save(other, built / "other.safetensors")
    code, out, _ = call("verify", record, *MODEL, "--weights", built / "other.safetensors", "--json")
    assert code == 1
    (found,) = json.loads(out)["artifacts"]
    assert found["ok"] is False
    assert found["max_rel"] > 1e-2
    file = built / "dense.onnxruntime.onnx"
    file.write_bytes(file.read_bytes() + b"x")
    code, _, err = call(*verifying_of(made, record))
    assert code == 1
    assert "changed since it was built" in err


EDITED: dict[str, object] = {
    "plan_sha256": "0" * 64,
    "built_from": "0" * 64,
    "sha256": "0" * 64,
    "parity": {"cases": 8, "max_abs": 0.0, "max_rel": 0.0},
    "parity_real": {"cases": 32, "max_abs": 0.0, "max_rel": 0.0},
    "accuracy": {"examples": 1000, "compiled": 1.0, "pytorch": 1.0},
    "inputs": [{"name": "input_0", "shape": [1, 1, 9, 9], "dtype": "float32"}],
    "runtime": "openvino",
    "runtime_version": "0",
    "profile": "x86_64_v4.onnxruntime.fp32",
    "dtype": "float16",
    "threads": 7,
    "size_bytes": 1,
    "subnormals_flushed": 99,
    "settings": {"provider": "cuda", "reduce_range": None},
    "remarks": ["a remark"],
    "estimate": estimate(1e-3).model_dump(mode="json"),
}


def test_verify_names_each_field_that_was_edited(call: Call, made: Path, built: Path) -> None:
    record = built / "half.onnxruntime.onnx.json"
    content = json.loads(record.read_text())
    assert set(EDITED) == set(Artifact.model_fields) - {"schema_version", "path", "seal"}
    for change in (*({field: value} for field, value in EDITED.items()), EDITED):
        record.write_text(json.dumps(content | change))
        code, _, err = call(*verifying_of(made, record))
        told = f"was edited since it was written: {', '.join(sorted(change))}; build it again"
        assert (code, told in err) == (1, True), err
    record.write_text(json.dumps(content))
    assert call(*verifying_of(made, record))[0] == 0


def test_verify_of_records_without_a_seal_says_no_by_what_it_finds(call: Call, made: Path, built: Path) -> None:
    """Older versions wrote none."""
    record = built / "half.onnxruntime.onnx.json"
    content = json.loads(record.read_text()) | {"seal": {}}
    record.write_text(json.dumps(content))
    assert call(*verifying_of(made, record))[0] == 0
    for field, told in (("sha256", "sha256"), ("inputs", "inputs like those in the record are not taken")):
        record.write_text(json.dumps(content | {field: EDITED[field]}))
        code, out, err = call(*verifying_of(made, record))
        assert (code, told in out + err) == (1, True), out + err


def test_verify_says_no_to_outputs_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    said = verifying.Verified(record="x", runtime="x", dtype="float32", tolerance=1e-4, inputs="random")
    model, case = torch.nn.Linear(2, 2), (torch.ones(1, 2),)

    def broken(inputs: object) -> list:
        return [torch.full((1, 2), float("nan")).numpy()]

    found = verifying._compared(said, broken, model, [case])
    assert (found.ok, found.max_rel) == (False, None)
    assert "NaN" in found.detail
    other = verifying._compared(said, lambda _: [torch.ones(3).numpy()], model, [case])
    assert (other.ok, "shapes" in other.detail) == (False, True)


def test_verify_of_what_is_not_there_or_not_given_is_wrong_use(
    call: Call, made: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = built / "half.onnxruntime.onnx.json"
    for command, told in [
        (["verify", built / "absent.json", *MODEL], "cannot read the artifact"),
        (["verify", built / "targets.json", *MODEL], "is not an artifact"),
        (["verify", small, *MODEL], "another plan than those given"),
        (["verify", small, *MODEL, "--cases", "3"], "--cases"),
    ]:
        code, _, err = call(*command)
        assert (code, told in err) == (2, True), err
    artifact = Artifact.load(small).model_copy(update={"dtype": "int8"})
    artifact.save(built / "int8.json")
    code, _, err = call(*verifying_of(made, built / "int8.json"))
    assert code == 2
    assert "int8, which is judged on real inputs" in err

    def absent(*_: object, **__: object) -> None:
        raise BackendUnavailable("runs on an NPU only")

    monkeypatch.setattr(onnxruntime, "session", absent)
    code, out, _ = call(*verifying_of(made, small))
    assert code == 2
    assert "runs on an NPU only" in out
