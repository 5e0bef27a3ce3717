"""XNNPACK's graphs as ExecuTorch keeps them in its files: flatbuffers, read as and written from dictionaries."""

import importlib.resources
import json
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from profiles.errors import BuildError

__all__ = ["ALIGNED", "Graph", "read", "written"]

Graph = dict[str, Any]  # by the names of the schema
ALIGNED = 16  # bytes
_HEADER_BYTES = 30
_INFINITE = re.compile(rb":\s*([-+]?inf)\b")


def read(payloads: Sequence[bytes]) -> list[Graph]:
    """Return the graph of each payload; BuildError if one holds constants, which lie beside them elsewhere."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

    flat = []
    for payload in payloads:
        header = XNNHeader.from_bytes(payload[:_HEADER_BYTES])
        if header.constant_data_size:
            raise BuildError("the file holds constants within a delegate, where they are not read here; build it again")
        flat.append(payload[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
    found = _translated(flat, ".bin", ".json", "--json", "--strict-json", "--defaults-json")
    return [json.loads(_INFINITE.sub(rb': "\1"', each)) for each in found]


def written(graphs: Sequence[Graph]) -> list[bytes]:
    """Return the payload of each graph."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

    made = []
    for flat in _translated([json.dumps(graph).encode() for graph in graphs], ".json", ".bin", "--binary"):
        start = _padded(_HEADER_BYTES)
        end = start + _padded(len(flat))
        header = XNNHeader(start, len(flat), end, 0).to_bytes()
        made.append(header.ljust(start, b"\0") + flat.ljust(end - start, b"\0"))
    return made


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _translated(contents: Sequence[bytes], before: str, after: str, *options: str) -> list[bytes]:
    """Return what the compiler of flatbuffers makes of files of XNNPACK's schema, all in one run."""
    from executorch.backends.xnnpack import serialization
    from executorch.exir._serialize._flatbuffer import _run_flatc

    if not contents:
        return []
    with TemporaryDirectory(prefix="espalier-") as name:
        folder = Path(name)
        schema = folder / "schema.fbs"
        schema.write_bytes(importlib.resources.files(serialization).joinpath("schema.fbs").read_bytes())
        files = [folder / f"{index}{before}" for index in range(len(contents))]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        binaries = ["--"] if before == ".bin" else []
        _run_flatc([*options, "-o", name, str(schema), *binaries, *map(str, files)])
        return [file.with_suffix(after).read_bytes() for file in files]
