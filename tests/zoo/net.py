"""What a net of the zoo is: a name, a model that looks trained, inputs, and the feature it stands for."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Inputs", "Net", "images", "looking_trained", "net", "several", "tokens"]

DENSE = (nn.modules.conv._ConvNd, nn.Linear)


class Inputs(Protocol):
    """Makes seeded inputs; variant 1 has another batch, and another size where the net takes one."""

    def __call__(self, variant: int = 0) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Net:
    """One architecture; `build` returns the same weights each time, in evaluation mode."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    feature: str


def net(name: str, make: Callable[[], nn.Module], inputs: Inputs, feature: str) -> Net:
    """Return the net whose model is what `make` returns, with weights that depend on nothing but the name."""
    seed = zlib.crc32(name.encode())

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make()
        return looking_trained(model, seed=seed).eval()

    return Net(name, build, inputs, feature)


def images(
    *shape: int, other: tuple[int, ...] | None = None, batches: tuple[int, int] = (2, 3), seed: int = 0
) -> Inputs:
    """Return inputs of one float tensor: `shape` without batch in variant 0, `other` (or the same) in variant 1."""

    def inputs(variant: int = 0) -> tuple[Tensor, ...]:
        size = (batches[variant], *((other or shape) if variant else shape))
        return (torch.randn(size, generator=torch.Generator().manual_seed(100 * seed + variant)),)

    return inputs


def tokens(
    vocabulary: int, length: int, *, other: int | None = None, batches: tuple[int, int] = (2, 3), seed: int = 0
) -> Inputs:
    """Return inputs of one tensor of token numbers, `length` long in variant 0, `other` (or the same) in variant 1."""

    def inputs(variant: int = 0) -> tuple[Tensor, ...]:
        size = (batches[variant], (other or length) if variant else length)
        generator = torch.Generator().manual_seed(100 * seed + variant)
        return (torch.randint(vocabulary, size, generator=generator),)

    return inputs


def several(*parts: Inputs) -> Inputs:
    """Return inputs that are those of all parts, one after the other."""

    def inputs(variant: int = 0) -> tuple[Tensor, ...]:
        return tuple(tensor for part in parts for tensor in part(variant))

    return inputs


@torch.no_grad()
def looking_trained(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Return `model` with weights that keep the variance, and biases and normalisations that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:  # shared parameters are drawn once
                seen.add(id(parameter))
                parameter.copy_(_drawn(module, name, parameter, generator))
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            if name == "running_var":
                buffer.copy_(_between(0.5, 1.5, buffer, generator))
    return model


def _drawn(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    normal = torch.randn(parameter.shape, generator=generator)
    if isinstance(module, nn.PReLU):
        return _between(0.1, 0.4, parameter, generator)
    if isinstance(module, nn.Embedding):
        return 0.7 * normal
    if isinstance(module, DENSE) and name == "weight":
        fan_in = parameter.numel() // parameter.shape[1 if getattr(module, "transposed", False) else 0]
        return normal * (2 / fan_in) ** 0.5
    if "bias" in name and parameter.dim() == 1:
        return 0.1 * normal
    if parameter.numel() == max(parameter.shape, default=1):  # scales: of normalisations, layers, branches
        return _between(0.5, 1.5, parameter, generator)
    if parameter.shape[0] == 1:  # positions, class tokens
        return 0.5 * normal
    return normal * (2 / parameter[0].numel()) ** 0.5


def _between(low: float, high: float, like: Tensor, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(like.shape, generator=generator)
