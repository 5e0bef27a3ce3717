"""Runtimes by name: a runtime is a module of this package whose NAME is its file's name."""

import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING, cast

from backends.contract import Runtime
from profiles.errors import BackendUnavailable

if TYPE_CHECKING:
    from backends import executorch, onnxruntime, openvino, pytorch, tensorrt

    # The type checker holds each to the contract.
    _checked: tuple[Runtime, ...] = (executorch, onnxruntime, openvino, pytorch, tensorrt)

__all__ = ["installed", "known", "load"]


def load(name: str) -> Runtime:
    """Import the runtime called `name`; BackendUnavailable if it is unknown, or with the pip line if not installed."""
    if name not in known():
        raise BackendUnavailable(f"unknown runtime {name!r}; known are {', '.join(known())}")
    runtime = _runtime(name)
    runtime.version()
    return runtime


def known() -> tuple[str, ...]:
    """Return the names of all runtimes, installed or not, in alphabetical order."""
    names = (module.name for module in pkgutil.iter_modules(_package().__path__))
    return tuple(sorted(name for name in names if getattr(_module(name), "NAME", None) == name))


def installed() -> dict[str, str]:
    """Return name and version of every runtime that can be imported here."""
    versions: dict[str, str] = {}
    for name in known():
        try:
            versions[name] = _runtime(name).version()
        except BackendUnavailable:
            continue
    return versions


def _package() -> ModuleType:
    return importlib.import_module("backends")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"backends.{name}")


def _runtime(name: str) -> Runtime:
    return cast(Runtime, _module(name))
