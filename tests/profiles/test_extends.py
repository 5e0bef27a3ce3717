"""What `extends` does, against a second and slower way to say it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from profiles.registry import Library

AXES = ("out_channels", "in_channels")
SHOWN = {"id", "extends", "note", "abstract"}

rules = st.dictionaries(st.tuples(st.sampled_from(("conv2d", "linear")), st.sampled_from(AXES)), st.integers(1, 64))
tables = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(("experimental", "fitted-elsewhere")),
        "note": st.just("a remark"),
        "device": st.dictionaries(st.sampled_from(("vendor", "arch")), st.sampled_from(("a", "b")), min_size=1),
        "peak": st.dictionaries(st.sampled_from(("int8_dense", "fp16_dense")), st.integers(1, 9), min_size=1),
        "granularity": rules,
    },
)


@st.composite
def families(draw: st.DrawFn) -> list[tuple[list[int], dict[str, Any]]]:
    """Draw files, each with parents among the earlier ones: a graph without circles."""
    files: list[tuple[list[int], dict[str, Any]]] = []
    for number in range(draw(st.integers(1, 5))):
        parents = draw(st.lists(st.integers(0, number - 1), max_size=3, unique=True)) if number else []
        files.append((parents, draw(tables)))
    return files


def expected(number: int, files: list[tuple[list[int], dict[str, Any]]]) -> dict[str, Any]:
    """Say what a file states: its parents one after the other, then itself; keyed, so that later ones overwrite."""
    parents, own = files[number]
    merged: dict[str, Any] = {}
    layers = [{k: v for k, v in expected(p, files).items() if k not in SHOWN} for p in parents]
    for layer in [*layers, own]:
        for key, value in layer.items():
            # keyed tables are merged, and the peak is taken whole
            merged[key] = {**merged.get(key, {}), **value} if key in ("device", "granularity") else value
    return merged


def written(number: int, parents: list[int], own: Mapping[str, Any]) -> str:
    """Return a file as TOML."""
    lines = ["schema = 1", f'id = "f{number}.base"', "abstract = true", f"extends = {[f'f{p}.base' for p in parents]}"]
    lines += [f'{key} = "{own[key]}"' for key in ("status", "note") if key in own]
    if "device" in own:
        lines += ["[device]", *(f'{key} = "{value}"' for key, value in own["device"].items())]
    if "peak" in own:
        lines += ["[peak]", *(f"{key} = {value}" for key, value in own["peak"].items())]
    for (op, axis), quantum in own.get("granularity", {}).items():
        lines += ["[[granularity]]", f'op = "{op}"', f'axis = "{axis}"', f"quantum = {quantum}"]
    return "\n".join(lines) + "\n"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=families())
def test_extends_is_its_parents_in_order_and_then_itself(
    files: list[tuple[list[int], dict[str, Any]]], tmp_path: Path
) -> None:
    for number, (parents, own) in enumerate(files):
        (tmp_path / f"f{number}.base.toml").write_text(written(number, parents, own))
    library = Library({f"f{n}.base": tmp_path / f"f{n}.base.toml" for n in range(len(files))})
    for number in range(len(files)):
        found = dict(library.resolved(f"f{number}.base"))
        found["granularity"] = {(r["op"], r["axis"]): r["quantum"] for r in found.get("granularity", [])}
        wanted = {"granularity": {}} | expected(number, files)
        assert {key: value for key, value in found.items() if key not in SHOWN | {"schema"}} == {
            key: value for key, value in wanted.items() if key not in SHOWN
        }
        assert found["id"] == f"f{number}.base", "the id is the file's own"
        assert ("note" in found) == ("note" in files[number][1]), "remarks are not inherited"


def test_a_file_is_read_once_however_many_extend_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Path.read_text

    def counted(self: Path, *args: Any, **kwargs: Any) -> str:
        read.append(self.name)
        return original(self, *args, **kwargs)

    (tmp_path / "a.base.toml").write_text('schema = 1\nid = "a.base"\nabstract = true\n')
    for name in "bcd":
        text = f'schema = 1\nid = "{name}.base"\nabstract = true\nextends = ["a.base"]\n'
        (tmp_path / f"{name}.base.toml").write_text(text)
    library = Library({f"{name}.base": tmp_path / f"{name}.base.toml" for name in "abcd"})
    monkeypatch.setattr(Path, "read_text", counted)
    for name in "bcdb":
        library.resolved(f"{name}.base")
    assert sorted(read) == [f"{name}.base.toml" for name in "abcd"]
