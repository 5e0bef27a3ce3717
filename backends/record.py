"""What a rebuilt model says of how it was made, so that it can be made again: attributes, and their text in files."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

KEPT = "espalier_kept"  # {width: the channels that it keeps}
CROPPED = "espalier_cropped"  # {weight: per axis of its kernel the first position that stays, and the end}
GATHERED = "espalier_gathered"  # {weight: which (channel, y, x) of its kernel, cropped, stay}
SELECTED = "espalier_selected"  # {weight: which of its input channels stay}
REMOVED = "espalier_removed"  # {block: True} of those that left
PLAN = "espalier_plan"  # the digest of the plan that it was made by
_RECORDS = (KEPT, REMOVED, CROPPED, GATHERED, SELECTED)


def records(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what is known of how a model was made; empty parts of one that nobody made."""
    return {name: dict(vars(model).get(name, {})) for name in _RECORDS}


def record_(model: nn.Module, name: str, more: Mapping[str, Any]) -> None:
    """Add to what is known."""
    vars(model)[name] = {**vars(model).get(name, {}), **more}


def made_by(model: nn.Module) -> str | None:
    """Return the digest of the plan that a model was made by, if one was."""
    found = vars(model).get(PLAN)
    return None if found is None else str(found)


def copied(model: nn.Module) -> nn.Module:
    """Return a copy that holds what is known of the model that it comes from, which copies of graphs lose."""
    dense = copy.deepcopy(model)
    vars(dense).update(records(model))
    return dense


def as_text(model: nn.Module) -> dict[str, str]:
    """Return the records as the metadata of a safetensors file."""
    found = records(model)
    parts = {name: {key: _plain(value) for key, value in own.items()} for name, own in found.items()}
    return {name.removeprefix("espalier_"): json.dumps(own) for name, own in parts.items() if own or name == KEPT}


def read_records(path: Path | str) -> dict[str, dict[str, Any]]:
    """Return the records in a safetensors file; what a file does not say is empty."""
    with safe_open(path, "pt") as file:
        said = file.metadata() or {}
    found = {name: json.loads(said.get(name.removeprefix("espalier_"), "{}")) for name in _RECORDS}
    for name in (GATHERED, SELECTED):
        found[name] = {key: _mask(value) for key, value in found[name].items()}
    return found


def _plain(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    if value.dtype != torch.bool:
        return value.tolist()
    bits = "".join("01"[bit] for bit in value.flatten().tolist())
    return {"shape": list(value.shape), "bits": f"{int(bits, 2):x}"}


def _mask(said: Mapping[str, Any]) -> Tensor:
    bits = f"{int(said['bits'], 16):b}".zfill(torch.Size(said["shape"]).numel())
    return torch.tensor([bit == "1" for bit in bits]).view(said["shape"])
