"""int8 by calibration: ONNX files for ONNX Runtime, OpenVINO and TensorRT, and PyTorch graphs for ExecuTorch.

Weights are quantised per output channel and symmetrically everywhere. What differs is what the runtimes fuse.
"""

import copy
import platform
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from archspec.cpu import detect as archspec_detect

from backends.artifact import specs_of
from backends.contract import Array
from backends.export import _constants, _flush, export_onnx
from backends.quiet import quietly
from backends.samples import Inputs, Samples
from profiles.errors import BackendUnavailable

__all__ = ["contiguous", "for_onnxruntime", "for_openvino", "multiplies_without_overflow", "quantised_pt2e"]

_VNNI = frozenset({"avx512_vnni", "avx_vnni"})


def for_onnxruntime(
    model: torch.nn.Module, inputs: Inputs, path: Path, *, samples: Samples, signed: bool, reduce_range: bool
) -> int:
    """Write `model` as an ONNX file with quantise-dequantise pairs, and return the subnormals that were set to 0.

    `signed` activations are what GPUs take. On CPUs they must be unsigned: only then does a ReLU vanish in the
    quantisation after it, without which a convolution stays in fp32 between two conversions (ResNet-20: 0.51 ms against
    0.19). `reduce_range` leaves weights 7 bits.
    """
    try:
        from onnxruntime.quantization import QuantFormat, QuantType, quant_pre_process, quantize_static
    except ImportError as error:
        raise BackendUnavailable(f"int8 needs onnxruntime ({error}): pip install 'espalier[onnxruntime]'") from error
    with TemporaryDirectory() as folder, quietly():
        dense, folded = Path(folder) / "dense.onnx", Path(folder) / "folded.onnx"
        count = export_onnx(model, inputs, dense).subnormals_flushed
        # Without it, constants that two layers share keep those layers from being quantised.
        quant_pre_process(dense, folded, skip_symbolic_shape=True)
        quantize_static(
            folded,
            path,
            _Reader(_feeds(samples, inputs, read=_read(dense))),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": signed, "WeightSymmetric": True},
        )
    return count + _flush_file(path)


def for_openvino(model: torch.nn.Module, inputs: Inputs, path: Path, *, samples: Samples) -> int:
    """Write `model` as an ONNX file that NNCF quantised, and return the subnormals that were set to 0.

    The ONNX form is one file, where OpenVINO's own would be two; OpenVINO runs both equally fast.
    """
    try:
        import nncf
        import onnx
    except ImportError as error:
        raise BackendUnavailable(f"int8 needs nncf ({error}): pip install 'espalier[nncf]'") from error
    with TemporaryDirectory() as folder, quietly():
        dense = Path(folder) / "dense.onnx"
        count = export_onnx(model, inputs, dense).subnormals_flushed
        data = nncf.Dataset(list(_feeds(samples, inputs, read=_read(dense))))
        quantised = nncf.quantize(onnx.load(dense), data, subset_size=len(samples.calibration))
        path.write_bytes(quantised.SerializeToString())
    return count + _flush_file(path)


def multiplies_without_overflow() -> bool:
    """Say whether this CPU adds products of 8-bit numbers in 32 bits; x86 without VNNI saturates at 16."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return bool(_VNNI & set(archspec_detect.detected_info().features))


def contiguous(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy that evaluates on the CPU, in the layout that compilers for devices expect."""
    module: Any = copy.deepcopy(model).cpu().eval()  # Any: the annotations of Module.to leave memory_format out
    return module.to(memory_format=torch.contiguous_format)  # type: ignore[no-any-return]


def quantised_pt2e(graph: Any, quantizer: Any, samples: Samples) -> Any:
    """Return `graph` with the quantise-dequantise pairs that `quantizer` asks for, calibrated (PyTorch 2 Export)."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for batch in samples.calibration:
            prepared(*batch)
    return convert_pt2e(prepared)


class _Reader:
    """The calibration data as ONNX Runtime asks for it: one batch a call, then None."""

    def __init__(self, feeds: Iterator[dict[str, Array]]) -> None:
        self.feeds = feeds

    def get_next(self) -> dict[str, Array] | None:
        """Return the next batch."""
        return next(self.feeds, None)


def _read(path: Path) -> set[str]:
    import onnx

    return {value.name for value in onnx.load(path).graph.input}  # an export drops inputs that the model ignores


def _feeds(samples: Samples, inputs: Inputs, *, read: set[str]) -> Iterator[dict[str, Array]]:
    names = [spec.name for spec in specs_of(inputs)]
    for batch in samples.calibration:
        yield {
            name: tensor.detach().cpu().contiguous().numpy()
            for name, tensor in zip(names, batch, strict=True)
            if name in read
        }


def _flush_file(path: Path) -> int:
    import onnx

    model = onnx.load(path)
    count = sum(_flush(tensor) for tensor in _constants(model.graph))
    path.write_bytes(model.SerializeToString())
    return count
