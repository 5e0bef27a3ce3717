"""Profiles are found by id in three places, extend each other, and say plainly what is wrong with them."""

import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import platformdirs
import pytest

from profiles import ProfileError, load, names, registry

Write = Callable[..., Path]

RULE = """
[[granularity]]
op = "conv2d"
axis = "out_channels"
quantum = {quantum}
mode = "pad"
confidence = "source"
sources = ["{source}"]
"""
SOURCE = """
[[source]]
id = "{id}"
url = "https://example.org/{id}"
quote = "as many as it says"
retrieved = 2026-11-20
"""
KNOWN = RULE.format(quantum=8, source="manual") + SOURCE.format(id="manual")
PARENT = 'schema = 1\nid = "acme.base"\nabstract = true\n'


def child(profile_id: str, *parents: str) -> str:
    return f'schema = 1\nid = "{profile_id}"\nextends = {list(parents)}\n'


def test_one_file_in_a_named_folder_is_a_new_device(write: Write) -> None:
    write("anvil.onnxruntime.int8", KNOWN)
    assert "anvil.onnxruntime.int8" in names()
    assert load("anvil.onnxruntime.int8").quantum("conv2d", "out_channels") == 8


def test_one_file_in_the_users_folder_is_a_new_device(write: Write) -> None:
    folder = platformdirs.user_config_path("espalier") / "profiles"
    folder.mkdir(parents=True)
    for profile_id in ("anvil.onnxruntime.int8", "x86_64_v4.openvino.fp32"):
        write(profile_id).rename(folder / f"{profile_id}.toml")
    assert load("anvil.onnxruntime.int8").device.arch == "anvil"
    assert load("x86_64_v4.openvino.fp32").device.arch == "anvil", "the user's own file hides the built-in one"


def test_an_earlier_folder_hides_a_later_one(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", write("x86_64_v4.onnxruntime.fp32", "# mine").parent
    assert load("x86_64_v4.onnxruntime.fp32").device.arch == "anvil", "a named folder hides the built-in profile"
    first.mkdir()
    (first / "x86_64_v4.onnxruntime.fp32.toml").write_text(
        write("x86_64_v4.onnxruntime.fp32").read_text().replace("anvil", "hammer")
    )
    monkeypatch.setenv("ESPALIER_PROFILES", os.pathsep.join((str(first), str(second), "")))
    assert load("x86_64_v4.onnxruntime.fp32").device.arch == "hammer"


def test_a_named_folder_that_is_missing_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_PROFILES", "/no/such/folder")
    with pytest.raises(ProfileError, match="ESPALIER_PROFILES names '/no/such/folder', which is no folder"):
        names()


def test_unknown_id_offers_near_names() -> None:
    with pytest.raises(ProfileError) as caught:
        load("x86_v4.ort")
    assert str(caught.value).startswith("unknown profile 'x86_v4.ort'; did you mean x86_64_v4.")
    assert str(caught.value).endswith("; `espalier profiles list` shows all")


def test_unknown_id_far_from_all_offers_none() -> None:
    with pytest.raises(ProfileError, match=r"^unknown profile 'q'; `espalier profiles list` shows all$"):
        load("q")


def test_file_anywhere_may_extend_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "acme.base.toml").write_text(PARENT + '[device]\nvendor = "acme"\nkind = "npu"\narch = "anvil"\n')
    path = tmp_path / "anvil.onnxruntime.int8.toml"
    path.write_text(
        child("anvil.onnxruntime.int8", "acme.base")
        + '[runtime]\nname = "onnxruntime"\n[dtype]\nweights = "int8"\nactivations = "int8"\n'
    )
    assert registry.load_file(path).device.vendor == "acme"
    assert "anvil.onnxruntime.int8" not in names()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.toml: no such profile file"):
        registry.load_file(tmp_path / "none.toml")


def test_child_replaces_entries_with_the_same_key_and_keeps_the_rest(write: Write) -> None:
    other = RULE.format(quantum=4, source="rumour").replace("out_channels", "in_channels")
    write("anvil.onnxruntime.int8", KNOWN + other + SOURCE.format(id="rumour"))
    own = RULE.format(quantum=32, source="sheet") + SOURCE.format(id="sheet")
    write("hammer.onnxruntime.int8", whole=child("hammer.onnxruntime.int8", "anvil.onnxruntime.int8") + own)
    profile = load("hammer.onnxruntime.int8")
    assert profile.quantum("conv2d", "out_channels") == 32
    assert profile.quantum("conv2d", "in_channels") == 4
    assert {source.id for source in profile.source} == {"sheet", "rumour"}, "the replaced rule's source goes with it"
    assert profile.extends == ("anvil.onnxruntime.int8",)


def test_tables_are_merged_and_later_parents_win(write: Write) -> None:
    write("one.base", whole=PARENT.replace("acme", "one") + '[device]\nvendor = "one"\nkind = "npu"\n')
    write("two.base", whole=PARENT.replace("acme", "two") + '[device]\nvendor = "two"\n')
    extra = '[device]\narch = "anvil"\n[runtime]\nname = "openvino"\n[dtype]\nweights = "fp16"\nactivations = "fp16"\n'
    write("anvil.openvino.fp16", whole=child("anvil.openvino.fp16", "one.base", "two.base") + extra)
    device = load("anvil.openvino.fp16").device
    assert (device.vendor, device.kind, device.arch) == ("two", "npu", "anvil")


def test_a_childs_peak_replaces_the_whole_peak(write: Write) -> None:
    peak = '[peak]\nops_per_s = {{ {name} = 1e12 }}\nconfidence = "source"\nsources = ["{source}"]\n'
    write("anvil.onnxruntime.int8", peak.format(name="int8_dense", source="a") + SOURCE.format(id="a"))
    own = peak.format(name="int8_sparse", source="b") + SOURCE.format(id="b")
    write("hammer.onnxruntime.int8", whole=child("hammer.onnxruntime.int8", "anvil.onnxruntime.int8") + own)
    found = load("hammer.onnxruntime.int8").peak
    assert found is not None
    assert (set(found.ops_per_s), found.sources) == ({"int8_sparse"}, ("b",)), "no number under another's source"


def test_doubt_is_inherited_and_remarks_are_not(write: Write) -> None:
    text = write("anvil.onnxruntime.int8").read_text()
    write("anvil.onnxruntime.int8", whole='status = "experimental"\nnote = "of the anvil"\n' + text)
    write("hammer.onnxruntime.int8", whole=child("hammer.onnxruntime.int8", "anvil.onnxruntime.int8"))
    profile = load("hammer.onnxruntime.int8")
    assert (profile.status, profile.note) == ("experimental", None)


def test_abstract_file_is_not_a_profile(write: Write) -> None:
    write("acme.base", whole=PARENT)
    assert "acme.base" not in names()
    with pytest.raises(ProfileError, match="is abstract, only there to be extended"):
        load("acme.base")


def test_circle_of_extends_is_drawn(write: Write) -> None:
    write("one.base", whole=PARENT.replace("acme", "one") + 'extends = ["two.base"]\n')
    write("two.base", whole=PARENT.replace("acme", "two") + 'extends = ["one.base"]\n')
    write("anvil.openvino.fp16", whole=child("anvil.openvino.fp16", "one.base"))
    with pytest.raises(ProfileError, match=r"circle: anvil\.openvino\.fp16 -> one\.base -> two\.base -> one\.base"):
        load("anvil.openvino.fp16")


def test_diamond_of_extends_is_no_circle(write: Write) -> None:
    write("acme.base", whole=PARENT + KNOWN)
    for side in ("left", "right"):
        write(f"{side}.base", whole=PARENT.replace("acme", side) + 'extends = ["acme.base"]\n')
    write("anvil.onnxruntime.int8")
    parents = ("anvil.onnxruntime.int8", "left.base", "right.base")
    write("hammer.onnxruntime.int8", whole=child("hammer.onnxruntime.int8", *parents))
    assert load("hammer.onnxruntime.int8").quantum("conv2d", "out_channels") == 8


WRONG = [
    ("not TOML", "schema = = 1", r"cannot be read as TOML: Invalid value \(at line 1"),
    ("another id", 'id = "hammer.onnxruntime.int8"', "id: is 'hammer.onnxruntime.int8', but the file is named 'anvil"),
    ("extends a word", 'id = "anvil.onnxruntime.int8"\nextends = "dense.base"', "extends: must be a list of"),
    ("extends nothing", child("anvil.onnxruntime.int8", "dens.base"), "unknown profile 'dens.base'; did you mean d"),
    ("abstract by word", 'id = "anvil.onnxruntime.int8"\nabstract = "yes"', "abstract: must be true or false"),
]


@pytest.mark.parametrize(("text", "reason"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_unreadable_file_is_named_with_the_reason(write: Write, text: str, reason: str) -> None:
    path = write("anvil.onnxruntime.int8", whole=text)
    assert "anvil.onnxruntime.int8" in names(), "hiding it would hide the mistake"
    with pytest.raises(ProfileError, match=reason) as caught:
        load("anvil.onnxruntime.int8")
    assert str(path) in str(caught.value)


PROBLEMS = [
    ("unknown key", KNOWN + RULE.format(quantum=8, source="manual").replace("quantum", "quantun"), "'quantum'"),
    ("value out of range", KNOWN.replace("quantum = 8", "quantum = 0"), "granularity[0].quantum: input should be"),
    ("the value", KNOWN.replace("quantum = 8", "quantum = -7"), ", not -7"),
    ("missing key", KNOWN.replace('mode = "pad"', ""), "granularity[0].mode: is missing"),
    ("rule of several keys", KNOWN.replace('"pad"', '"cliff"'), "granularity[0]: a cliff needs `fallback`"),
    ("undefined source", RULE.format(quantum=8, source="manual"), "profile: cites undefined sources manual"),
    ("own source unused", SOURCE.format(id="manual"), "defines sources that nothing cites: manual"),
    ("one table for an array", "[granularity]\nquantum = 8\n", "granularity: "),
]


@pytest.mark.parametrize(("extra", "reason"), [case[1:] for case in PROBLEMS], ids=[case[0] for case in PROBLEMS])
def test_each_problem_is_one_readable_line(write: Write, extra: str, reason: str) -> None:
    path = write("anvil.onnxruntime.int8", extra)
    with pytest.raises(ProfileError) as caught:
        load("anvil.onnxruntime.int8")
    text = str(caught.value)
    assert reason in text
    assert all(line.startswith(f"{path}: ") for line in text.splitlines())
    assert "pydantic" not in text


def test_two_problems_are_two_lines(write: Write) -> None:
    write("anvil.onnxruntime.int8", KNOWN.replace("quantum = 8", "quantum = 0").replace('"pad"', '"padded"'))
    with pytest.raises(ProfileError) as caught:
        load("anvil.onnxruntime.int8")
    assert len(str(caught.value).splitlines()) == 2


def test_committed_json_schema_is_the_generated_one() -> None:
    committed = files("profiles").joinpath("schema.json").read_text(encoding="utf-8")
    assert committed == registry.json_schema(), (
        "write it anew: from profiles import atomic, registry;"
        " atomic.write_text('profiles/schema.json', registry.json_schema())"
    )
