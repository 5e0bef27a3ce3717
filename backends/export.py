"""ONNX files: one static graph, without subnormal constants, whole or absent."""

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.onnx import symbolic_helper, symbolic_opset11
from torch.onnx.utils import register_custom_op_symbolic, unregister_custom_op_symbolic

from backends.artifact import specs_of
from backends.subnormals import flushed
from planner.evaluation import evaluating
from profiles.atomic import replacing
from profiles.errors import BackendUnavailable, BuildError

__all__ = ["Export", "export_onnx"]

OPSET = 17
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """An ONNX file and the number of its constants that were subnormal and are now 0."""

    path: Path
    subnormals_flushed: int


def export_onnx(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], path: Path | str) -> Export:
    """Write `model` in eval mode, for the shapes of `inputs`, as an ONNX file; its training mode is restored.

    Raises BackendUnavailable without the `onnx` package, BuildError if an operation cannot be exported.
    """
    try:
        import onnx
    except ImportError as error:
        raise BackendUnavailable("exporting needs onnx: pip install 'espalier[onnxruntime]'") from error
    with replacing(path) as temporary:
        _export(model, inputs, temporary)
        exported = onnx.load(temporary)
        count = sum(_flush(tensor) for tensor in _constants(exported.graph))
        temporary.write_bytes(exported.SerializeToString())
    if count:
        log.info("%s: %d subnormal constants set to 0", path, count)
    return Export(Path(path), count)


def _export(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> None:
    with evaluating(model), warnings.catch_warnings():
        # The TorchScript exporter is deprecated but 20 times faster than its successor, and a calibration exports
        # dozens of variants. Only its own two notices are silenced; what it says about the model stays audible.
        for notice in ("You are using the legacy TorchScript-based ONNX export", "The feature will be removed"):
            warnings.filterwarnings("ignore", message=notice, category=DeprecationWarning)
        # A strided slice that it cannot fold stays as it is, which is right.
        warnings.filterwarnings("ignore", message="Constant folding - Only steps=1", category=UserWarning)
        register_custom_op_symbolic("aten::pad", _pad, OPSET)
        try:
            torch.onnx.export(
                model,
                inputs,
                path,
                dynamo=False,
                opset_version=OPSET,
                input_names=[spec.name for spec in specs_of(inputs)],
            )
        except RuntimeError as error:
            raise BuildError(f"the model cannot be exported to ONNX: {error}") from error
        finally:
            unregister_custom_op_symbolic("aten::pad", OPSET)


def _pad(graph: Any, x: Any, amounts: Any, mode: Any, value: Any = None) -> Any:
    """Write amounts that are known as a constant: behind those that are computed no shape is, which pooling needs."""
    rank, known = symbolic_helper._get_tensor_rank(x), symbolic_helper._maybe_get_const(amounts, "is")
    if rank is None or not isinstance(known, list) or symbolic_helper._parse_arg(mode, "s") != "constant":
        return symbolic_opset11.pad(graph, x, amounts, mode, value)
    both = [*known, *[0] * (2 * rank - len(known))]  # (before, after) of the last axis, of the one before it, ...
    pads = graph.op("Constant", value_t=torch.tensor([*both[-2::-2], *both[::-2]]))
    filled = [] if value is None or symbolic_helper._is_none(value) else [graph.op("CastLike", value, x)]
    return graph.op("Pad", x, pads, *filled, mode_s="constant")


def _constants(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _constants(body)


def _flush(tensor: Any) -> int:
    from onnx import numpy_helper

    values, count = flushed(numpy_helper.to_array(tensor))
    if count:
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return count
