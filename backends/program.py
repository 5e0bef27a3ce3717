"""Exported programs (.pt2) without pickles: written without, and refused unopened if they hold any.

`torch.export.load` unpickles sample inputs, constants and any weight whose entry says so, evaluates the strings of
symbolic sizes, and runs the code of guards. A program of fixed shapes needs none of it, so a file with any is hostile
or broken. The archive is read with PyTorch's own reader: two readers can disagree on what a crafted archive holds.
"""

import io
import json
from collections.abc import Iterator
from typing import Any

import torch

from backends.quiet import quietly
from backends.samples import Inputs
from profiles.errors import BuildError

__all__ = ["opened_program", "saved_program"]


def saved_program(graph: Any, inputs: Inputs) -> bytes:
    """Return `graph`, a module that torch.export follows, as the bytes of a .pt2 file."""
    with quietly():
        program: Any = torch.export.export(graph, inputs, strict=False)
        program.example_inputs = None  # they would be pickled
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    content = buffer.getvalue()
    if told := next(_dangers(content), None):
        raise BuildError(f"the model cannot be saved as a program without pickles: {told}; build it in mode eager")
    return content


def opened_program(content: bytes) -> Any:
    """Return the module of a .pt2 file; raises BuildError, with nothing run, if opening it could run code."""
    if told := next(_dangers(content), None):
        raise BuildError(f"the program is refused unopened: {told}; build it again")
    with quietly():
        return torch.export.load(io.BytesIO(content)).module(check_guards=False)


def _dangers(content: bytes) -> Iterator[str]:
    try:
        reader: Any = torch._C.PyTorchFileReader(io.BytesIO(content))
        records = {name: bytes(reader.get_record(name)) for name in reader.get_all_records()}
    except (RuntimeError, ValueError, OSError) as error:  # by where the file ends
        yield f"it is no whole archive ({error})"
        return
    for name, record in records.items():
        folder, _, file = name.rpartition("/")
        if folder.endswith("sample_inputs") and record:
            yield f"{name} is a pickle"
        elif folder.endswith(("weights", "constants")) and not file.startswith(("weight_", "tensor_")):
            yield from _dangers_of_entries(name, record)
        elif name.endswith(".json"):
            yield from _dangers_of_graph(name, record)
        elif file.endswith((".pt", ".pkl")) and record:
            yield f"{name} is a pickle"


def _dangers_of_entries(name: str, record: bytes) -> Iterator[str]:
    if not name.endswith("_config.json"):
        yield f"{name} is a pickle"
        return
    for entry, how in json.loads(record)["config"].items():
        if how["use_pickle"] or not how["path_name"].startswith(("weight_", "tensor_")):
            yield f"{name} says that {entry} is a pickle"


def _dangers_of_graph(name: str, record: bytes) -> Iterator[str]:
    def keys(value: object) -> Iterator[tuple[str, object]]:
        if isinstance(value, dict):
            yield from value.items()
        if isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from keys(inner)

    for key, value in keys(json.loads(record)):
        if key in ("expr_str", "as_expr") or (key == "guards_code" and value):
            yield f"{name} has a {key}"
