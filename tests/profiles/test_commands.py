"""The commands about profiles: what they print for people and for machines, and how they exit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from profiles import ProfileError, load, names
from tools import profiles_cli

Write = Callable[..., Path]
V4 = "x86_64_v4.onnxruntime.fp32"
MACHINES = Path(__file__).parent / "machines"
NARROW = {"COLUMNS": "160", "TERM": "dumb"}

app = typer.Typer(rich_markup_mode=None)
app.add_typer(profiles_cli.app, name="profiles")
app.command()(profiles_cli.detect)


def run(*arguments: object, code: int = 0) -> str:
    result = _run(*arguments)
    assert result.exit_code == code, result.output
    return result.stdout


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=NARROW)


def json_of(*arguments: object, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code))


def test_profiles_alone_lists_them() -> None:
    assert run("profiles") == run("profiles", "list")
    rows = json_of("profiles", "list")
    assert rows == json_of("profiles")
    assert [row["id"] for row in rows] == list(names())
    (row,) = (row for row in rows if row["id"] == V4)
    assert row == {
        "id": V4,
        "device": "any x86_64_v4",
        "runtime": "onnxruntime",
        "dtype": "fp32",
        "quantum": 16,
        "status": "confirmed",
    }


def test_the_markdown_table_holds_every_profile() -> None:
    table = run("profiles", "list", "--markdown")
    assert table.startswith("| vendor | parts |\n|---|---|\n")
    assert "| any CPU | `aarch64` (onnxruntime fp32, xnnpack fp32" in table
    for profile_id in names():
        part, library, dtype = profile_id.split(".")
        assert f"`{part}` (" in table
        assert f"{library} {dtype}" in table


def test_a_broken_file_does_not_hide_the_others(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write("anvil.onnxruntime.int8", whole="schema = = 1")
    assert V4 in run("profiles", "list")
    assert f"{path}: file: cannot be read as TOML" in caplog.text


@pytest.mark.parametrize("profile_id", names())
def test_every_card_holds_all_sources(profile_id: str) -> None:
    card = run("profiles", "show", profile_id)
    profile = load(profile_id)
    flat = " ".join(card.split())
    assert card.startswith(profile_id)
    for number, source in enumerate(profile.source, 1):
        assert f"[{number}] {source.place}" in flat
    assert card.count("read on ") == len(profile.source)
    assert json_of("profiles", "show", profile_id)["id"] == profile_id


def test_show_takes_the_path_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "anvil.onnxruntime.fp32.toml"
    path.write_text(f'schema = 1\nid = "anvil.onnxruntime.fp32"\nextends = ["{V4}"]\n')
    assert run("profiles", "show", path).startswith("anvil.onnxruntime.fp32")


def test_compare_marks_the_differences() -> None:
    shown = run("profiles", "compare", V4, "x86_64_v3.onnxruntime.fp32").splitlines()
    (width,) = (line for line in shown if "width conv2d out_channels" in line)
    assert "≠" in width
    assert "16 pad" in width
    assert " 8 pad" in width
    (runtime,) = (line for line in shown if " runtime " in line)
    assert "≠" not in runtime
    content = json_of("profiles", "compare", V4, "x86_64_v3.onnxruntime.fp32", "ethos-u85-256.vela.int8")
    assert content["profiles"][2] == "ethos-u85-256.vela.int8"
    assert all(len(row["values"]) == 3 for row in content["rows"])
    assert {row["differs"] for row in content["rows"]} == {True, False}


def test_lint_is_silent_about_clean_files_and_says_no_to_others(write: Write) -> None:
    assert run("profiles", "lint") == ""
    assert json_of("profiles", "lint") == []
    path = write("anvil.onnxruntime.int8", '[[granularity]]\nop = "conv2d"\n')
    lines = run("profiles", "lint", path, code=1).splitlines()
    assert all(line.startswith(f"{path}: granularity[0].") for line in lines)
    assert [set(finding) for finding in json_of("profiles", "lint", path, code=1)] == [
        {"file", "field", "what", "remedy"}
    ] * len(lines)


def test_detect_ranks_and_explains() -> None:
    found = json_of("detect", "--machine", MACHINES / "raspberry-pi-5.json")
    assert found[0]["id"] == "aarch64.xnnpack.fp32"
    assert found[0]["why"].startswith("aarch64.xnnpack.fp32 fits this machine: wants a CPU that is aarch64")
    reason = json_of("detect", "--machine", MACHINES / "raspberry-pi-5.json", "--why-not", V4)
    assert reason["profile"] == V4
    assert "neoverse_n1 is not" in reason["why_not"]
    assert "neoverse_n1 is not" in run("detect", "--machine", MACHINES / "raspberry-pi-5.json", "--why-not", V4)


def test_detect_is_a_command_of_profiles_too() -> None:
    machine = ("--machine", MACHINES / "box-a100.json")
    assert run("profiles", "detect", *machine) == run("detect", *machine)


def test_no_fitting_profile_is_the_answer_no() -> None:
    result = _run("detect", "--machine", MACHINES / "server-without-runtimes.json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no profile fits this machine (skylake_avx512)" in result.stderr
    assert "one step away: wants onnxruntime >=1.20, found none: pip install 'espalier[onnxruntime]'" in result.stderr
    assert json_of("detect", "--machine", MACHINES / "server-without-runtimes.json", code=1) == []


def test_a_machine_is_recorded_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(run("profiles", "machine"))
    assert json_of("detect", "--machine", path) == json_of("detect")


WRONG = {
    "an unknown profile": (["profiles", "show", "x86_64_v4.onnxruntim.fp32"], f"did you mean {V4}"),
    "an unknown profile to compare": (["profiles", "compare", V4, "nothing"], "unknown profile 'nothing'"),
    "a file that is not there": (["profiles", "lint", "none.toml"], "none.toml: no such profile file"),
    "a recording that is none": (["detect", "--machine", __file__], "write one with `espalier profiles machine`"),
    "a recording that is not there": (["detect", "--machine", "none.json"], "none.json: is no recorded machine"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_error_with_the_remedy(case: str) -> None:
    arguments, told = WRONG[case]
    result = _run(*arguments)
    assert isinstance(result.exception, ProfileError)
    assert told in str(result.exception)


def test_one_profile_is_not_compared() -> None:
    assert _run("profiles", "compare", V4).exit_code == 2
