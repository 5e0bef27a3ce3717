"""What the user hands in: `package.module:factory` names, input shapes, weight files. Checked here, at the edge."""

import difflib
import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from backends.weights import load_into_, read
from planner.train import Batches
from profiles.errors import EspalierError
from tools.batches import Data


def call_factory(name: str) -> object:
    """Return what the zero-argument factory `package.module:factory` makes; the current folder is searched too."""
    module_name, colon, factory_name = name.partition(":")
    if not colon or not factory_name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise EspalierError(f"{name!r} does not name a factory; write package.module:factory")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise EspalierError(f"{name}: cannot import {module_name}: {_told(error)}") from error
    factory: Callable[[], object] | None = getattr(module, factory_name, None)
    if not callable(factory):
        near = difflib.get_close_matches(factory_name, [n for n in vars(module) if not n.startswith("_")], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise EspalierError(f"{name}: {module_name} has no function {factory_name}{hint}")
    try:
        return factory()
    except EspalierError:
        raise
    except Exception as error:
        raise EspalierError(f"{name}() failed: {_told(error)}") from error


def _told(error: Exception) -> str:
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and "importlib" not in f.filename
    ]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def load_model(name: str, weights: Path | None = None) -> nn.Module:
    """Return the model of a factory, with the weights of a safetensors file if given, in channels_last layout."""
    model = call_factory(name)
    if not isinstance(model, nn.Module):
        raise EspalierError(
            f"{name} returned a {type(model).__name__}; the model's factory must return a torch.nn.Module"
        )
    if weights is not None:
        load_into_(model, read(weights), weights)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
    return model.eval()


def load_data(name: str) -> Data:
    """Return the data of a factory: an object with `train` and `test`, or a pair of them."""
    data = call_factory(name)
    if isinstance(data, tuple) and len(data) == 2:
        data = Data(*data)
    if not all(hasattr(data, part) for part in ("train", "test")):
        raise EspalierError(
            f"{name} returned a {type(data).__name__}; the data's factory must return (train, test), "
            "each an iterable of (inputs, targets) with a length"
        )
    return data  # type: ignore[return-value]


def input_shape(text: str) -> tuple[int, ...]:
    """Return the shape written as 1x3x32x32."""
    try:
        shape = tuple(int(part) for part in text.lower().replace(",", "x").split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise EspalierError(f"--inputs {text!r} is not a shape; write batch and sizes as 1x3x32x32")
    return shape


def example_inputs(shape: str | None, data: Batches | None) -> tuple[Tensor, ...]:
    """Return one random example input: of the given shape, or like the first example of the data."""
    if shape is not None:
        size = input_shape(shape)
    elif data is not None:
        x, _ = next(iter(data))
        size = (1, *x.shape[1:])
    else:
        raise EspalierError("the input shape is unknown; give --inputs 1x3x32x32 or --data")
    return (torch.randn(size, generator=torch.Generator().manual_seed(0)),)
