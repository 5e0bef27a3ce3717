"""Calibration kits: timed where only the runtime is, killed and continued, refused when changed, read as a table."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from planner.graph import trace
from planner.latency import LatencyTable
from profiles import BackendUnavailable, PlanError, load
from tools import kit_runner
from tools.kit import MANIFEST, RESULTS, RUNNER, Manifest, _openvino, _way, import_results, inputs_of, write_kit

from . import tiny

INPUTS = (torch.zeros(1, 1, 8, 8),)
SITE = Path(sysconfig.get_paths()["purelib"])
FEW = ("--seconds", "0.01")
# What a device has: the runtime and what it imports, and neither PyTorch nor espalier.
PACKAGES = {
    "onnxruntime": ("onnxruntime", "numpy", "numpy.libs"),
    "openvino": ("openvino", "openvino_telemetry", "packaging", "numpy", "numpy.libs"),
}
PROFILES = {"onnxruntime": "x86_64_v3.onnxruntime.fp32", "openvino": "x86_64_v3.openvino.fp32"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits") / "onnxruntime"
    write_kit(tiny.model(), INPUTS, load(PROFILES["onnxruntime"]), folder)
    return folder


@pytest.fixture
def kit(written: Path, tmp_path: Path) -> Path:
    """A copy of the kit, as on a device."""
    return shutil.copytree(written, tmp_path / "kit")


def start(kit: Path, runtime: str, site: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start run.py in a Python that finds the runtime and nothing else of what is installed here."""
    site.mkdir(exist_ok=True)
    for name in PACKAGES[runtime]:
        if (SITE / name).exists() and not (site / name).exists():
            (site / name).symlink_to(SITE / name)
    code = (
        "import importlib.util, runpy, sys\n"
        f"sys.path.append({str(site)!r})\n"
        "for name in ('torch', 'espalier', 'planner', 'tools', 'pydantic'):\n"
        "    assert importlib.util.find_spec(name) is None, name\n"
        f"sys.argv = ['run.py', *{list(arguments)!r}]\n"
        f"runpy.run_path({str(kit / RUNNER)!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    return subprocess.Popen(command, cwd=site, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


def small() -> nn.Module:
    """A model with few variants, for a compiler that takes seconds for each."""
    return nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def check(table: LatencyTable, runtime: str, model: nn.Module) -> None:
    graph = trace(model, INPUTS)
    assert (table.runtime, table.threads, table.batch, table.method) == (runtime, 1, 1, "kit, python")
    assert table.device_model == kit_runner.device_model()
    assert table.fingerprint == graph.fingerprint
    assert table.latency(graph, graph.dense) > 0
    assert all(entry.runs > 0 for entry in table.entries if entry.probes)
    assert len(table.errors) == len(table.probes)


@pytest.mark.parametrize("runtime", PACKAGES)
def test_a_kit_is_timed_with_the_runtime_alone_and_becomes_a_table(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    kit = tmp_path / "kit"
    manifest = write_kit(tiny.model(), INPUTS, load(PROFILES[runtime]), kit)
    code, told = finish(start(kit, runtime, tmp_path / "site", *FEW))
    assert code == 0, told
    assert f"{len(manifest.models) - 1} of {len(manifest.models) - 1} networks" in told
    check(import_results(kit / RESULTS, kit, tiny.model(), INPUTS), runtime, tiny.model())


def test_executorch_programs_are_timed_with_its_python_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("executorch", reason="executorch is not installed: pip install 'espalier[executorch]'")
    monkeypatch.setattr("tools.kit._NETWORKS", 10)  # each takes seconds to lower
    kit = tmp_path / "kit"
    write_kit(small(), INPUTS, load("x86_64_v3.xnnpack.fp32"), kit)
    done = subprocess.run([sys.executable, "-I", kit / RUNNER, *FEW], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(import_results(kit / RESULTS, kit, small(), INPUTS), "executorch", small())


def test_a_killed_run_goes_on(kit: Path, tmp_path: Path) -> None:
    process = start(kit, "onnxruntime", tmp_path / "site", "--seconds", "0.2", "--together", "3")
    for _ in range(600):
        if (kit / RESULTS).exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = json.loads((kit / RESULTS).read_text())["measured"]
    total = len(json.loads((kit / MANIFEST).read_text())["models"]) - 1
    assert 0 < len(before) < total
    with pytest.raises(PlanError, match=rf"lacks {total - len(before)} of {total} networks.*goes on"):
        import_results(kit / RESULTS, kit, tiny.model(), INPUTS)
    code, told = finish(start(kit, "onnxruntime", tmp_path / "site", *FEW))
    assert code == 0, told
    after = json.loads((kit / RESULTS).read_text())["measured"]
    assert after[: len(before)] == before
    assert len({each["file"] for each in after}) == len(after) == total


def test_results_of_another_device_or_kit_are_begun_anew(kit: Path, tmp_path: Path) -> None:
    assert finish(start(kit, "onnxruntime", tmp_path / "site", *FEW))[0] == 0
    results = json.loads((kit / RESULTS).read_text())
    (kit / RESULTS).write_text(json.dumps({**results, "device_model": "a board"}))
    code, told = finish(start(kit, "onnxruntime", tmp_path / "site", *FEW))
    assert code == 0
    assert "another device_model" in told
    assert json.loads((kit / RESULTS).read_text())["device_model"] == kit_runner.device_model()


def test_changed_files_are_refused(kit: Path, tmp_path: Path) -> None:
    file = kit / "models" / "003.onnx"
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    code, told = finish(start(kit, "onnxruntime", tmp_path / "site", *FEW))
    assert code == 2
    assert "models/003.onnx" in told
    assert "Traceback" not in told
    file.unlink()
    assert "missing" in finish(start(kit, "onnxruntime", tmp_path / "site", *FEW))[1]
    file.write_bytes(good)
    assert finish(start(kit, "onnxruntime", tmp_path / "site", *FEW))[0] == 0
    file.write_bytes(good + b"x")
    with pytest.raises(PlanError, match=r"003.onnx is missing or was changed"):
        import_results(kit / RESULTS, kit, tiny.model(), INPUTS)
    file.write_bytes(good)
    with pytest.raises(PlanError, match="another model"):
        import_results(kit / RESULTS, kit, tiny.other(), INPUTS)
    with pytest.raises(PlanError, match="another model or input shape"):
        import_results(kit / RESULTS, kit, tiny.model(), (torch.zeros(2, 1, 8, 8),))
    manifest = (kit / MANIFEST).read_text()
    (kit / MANIFEST).write_text(manifest.replace('"threads": 1', '"threads": 2'))
    with pytest.raises(PlanError, match="another kit"):
        import_results(kit / RESULTS, kit, tiny.model(), INPUTS)
    (kit / RESULTS).write_text("{")
    with pytest.raises(PlanError, match=r"results\.json"):
        import_results(kit / RESULTS, kit, tiny.model(), INPUTS)


def test_a_missing_runtime_is_told_with_the_way_around(kit: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-I", "-S", kit / RUNNER], capture_output=True, text=True)
    assert done.returncode == 2
    assert "No module named 'onnxruntime'" in done.stderr
    assert "--commands" in done.stderr


# Real lines of each tool, with another latency.
PRINTED = {
    "trtexec": "[10/31/2023-15:06:14] [I] H2D Latency: min = 0 ms, max = 0 ms, mean = 0 ms, median = 0 ms\n"
    "[10/31/2023-15:06:14] [I] GPU Compute Time: min = 0.118 ms, max = 0.18 ms, mean = 0.12 ms, median = {ms} ms, "
    "percentile(90%) = 0.12 ms\n[10/31/2023-15:06:14] [I] D2H Latency: min = 0 ms, median = 0 ms",
    "benchmark_app": "[ INFO ] Latency:\n[ INFO ]    Median:        {us} us\n[ INFO ]    Average:       30.02 us",
    "executor_runner": "I 00:00:00.036 executorch:executor_runner.cpp:446] Model executed successfully 10 time(s) in "
    "{ten} ms.",
}


def with_tool(folder: Path, name: str, ms: float) -> dict[str, str]:
    """Return an environment in which the tool prints what the real one does; it fails for a file that is not there."""
    words = PRINTED[name].format(ms=ms, us=ms * 1e3, ten=ms * 10)
    folder.mkdir(exist_ok=True)
    file = folder / name
    script = 'for word in "$@"; do case $word in --saveEngine=*) touch "${word#*=}"; exit 0;; esac; done\n'
    script += 'for word in "$@"; do case $word in *models/*) test -f "${word#*=}" || exit 1;; esac; done\n'
    file.write_text(f"#!/bin/sh\n{script}cat << 'END'\n{words}\nEND\n")
    file.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("profile", "tool"), [("nvidia-ampere.tensorrt.fp16", "trtexec"), ("x86_64_v3.openvino.fp32", "benchmark_app")]
)
def test_the_tool_of_a_runtime_does_without_python(profile: str, tool: str, tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    manifest = write_kit(tiny.model(), INPUTS, load(profile), kit)

    def run(*arguments: str) -> str:
        command = [sys.executable, "-I", "-S", kit / RUNNER, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    (kit / "run.sh").write_text(run("--commands"))
    environment = with_tool(tmp_path / "bin", tool, 0.25)
    log = subprocess.run(["sh", kit / "run.sh"], capture_output=True, text=True, env=environment, check=True).stdout
    others = len(manifest.models) - 1
    assert len(re.findall(r"^== espalier \d", log, re.M)) == 7 * (others + -(-others // 12))  # the dense one per batch
    (tmp_path / "half.txt").write_text(log[: int(len(log) * 0.7)].rpartition("== espalier")[0])
    run("--parse", str(tmp_path / "half.txt"), "--runtime-version", "10.7.0")
    before = json.loads((kit / RESULTS).read_text())["measured"]
    assert 0 < len(before) < others
    assert len(before) % 12 == 0  # whole batches
    assert run("--commands").count("echo") < (kit / "run.sh").read_text().count("echo")  # what is left
    (kit / RESULTS).unlink()
    (tmp_path / "log.txt").write_text(log)
    run("--parse", str(tmp_path / "log.txt"), "--runtime-version", "10.7.0")
    results = json.loads((kit / RESULTS).read_text())
    assert len(results["measured"]) == others
    assert all(each["latency_s"] == pytest.approx(0.25e-3) for each in results["measured"])
    assert results["platform"].startswith(os.uname().sysname)
    table = import_results(kit / RESULTS, kit, tiny.model(), INPUTS)
    assert (table.runtime_version, table.method) == ("10.7.0", "kit, tool")


def test_executor_runner_is_called_and_read(tmp_path: Path) -> None:
    _, tool = _way(load("x86_64_v4.xnnpack.fp32"), "fp32", 2)
    assert tool is not None
    assert tool.time[1:] == ("--model_path={file}", "--num_executions={runs}", "--cpu_threads=2")
    found = re.search(tool.latency, PRINTED["executor_runner"].format(ten=2.5))
    assert found is not None
    assert found.groupdict() == {"runs": "10", "value": "2.5", "unit": "ms"}


def test_trtexec_gets_the_flags_of_the_profile() -> None:
    _, dla = _way(load("jetson-agx-orin-64gb.tensorrt-dla.int8"), "int8", 1)
    assert dla is not None
    assert {"--int8", "--useDLACore=0", "--allowGPUFallback"} <= set(dla.prepare)
    assert "--useCudaGraph" not in dla.time


def test_what_has_no_kit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="no kit for pytorch"):
        write_kit(tiny.model(), INPUTS, load("x86_64_v4.pytorch.fp32"), tmp_path)
    with pytest.raises(BackendUnavailable, match="no operating system"):
        write_kit(tiny.model(), INPUTS, load("ethos-u55-128.vela.int8"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_runner_runs_on_old_pythons_and_imports_the_standard_library_only(written: Path) -> None:
    import ast

    text = (written / RUNNER).read_text()
    tree = ast.parse(text, feature_version=(3, 8))
    top = {
        name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert {name.partition(".")[0] for name in top} <= set(sys.stdlib_module_names)
    # What 3.8 lacks though it can read it.
    assert not re.search(r"zip\([^)]*strict|removeprefix|removesuffix|\bmatch \w+:", text)


def test_settings_are_those_of_the_backend() -> None:
    import openvino

    from backends import openvino as backend

    options = backend.options_for(load("x86_64_v4.openvino.fp32"), "fp32")
    settings, _ = _openvino(options, 3)
    expected = backend.properties_for(options, 3)
    assert set(settings["properties"]) == {str(key) for key in expected}
    compiled = [
        openvino.Core().compile_model(_relu(), "CPU", properties) for properties in (settings["properties"], expected)
    ]
    for key in settings["properties"]:
        assert compiled[0].get_property(key) == compiled[1].get_property(key), key


def _relu() -> object:
    from openvino import Model, opset13

    parameter = opset13.parameter([1, 4])
    return Model([opset13.relu(parameter)], [parameter])


def test_a_kit_knows_its_inputs(written: Path) -> None:
    (x,) = inputs_of(written)
    assert (tuple(x.shape), x.dtype) == ((1, 1, 8, 8), torch.float32)
    with pytest.raises(PlanError, match="folder of a kit"):
        inputs_of(written / "models")


def test_manifest_is_strict(written: Path) -> None:
    content = json.loads((written / MANIFEST).read_text())
    assert Manifest.model_validate_json(json.dumps(content)).profile == PROFILES["onnxruntime"]
    with pytest.raises(ValueError, match="surprise"):
        Manifest.model_validate_json(json.dumps({**content, "surprise": 1}))
