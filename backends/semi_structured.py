"""2:4 weights: linear layers whose every run of four weights has two zeros, computed as such by CUDA devices."""

import torch
from torch import nn

from profiles.errors import BuildError

__all__ = ["has_two_of_four", "is_two_of_four", "qualifies", "shape_fits", "sparsified_"]

# Rows and columns must be multiples of these (torch/sparse/semi_structured.py, the CUTLASS kernels, which ask for more
# than cuSPARSELt does).
_MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64)}


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Say whether of every four weights that follow each other along the inputs at least two are zero."""
    if weight.dim() < 2 or weight.shape[1] % 4:
        return False
    nonzero = weight.movedim(1, -1).reshape(-1, 4).count_nonzero(dim=-1)
    return bool((nonzero <= 2).all())


def has_two_of_four(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Say whether the weight of a layer of these kinds is 2:4, as plans make it on purpose."""
    weights = (getattr(each, "weight", None) for each in module.modules() if isinstance(each, kinds))
    return any(isinstance(weight, torch.Tensor) and is_two_of_four(weight) for weight in weights)


def shape_fits(weight: torch.Tensor) -> bool:
    """Say whether the sparse kernels take a weight of this shape and type."""
    multiples = _MULTIPLES.get(weight.dtype)
    return multiples is not None and all(size % each == 0 for size, each in zip(weight.shape, multiples, strict=True))


def qualifies(module: nn.Module, dtype: torch.dtype) -> bool:
    """Say whether `sparsified_` would convert a linear layer of a module in this number format."""
    linear = (each.weight.detach() for each in module.modules() if isinstance(each, nn.Linear))
    return any(is_two_of_four(weight) and shape_fits(weight.to("meta", dtype)) for weight in linear)


def sparsified_(module: nn.Module) -> int:
    """Convert every linear weight that qualifies, and return how many; BuildError if none does."""
    chosen = [
        each
        for each in module.modules()
        if isinstance(each, nn.Linear) and shape_fits(each.weight) and is_two_of_four(each.weight)
    ]
    if not chosen:
        raise BuildError(
            "no linear layer has 2:4 weights in a multiple of 32x64; prune to 2:4, or remove the option sparse"
        )
    for each in chosen:
        each.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(each.weight.detach()), requires_grad=False)
    return len(chosen)
