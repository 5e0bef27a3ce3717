"""AlexNet's convolutions at the row and column sparsities of SSL, rebuilt and timed: layers, and the network.

Wen et al. 2016, table 4, at a top-1 error of 44.66 %. A row of a layer's lowered weights is a filter W[n], a column a
position W[:, c, y, x] of the kernels. How many are zero is published, which ones is not, and that decides what a
runtime makes of it. So each layer is pruned in three ways that reach the published counts: "fibres" are columns drawn
by chance, as an unconstrained group lasso may leave them, and are gathered; "channels" are whole input channels,
rounded; "kernels" are the rectangle in the middle of the kernels that comes nearest. Weights are random: speed does not
depend on them, and no accuracy is claimed.

SSL's 5.1x and 3.1x are means over layers of the time of the matrix product alone. "products" measures that here,
without im2col. The speed of layers includes all that a convolution does in its runtime, and the gather; that of the
network is of what `rebuild` makes, which also keeps the filters of the first two layers: the normalisation behind them
reads neighbours.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import planner
from backends import Candidate, Ratio, compare, crop, gather, ratio, rebuild, select
from backends.pytorch import NAME, version
from planner import Channel, Filter, FilterShape, Plan
from planner.graph import Graph
from profiles import Profile
from tools.evidence.record import Row
from tools.evidence.runs import Timer, variant
from tools.examples.alexnet import AlexNet, Halves, alexnet, alexnet_towers
from tools.given import given
from tools.targets import DENSE
from tools.threads import one_thread

PATTERNS = ("fibres", "channels", "kernels")
IMAGE = (3, 227, 227)


@dataclass(frozen=True)
class Layer:
    """What is published of one layer, and the size of its input."""

    name: str
    rows: float  # the shares that are zero
    columns: float
    cpu: float  # speed-ups of the matrix product
    gpu: float
    size: int


LAYERS = (
    Layer("conv1", 0.094, 0.0, 1.05, 1.00, 227),
    Layer("conv2", 0.129, 0.632, 3.37, 2.37, 27),
    Layer("conv3", 0.406, 0.769, 6.27, 4.94, 13),
    Layer("conv4", 0.469, 0.847, 9.73, 4.03, 13),
    Layer("conv5", 0.0, 0.807, 4.93, 3.05, 13),
)


def columns(pattern: str, shape: Sequence[int], zero: float, *, readable: Tensor, seed: int) -> Tensor:
    """Return which (channel, y, x) of a kernel stay when a share is `zero`; those of other channels than `readable` go.

    Fibres reach the share exactly, where so many are readable; channels and kernels come as near as whole ones can.
    """
    channels, high, wide = shape
    generator = torch.Generator().manual_seed(seed)
    alive = torch.zeros(channels, high * wide, dtype=torch.bool)
    wanted = (1 - zero) * alive.numel()
    if not zero:
        alive[:] = True
    elif pattern == "fibres":
        free = readable[:, None].expand_as(alive).flatten().nonzero().flatten()
        alive.view(-1)[free[torch.randperm(len(free), generator=generator)[: round(wanted)]]] = True
    elif pattern == "channels":
        free = readable.nonzero().flatten()
        alive[free[torch.randperm(len(free), generator=generator)[: max(1, round(wanted / alive.shape[1]))]]] = True
    else:
        alive[:] = _rectangle(high, wide, wanted / int(readable.sum())).flatten()
    return (alive & readable[:, None]).view(channels, high, wide)


def _rectangle(high: int, wide: int, wanted: float) -> Tensor:
    sizes = ((h, w) for h in range(1, high + 1) for w in range(h, wide + 1))
    h, w = min(sizes, key=lambda size: (abs(size[0] * size[1] - wanted), size[1] - size[0]))
    inside = torch.zeros(high, wide, dtype=torch.bool)
    inside[(high - h) // 2 : (high - h) // 2 + h, (wide - w) // 2 : (wide - w) // 2 + w] = True
    return inside


def filters(outputs: int, zero: float, *, parts: int, seed: int) -> Tensor:
    """Return which filters stay, (outputs,) bool: of each of the parts equally many, drawn by chance."""
    generator, size = torch.Generator().manual_seed(seed), outputs // parts
    kept = round((1 - zero) * size)
    drawn = [torch.randperm(size, generator=generator) < kept for _ in range(parts)]
    return torch.cat(drawn)


# --- layers -----------------------------------------------------------------------------------------------------------


def layer(conv: nn.Conv2d, pattern: str, inputs: tuple[Tensor, ...], published: Layer) -> nn.Module:
    """Return one convolution without the filters and columns that a pattern prunes, proven to compute the same."""
    rows = filters(conv.out_channels, published.rows, parts=conv.groups, seed=0)
    alive = _alone(conv, pattern, published)
    own = copy.deepcopy(conv)
    assert own.bias is not None
    own.out_channels = int(rows.sum())
    own.weight, own.bias = nn.Parameter(own.weight.detach()[rows] * alive), nn.Parameter(own.bias.detach()[rows])
    net = nn.Sequential(own).eval()
    graph = planner.trace(net, inputs)
    make: dict[str, Callable[[], nn.Module]] = {
        "fibres": lambda: gather(net, graph, ["0"]),
        "channels": lambda: select(net, graph, ["0"]),
        "kernels": lambda: crop(net, graph),
    }
    return net if alive.all() else make[pattern]()


def _alone(conv: nn.Conv2d, pattern: str, published: Layer) -> Tensor:
    """Return which columns of a layer stay where all channels can be read."""
    readable = torch.ones(conv.weight.shape[1], dtype=torch.bool)
    return columns(pattern, conv.weight.shape[1:], published.columns, readable=readable, seed=1)


def layers(timer: Timer) -> Iterator[Row]:
    """Time every layer alone in all patterns, and the product of its lowered matrices."""
    for published in LAYERS:
        conv = alexnet().features.get_submodule(published.name)
        assert isinstance(conv, nn.Conv2d)
        generator = torch.Generator().manual_seed(0)
        inputs = (torch.randn(1, conv.in_channels, published.size, published.size, generator=generator),)
        models = [variant(DENSE, nn.Sequential(conv), inputs)]
        models += [variant(pattern, layer(conv, pattern, inputs, published), inputs) for pattern in PATTERNS]
        speeds = timer.speeds(published.name, models, inputs)
        about = {"part": "alexnet", "case": published.name, "published": _published(published)}
        gain = products(conv, published, seconds=timer.seconds)
        shown = {"value": gain.value, "low": gain.ci95[0], "high": gain.ci95[1]}
        yield {**about, "how": "products", "speed": {NAME: {"speedup": shown}}}
        for model in models[1:]:
            zero = 1 - float(_alone(conv, model.label, published).double().mean())
            row = {**about, "how": model.label, "zero_columns": zero, "macs_speedup": models[0].macs / model.macs}
            yield {**row, "speed": speeds[model.label]}


def _published(layer: Layer) -> dict[str, float]:
    return {"rows": layer.rows, "columns": layer.columns, "cpu": layer.cpu, "gpu": layer.gpu}


def products(conv: nn.Conv2d, published: Layer, *, seconds: float) -> Ratio:
    """Return how much faster the matrix product of a lowered convolution is without its zero rows and columns."""
    across = (published.size + 2 * int(conv.padding[0]) - conv.kernel_size[0]) // conv.stride[0] + 1
    rows, depth = conv.out_channels // conv.groups, conv.weight[0].numel()
    kept = int(filters(conv.out_channels, published.rows, parts=conv.groups, seed=0).sum()) // conv.groups
    few = round((1 - published.columns) * depth)
    sizes = {"dense": (rows, depth), "sparse": (kept, few)}
    runs = [_product(label, conv.groups, *size, across * across) for label, size in sizes.items()]
    with one_thread():
        dense, sparse = compare(runs, seconds=seconds)
    return ratio(dense, sparse)


def _product(label: str, groups: int, rows: int, depth: int, pixels: int) -> Candidate:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, depth, generator=generator) for _ in range(groups)]
    lowered = [torch.randn(depth, pixels, generator=generator) for _ in range(groups)]
    outs = [torch.empty(rows, pixels) for _ in range(groups)]

    def run() -> None:
        for weight, image, out in zip(weights, lowered, outs, strict=True):
            torch.mm(weight, image, out=out)

    return Candidate(label, (run,), NAME, version())


# --- the network ------------------------------------------------------------------------------------------------------


def pruned(model: AlexNet, pattern: str) -> dict[str, Tensor]:
    """Zero the filters and columns of AlexNet's convolutions in towers; return which columns of each weight stay."""
    stays: dict[str, Tensor] = {}
    readable = torch.ones(IMAGE[0], dtype=torch.bool)
    for number, published in enumerate(LAYERS):
        module = model.features.get_submodule(published.name)
        halves = _convolutions(module)
        rows = filters(sum(h.out_channels for h in halves.values()), published.rows, parts=2, seed=number)
        parts = zip(halves.items(), readable.chunk(len(halves)), rows.chunk(len(halves)), strict=True)
        for index, ((half, conv), read, own) in enumerate(parts):
            shape = conv.weight.shape[1:]
            seed = 10 + 2 * number + index
            alive = columns(pattern, shape, published.columns, readable=read, seed=seed)
            with torch.no_grad():
                for parameter, stay in ((conv.weight, alive * own[:, None, None, None]), (conv.bias, own)):
                    assert parameter is not None
                    parameter.mul_(stay)
            stays[f"features.{published.name}{half}.weight"] = alive
        readable = rows
    return stays


def _convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    """Return a convolution, or both of a pair, by what follows the name of the layer."""
    if isinstance(module, Halves):
        return {".a": module.a, ".b": module.b}
    assert isinstance(module, nn.Conv2d)
    return {"": module}


def plan_of(model: nn.Module, pattern: str, stays: Mapping[str, Tensor], profile: Profile) -> Plan:
    """Return the plan that the zeros of a pruned AlexNet meet."""
    graph = planner.trace(model, image())
    weights = dict(model.named_parameters())
    plan = given(graph, {width.name: _alive(graph, width.name, model) for width in graph.cuttable})
    budgets: list[tuple[Any, int]] = []
    for name, alive in stays.items():
        channels = int(alive.flatten(1).any(1).sum())
        if pattern == "fibres" and not alive.all():
            budgets.append((FilterShape(name, tuple(weights[name].shape[1:])), int(alive.sum())))
        elif pattern == "channels" and channels < len(alive):
            budgets.append((Channel(name, len(alive)), channels))
    return planner.with_structures(plan, profile, budgets, force=True)


def _alive(graph: Graph, width: str, model: nn.Module) -> int:
    norms = planner.group([Filter(graph.width[width])], model).norms(dict(model.named_parameters()))
    return int(norms.count_nonzero())


def image() -> tuple[Tensor, ...]:
    """One random image."""
    return (torch.randn(1, *IMAGE, generator=torch.Generator().manual_seed(0)),)


PARTS = {"convolutions": "features", "network": ""}  # the module of AlexNet


def network(pattern: str, part: str, profile: Profile) -> tuple[nn.Module, Plan]:
    """Return what a part of AlexNet is rebuilt as when it is pruned in one pattern, with the plan."""
    towers = alexnet_towers().eval()
    prefix = f"{part}." if part else ""
    stays = {name.removeprefix(prefix): alive for name, alive in pruned(towers, pattern).items()}
    model = towers.get_submodule(part)
    plan = plan_of(model, pattern, stays, profile)
    return rebuild(plan, model), plan


def networks(timer: Timer, profile: Profile) -> Iterator[Row]:
    """Time the convolutions with all that lies between them, and the whole network, in all patterns."""
    for name, part in PARTS.items():
        models = [variant(DENSE, alexnet().get_submodule(part), image())]
        for pattern in PATTERNS:
            small, plan = network(pattern, part, profile)
            models.append(variant(pattern, small, image(), plan))
        speeds = timer.speeds(name, models, image())
        for model in models[1:]:
            row = {"part": "alexnet", "case": name, "how": model.label, "macs_speedup": models[0].macs / model.macs}
            yield {**row, "speed": speeds[model.label]}
