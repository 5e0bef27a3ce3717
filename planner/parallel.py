"""Models that are wrapped or spread over processes: the model within, and the part of a parameter that is held here."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from profiles.errors import PlanError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that DistributedDataParallel, torch.compile or AveragedModel put a prefix to the names of."""
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, DistributedDataParallel | DataParallel | AveragedModel):
            model = model.module
        else:
            return model


def replicas(model: nn.Module) -> ProcessGroup | None:
    """Return the processes that train replicas of `model` together; None if it is sharded, or there is one process.

    They are those of DistributedDataParallel, or all processes where only what it wraps is given.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if any(sharded(parameter) for parameter in model.parameters()):
        return None
    wrapper = next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)
    group: ProcessGroup | None = distributed.group.WORLD if wrapper is None else wrapper.process_group
    return group if group is not None and group.size() > 1 else None


def first_(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Replace `tensor` in all processes of `group` by that of its first one; with no group, leave it."""
    if group is not None:
        distributed.broadcast(tensor, group_src=0, group=group)
    return tensor


def whole(model: nn.Module) -> nn.Module:
    """Return `model`; raises PlanError if its parameters are sharded, since such a model cannot be traced."""
    name = next((name for name, parameter in model.named_parameters() if sharded(parameter)), None)
    if name is not None:
        raise PlanError(
            f"{name} is sharded, so the model cannot be traced; make graph = plan.graph(model) before "
            "fully_shard(model) and give it to attach()"
        )
    return model


def sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether `tensor` is distributed, as the parameters of a model under `fully_shard` are."""
    module = sys.modules.get("torch.distributed.tensor")  # half a second to import; not imported, nothing is sharded
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of `tensor`, in the same memory."""
    return tensor.to_local() if sharded(tensor) else tensor


def held(tensor: Tensor) -> tuple[slice, ...]:
    """Return the part of each axis of `tensor` that this process holds; shards may be uneven, or empty."""
    if not sharded(tensor):
        return tuple(slice(0, size) for size in tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def is_split(tensor: Tensor) -> bool:
    """Return whether this process may hold a part of `tensor` only."""
    return sharded(tensor) and any(placement.is_shard() for placement in tensor.placements)


def shard_groups(parameters: Iterable[tuple[str, Tensor]]) -> tuple[ProcessGroup, ...]:
    """Return the process groups over which sums of the split parameters add up: one for each split mesh axis.

    Raises PlanError if a parameter is split unlike the others, or so that its part is not one run of each axis.
    """
    layouts: dict[tuple[DeviceMesh, tuple[int, ...]], str] = {}
    for name, parameter in parameters:
        if not sharded(parameter):
            continue
        from torch.distributed.tensor import Replicate, Shard

        if any(type(placement) not in (Shard, Replicate) for placement in parameter.placements):
            raise PlanError(f"{name} is placed as {parameter.placements}; only Shard and Replicate are supported")
        axes = tuple(i for i, placement in enumerate(parameter.placements) if placement.is_shard())
        if axes:
            layouts.setdefault((parameter.device_mesh, axes), name)
    if len(layouts) > 1:
        first, second, *_ = layouts.values()
        raise PlanError(f"{first} and {second} are sharded over different processes; shard all layers over one mesh")
    return tuple(mesh.get_group(axis) for mesh, axes in layouts for axis in axes)
