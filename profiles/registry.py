"""Profiles by id: built-in files, the user's folder, the folders in ESPALIER_PROFILES, and `extends` between them.

`extends = ["a", "b"]` starts from the tables of a, lays those of b over them, and the file's own over both. Tables are
merged key by key. In arrays an entry replaces the inherited one with the same key (`_KEYS`) and is added otherwise.
The peak is taken whole. The id, `extends`, `note` and `abstract` of a parent are not inherited, nor are sources that
nothing cites any more.
"""

import difflib
import importlib.resources
import json
import logging
import os
import tomllib
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Self, TypeGuard

import platformdirs
from pydantic import ValidationError

from profiles.errors import ProfileError
from profiles.findings import Finding, of_validation
from profiles.schema import Profile

logger = logging.getLogger(__name__)

FOLDERS_VARIABLE = "ESPALIER_PROFILES"

_Table = dict[str, Any]
_KEYS = {  # what makes two entries of an array the same, so that a child's replaces its parent's
    "granularity": ("op", "axis", "when"),
    "structure": ("kind", "pattern"),
    "memory": ("name",),
    "overhead": ("per", "condition"),
    "source": ("id",),
}
_WHOLE = ("peak",)  # cited as a whole: merging it would put a child's source under a parent's number
_NOT_INHERITED = ("id", "extends", "note", "abstract")


class Library:
    """The profile files that can be seen at one moment; each is read at most once."""

    def __init__(self, files: Mapping[str, Traversable]) -> None:
        """Take the files by the id that their name says."""
        self.files = dict(files)
        self._read: dict[str, _Table] = {}
        self._resolved: dict[str, _Table] = {}

    @classmethod
    def here(cls) -> Self:
        """Return the built-in files, the user's, and those of ESPALIER_PROFILES."""
        found: dict[str, Traversable] = {}
        for folder in _folders():
            found |= _files_in(folder)
        return cls(found)

    def beside(self, path: Path) -> "Library":
        """Return a library in which this file and those of its folder hide the others."""
        return Library(self.files | _files_in(path.parent) | {_id_of(path): path})

    def names(self) -> tuple[str, ...]:
        """Return the ids of all profiles that can be loaded, sorted; abstract files are left out."""
        return tuple(sorted(name for name in self.files if not self.is_abstract(name)))

    def is_abstract(self, name: str) -> bool:
        """Say whether a file is only there to be extended."""
        try:
            return self.table(name).get("abstract") is True
        except ProfileError:
            return False  # listed, so that whoever loads it learns what is wrong with it

    def load(self, profile_id: str) -> Profile:
        """Return the profile of this id, or raise `ProfileError` with what is wrong or the nearest ids."""
        if profile_id not in self.files:
            raise ProfileError(f"unknown profile {profile_id!r}{self._near(profile_id)}; `{_LIST}` shows all")
        file = str(self.files[profile_id])
        own = self.table(profile_id)
        if own.get("abstract"):
            raise ProfileError(f"{file}: is abstract, only there to be extended; `{_LIST}` shows the others")
        table = {key: value for key, value in self.resolved(profile_id).items() if key != "abstract"}
        _drop_uncited(table, keep=own)
        try:
            return Profile.model_validate(table)
        except ValidationError as error:
            raise ProfileError(*of_validation(file, error)) from None

    def every(self) -> Iterator[Profile]:
        """Yield all profiles by id; a file that cannot be read is named in the log."""
        for profile_id in self.names():
            try:
                yield self.load(profile_id)
            except ProfileError as error:
                logger.warning("skipped a profile that cannot be read: %s", error)

    def table(self, name: str) -> _Table:
        """Return the tables of one file as written; the keys that steer reading are checked here."""
        if name not in self._read:
            self._read[name] = _read(self.files[name])
        return self._read[name]

    def resolved(self, name: str, children: tuple[str, ...] = ()) -> _Table:
        """Return the tables of a file over those of its parents, later parents over earlier ones."""
        if name in self._resolved:
            return self._resolved[name]
        own, chain, merged = self.table(name), (*children, name), _Table()
        for parent in own.get("extends", []):
            file = str(self.files[name])
            if parent in chain:
                circle = " -> ".join((*chain, parent))
                raise ProfileError(Finding(file, "extends", f"goes in a circle: {circle}", "remove one"))
            if parent not in self.files:
                near = difflib.get_close_matches(parent, self.files, cutoff=0.5)
                hint = f"did you mean {', '.join(near)}?" if near else f"`{_LIST}` shows the profiles"
                raise ProfileError(Finding(file, "extends", f"unknown profile {parent!r}", hint))
            inherited = self.resolved(parent, chain)
            merged = _merge(merged, {key: value for key, value in inherited.items() if key not in _NOT_INHERITED})
        self._resolved[name] = _merge(merged, own)
        return self._resolved[name]

    def _near(self, profile_id: str) -> str:
        known = self.names()
        near = difflib.get_close_matches(profile_id, known, cutoff=0.5)
        if not near:  # perhaps the device alone was named
            devices = difflib.get_close_matches(profile_id, {name.partition(".")[0] for name in known}, cutoff=0.5)
            near = [name for device in devices for name in known if name.partition(".")[0] == device][:3]
        return f"; did you mean {', '.join(near)}?" if near else ""


_LIST = "espalier profiles list"


def names() -> tuple[str, ...]:
    """Return the ids of all profiles that can be loaded, sorted; abstract files are left out."""
    return Library.here().names()


def load(profile_id: str) -> Profile:
    """Return the profile of this id, or raise `ProfileError` with the nearest ids."""
    return Library.here().load(profile_id)


def load_file(path: Path | str) -> Profile:
    """Return the profile of a file anywhere; it may extend profiles of its own folder too."""
    file = Path(path)
    if not file.is_file():
        raise ProfileError(f"{file}: no such profile file; `{_LIST}` shows the known profiles")
    return Library.here().beside(file).load(_id_of(file))


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


def _files_in(folder: Traversable) -> dict[str, Traversable]:
    if not folder.is_dir():
        return {}
    return {_id_of(file): file for file in folder.iterdir() if file.name.endswith(".toml")}


def _id_of(file: Traversable) -> str:
    return file.name.removesuffix(".toml")


def _read(file: Traversable) -> _Table:
    path = str(file)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(Finding(path, "file", f"cannot be read as TOML: {error}", "correct it there")) from error
    wrong = []
    if table.get("id") != _id_of(file):
        what = f"is {table.get('id')!r}, but the file is named {_id_of(file)!r}"
        wrong.append(Finding(path, "id", what, "make them equal"))
    if not isinstance(table.get("abstract", False), bool):
        wrong.append(Finding(path, "abstract", f"must be true or false, not {table['abstract']!r}", "correct it"))
    parents = table.get("extends", [])
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        wrong.append(Finding(path, "extends", f"must be a list of profile ids, not {parents!r}", "correct it"))
    if wrong:
        raise ProfileError(*wrong)
    return table


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
