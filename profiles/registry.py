"""Profiles by id: built-in files, the user's folder, the folders in ESPALIER_PROFILES, and `extends` between them."""

import difflib
import importlib.resources
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeGuard

import platformdirs
from pydantic import ValidationError

from profiles.errors import ProfileError
from profiles.schema import Profile

FOLDERS_VARIABLE = "ESPALIER_PROFILES"

_Table = dict[str, Any]
_KEYS = {  # what makes two entries of an array the same, so that a child's replaces its parent's
    "granularity": ("op", "axis", "when"),
    "structure": ("kind", "pattern"),
    "memory": ("name",),
    "source": ("id",),
}
_WHOLE = ("peak",)  # cited as a whole: merging it would put a child's source under a parent's number
_NOT_INHERITED = ("id", "extends", "note")  # nor is `abstract`, which is dropped after reading


def names() -> tuple[str, ...]:
    """Return the ids of all profiles that can be loaded, sorted; abstract files are left out."""
    return tuple(sorted(name for name, file in _files().items() if not _is_abstract(file)))


def load(profile_id: str) -> Profile:
    """Return the profile of this id, or raise `ProfileError` with the nearest ids."""
    files = _files()
    if profile_id not in files:
        raise ProfileError(f"unknown profile {profile_id!r}{_near(profile_id)}; `espalier profiles list` shows all")
    return _load(files[profile_id], files)


def load_file(path: Path | str) -> Profile:
    """Return the profile of a file anywhere; it may extend profiles of its own folder too."""
    file = Path(path)
    if not file.is_file():
        raise ProfileError(f"{file}: no such profile file; `espalier profiles list` shows the known profiles")
    return _load(file, _files() | _files_in(file.parent))


def json_schema() -> str:
    """Return the JSON Schema of a profile after `extends`, as text; the committed schema.json is this."""
    return json.dumps(Profile.model_json_schema(), indent=2) + "\n"


def _folders() -> Iterator[Traversable]:
    """Yield the folders from the last to the first looked up."""
    yield importlib.resources.files("profiles") / "data"
    yield platformdirs.user_config_path("espalier") / "profiles"
    for text in reversed(os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)):
        if text and not Path(text).is_dir():
            raise ProfileError(f"{FOLDERS_VARIABLE} names {text!r}, which is no folder; create it or correct the path")
        if text:
            yield Path(text)


def _files() -> dict[str, Traversable]:
    found: dict[str, Traversable] = {}
    for folder in _folders():
        found |= _files_in(folder)
    return found


def _files_in(folder: Traversable) -> dict[str, Traversable]:
    if not folder.is_dir():
        return {}
    return {file.name.removesuffix(".toml"): file for file in folder.iterdir() if file.name.endswith(".toml")}


def _near(profile_id: str) -> str:
    known = names()
    near = difflib.get_close_matches(profile_id, known, cutoff=0.5)
    if not near:  # perhaps the device alone was named
        devices = difflib.get_close_matches(profile_id, {name.partition(".")[0] for name in known}, cutoff=0.5)
        near = [name for device in devices for name in known if name.partition(".")[0] == device][:3]
    return f"; did you mean {', '.join(near)}?" if near else ""


def _is_abstract(file: Traversable) -> bool:
    try:
        return _read(file).get("abstract") is True
    except ProfileError:
        return False  # listed, so that whoever loads it learns what is wrong with it


def _read(file: Traversable) -> _Table:
    """Return the tables of one file; the keys that steer reading are checked here, all others by the schema."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"{file}: cannot be read as TOML: {error}") from error
    name = file.name.removesuffix(".toml")
    if table.get("id") != name:
        raise ProfileError(f"{file}: id: is {table.get('id')!r}, but the file is named {name!r}; make them equal")
    if not isinstance(table.get("abstract", False), bool):
        raise ProfileError(f"{file}: abstract: must be true or false, not {table['abstract']!r}")
    parents = table.get("extends", [])
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ProfileError(f"{file}: extends: must be a list of profile ids, not {parents!r}")
    return table


def _load(file: Traversable, files: Mapping[str, Traversable]) -> Profile:
    own = _read(file)
    if own.get("abstract"):
        raise ProfileError(f"{file}: is abstract, only there to be extended; `espalier profiles list` shows the others")
    table = _resolve(file, files, ())
    table.pop("abstract", None)
    _drop_uncited(table, keep=own)
    try:
        return Profile.model_validate(table)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        raise ProfileError("\n".join(f"{file}: {_explain(dict(problem))}" for problem in problems)) from None


def _resolve(file: Traversable, files: Mapping[str, Traversable], children: tuple[str, ...]) -> _Table:
    """Return the tables of a file over those of its parents, later parents over earlier ones."""
    own = _read(file)
    chain = (*children, str(own["id"]))
    merged: _Table = {}
    for parent in own.get("extends", []):
        if parent in chain:
            raise ProfileError(f"{file}: extends: goes in a circle: {' -> '.join((*chain, parent))}; remove one")
        if parent not in files:
            near = difflib.get_close_matches(parent, files, cutoff=0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ProfileError(f"{file}: extends: unknown profile {parent!r}{hint}")
        inherited = _resolve(files[parent], files, chain)
        merged = _merge(merged, {key: value for key, value in inherited.items() if key not in _NOT_INHERITED})
    return _merge(merged, own)


def _merge(parent: _Table, child: _Table) -> _Table:
    """Merge tables deeply; in the arrays of `_KEYS` a child's entry replaces the parent's with the same key."""
    merged = dict(parent)
    for name, value in child.items():
        before = parent.get(name)
        if name in _KEYS and _is_array(value) and _is_array(before):
            own = [_key(name, entry) for entry in value]
            merged[name] = [entry for entry in before if _key(name, entry) not in own] + value
        elif name not in _WHOLE and isinstance(value, dict) and isinstance(before, dict):
            merged[name] = _merge(before, value)
        else:
            merged[name] = value
    return merged


def _key(array: str, entry: _Table) -> list[object]:
    return [entry.get(part) for part in _KEYS[array]]


def _is_array(value: object) -> TypeGuard[list[_Table]]:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _drop_uncited(table: _Table, *, keep: _Table) -> None:
    """Drop the inherited sources whose statements were all replaced; a file must cite what it defines itself."""
    sources, own = table.get("source"), keep.get("source")
    if _is_array(sources):
        needed = list(_cited(table)) + [source.get("id") for source in (own if _is_array(own) else [])]
        table["source"] = [source for source in sources if source.get("id") in needed]


def _cited(value: object) -> Iterator[object]:
    """Yield the source ids that any statement below cites."""
    if isinstance(value, dict):
        ids = value.get("sources")
        yield from ids if isinstance(ids, list) else ()
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _cited(inner)


def _explain(problem: Mapping[str, Any]) -> str:
    """Return one line for one finding of pydantic: the field, what is wrong, and the value."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem["loc"])
    field = "".join(steps).lstrip(".") or "profile"
    match problem["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _fields(), n=1)
            return f"{field}: is not a key of a profile{f'; did you mean {near[0]!r}?' if near else ''}"
        case "missing":
            return f"{field}: is missing"
        case "value_error":
            return f"{field}: {problem['msg'].removeprefix('Value error, ')}"
        case _:
            message = problem["msg"][:1].lower() + problem["msg"][1:]
            return f"{field}: {message}, not {problem['input']!r}"


def _fields() -> list[str]:
    schema = Profile.model_json_schema()
    return sorted({name for table in (schema, *schema["$defs"].values()) for name in table.get("properties", {})})
