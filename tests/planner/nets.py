"""Small nets, one per way in which tensors are used: those whose channels can be cut, and those that must refuse."""

import copy
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planner.graph import Graph, trace
from planner.groups import group
from planner.latency import Entry, LatencyTable
from planner.scope import Scope
from planner.structures import Depth, Filter
from profiles.evidence import Source
from profiles.schema import Device, Dtype, Peak, Profile, Runtime, Structure
from tools.examples.resnet import ResNet

PIXELS = (2, 3, 8, 8)


def looking_trained(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Return `model` with random weights, biases and normalisations: nothing in it is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan) ** 0.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5)):
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
                if module.running_mean is not None:
                    module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
    return model


def masked(model: nn.Module, graph: Graph, kept: Mapping[str, Tensor], removed: Iterable[str] = ()) -> nn.Module:
    """Return a copy of `model` that is zero, through the group maps, in the other channels and the removed blocks."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for name, channels in kept.items():
        scale = torch.zeros(graph.width[name].size)
        scale[channels] = 1
        group([Filter(graph.width[name])], model).scale_(parameters, scale)
    for name in removed:
        group([Depth(graph.block[name])], model).scale_(parameters, torch.zeros(1))
    return model


def conv(inputs: int, outputs: int, size: int = 3, **options: int | bool) -> nn.Conv2d:
    """Return a convolution that keeps the image's size."""
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)  # type: ignore[arg-type]


class Lambda(nn.Module):
    """A net whose forward is a function of its modules and the input."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], object], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self._run = forward

    def forward(self, x: Tensor) -> object:
        """Run the function."""
        return self._run(self, x)


class Sum(nn.Module):
    """A residual block: the input, or what `shortcut` makes of it, plus what `body` makes of it."""

    def __init__(self, *body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        y: Tensor = self.body(x)
        return y + (x if self.shortcut is None else self.shortcut(x))


class HardView(nn.Module):
    """A net that says in its forward how wide it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 8)
        self.fc = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        x = x.view(x.shape[0], 8 * 4 * 4)
        y: Tensor = self.fc(x)
        return y


class Functional(nn.Module):
    """A net with its residual additions in the root's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = conv(3, 8, bias=False), nn.BatchNorm2d(8)
        self.one, self.two = conv(8, 6), conv(6, 8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.three, self.bn3 = conv(8, 8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        x = F.relu(self.bn(self.stem(x)))
        y = F.dropout(F.relu(self.one(x)), 0.5, self.training)
        x = F.relu(x + self.bn2(self.two(y)))
        y = self.bn3(self.three(x))
        y += x
        out: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(F.relu(y), 1), 1))
        return out


def vgg() -> nn.Module:
    """Convolutions, a pool, and a Linear over several pixels per channel."""
    return nn.Sequential(
        *(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(conv(12, 10, bias=False), nn.BatchNorm2d(10), nn.LeakyReLU(0.1), nn.Flatten()),
        *(nn.Linear(160, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5)),
    )


def mobilenet() -> nn.Module:
    """Inverted residuals: a depthwise convolution between 1x1 ones, with ReLU6 and hardswish."""

    def body(inputs: int, hidden: int, outputs: int) -> list[nn.Module]:
        return [
            *(conv(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            *(conv(hidden, hidden, groups=hidden), nn.BatchNorm2d(hidden), nn.Hardswish()),
            *(conv(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        ]

    stem = [conv(3, 8, stride=2), nn.BatchNorm2d(8), nn.ReLU6()]
    head = [conv(12, 24, groups=12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)]
    return nn.Sequential(*stem, Sum(*body(8, 16, 8)), *body(8, 16, 12), Sum(*body(12, 20, 12)), *head)


def preactivation() -> nn.Module:
    """Normalisation after the addition, as in pre-activation residual networks."""

    def block(width: int) -> nn.Module:
        norms = nn.BatchNorm2d(width), nn.BatchNorm2d(6)
        return Sum(norms[0], nn.ReLU(), conv(width, 6, bias=False), norms[1], nn.ReLU(inplace=True), conv(6, width))

    down = nn.Sequential(conv(8, 12, 1, stride=2, bias=False))
    wide = Sum(nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12, stride=2, bias=False), shortcut=down)
    tail = [nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)]
    return nn.Sequential(conv(3, 8, bias=False), block(8), wide, block(12), *tail)


def bottleneck() -> nn.Module:
    """1x1, 3x3, 1x1 beside the input, and a ReLU after the addition."""

    def block() -> list[nn.Module]:
        body = [conv(16, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4), nn.ReLU()]
        return [Sum(*body, conv(4, 16, 1), nn.BatchNorm2d(16)), nn.ReLU()]

    return nn.Sequential(
        conv(3, 16), nn.ReLU(), *block(), *block(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5)
    )


def densely_connected() -> nn.Module:
    """Every layer reads what all before it made."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        x = torch.cat([x, net.one(F.relu(net.bn1(x)))], 1)
        x = torch.cat([net.two(F.relu(net.bn2(x))), x], dim=1)
        return net.fc(F.relu(net.bn3(x)).mean((2, 3)))  # type: ignore[no-any-return]

    return Lambda(
        forward,
        stem=conv(3, 8), one=conv(8, 4, bias=False), two=conv(12, 6), fc=nn.Linear(18, 5),
        bn1=nn.BatchNorm2d(8), bn2=nn.BatchNorm2d(12), bn3=nn.BatchNorm2d(18),
    )  # fmt: skip


def squeezed(gate: nn.Module) -> nn.Module:
    """Return a net whose channels are scaled by a gate that looks at all of them."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(net.bn(net.one(x)))
        x = x * net.gate(net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))))
        return net.fc(net.two(x).mean((2, 3)))  # type: ignore[no-any-return]

    parts = {"one": conv(3, 8), "bn": nn.BatchNorm2d(8), "two": conv(8, 6), "fc": nn.Linear(6, 5)}
    return Lambda(forward, down=conv(8, 4, 1), up=conv(4, 8, 1), gate=gate, **parts)


def joined(join: Callable[[nn.Module, Tensor], object], width: int = 8, **extra: nn.Module) -> nn.Module:
    """Return conv -> BatchNorm -> ReLU -> `join` -> conv -> mean -> Linear, with 8 channels before `join`."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = join(net, F.relu(net.bn(net.one(x))))
        return net.fc(F.relu(net.two(y)).mean((2, 3)))  # type: ignore[no-any-return]

    parts = {"one": conv(3, 8), "bn": nn.BatchNorm2d(8), "two": conv(width, 6), "fc": nn.Linear(6, 5)}
    return Lambda(forward, **parts, **extra)


def shared_twice() -> nn.Module:
    """One convolution applied twice in a row, so that its inputs are its outputs."""
    body = [nn.ReLU(), conv(8, 8)]
    return nn.Sequential(conv(3, 8), *body, *body, nn.Flatten(), nn.Linear(512, 5))


def shared_with_image() -> nn.Module:
    """One convolution that reads the image and later its own outputs: its inputs cannot be cut."""
    body = conv(3, 3)
    return nn.Sequential(body, nn.ReLU(), body, nn.Flatten(), nn.Linear(192, 5))


def weight_in_the_output() -> nn.Module:
    """A net whose output depends on the mean of a weight, which a cut would change."""
    layers = nn.Sequential(conv(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
    return Lambda(lambda net, x: net.layers(x) + net.layers[0].weight.mean(), layers=layers)


def tied_weights() -> nn.Module:
    """Two modules that hold one Parameter."""
    net = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8), nn.Flatten(), nn.Linear(512, 5))
    net[4].weight = net[2].weight
    return net


def nested() -> nn.Module:
    """A residual block inside the body of another."""
    inner = Sum(conv(8, 4), nn.ReLU(), conv(4, 8), nn.BatchNorm2d(8))
    outer = Sum(conv(8, 8), inner, conv(8, 8), nn.BatchNorm2d(8))
    return nn.Sequential(conv(3, 8), outer, nn.Flatten(), nn.Linear(512, 5))


def _blurred() -> nn.Module:
    net = joined(lambda net, x: F.conv2d(x, net.blur, padding=1, groups=x.shape[1]))  # type: ignore[arg-type]
    net.register_buffer("blur", torch.full((8, 1, 3, 3), 1 / 9))
    return net


def sequence() -> nn.Module:
    """Convolutions and pools over one axis."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.fc(F.max_pool1d(F.relu(net.bn(net.one(x.flatten(2)))), 2).flatten(1))  # type: ignore[no-any-return]

    return Lambda(forward, one=nn.Conv1d(3, 8, 3, padding=1), bn=nn.BatchNorm1d(8), fc=nn.Linear(256, 5))


def _added_through_a_view(net: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = net.more(x)
    view = y.flatten(2)
    view += x.flatten(2)
    return y


def _written_in_part(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :4] += net.more(x)[:, :4]
    return x


CUTTABLE: dict[str, Callable[[], nn.Module]] = {
    "residual, option B": lambda: ResNet(2, (8, 12, 16)),
    "residual, option A": lambda: ResNet(2, (8, 12, 16), pad_shortcuts=True),
    "VGG": vgg,
    "MobileNet": mobilenet,
    "pre-activation": preactivation,
    "bottleneck": bottleneck,
    "densely connected": densely_connected,
    "functional": Functional,
    "shared twice": shared_twice,
    "tied weights": tied_weights,
    "nested": nested,
    "PReLU per channel": lambda: nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 6), nn.Flatten(), nn.Linear(384, 5)),
    "blurred by a buffer": _blurred,
    "cast": lambda: joined(lambda _, x: x.double().float()),
    "joined to itself": lambda: joined(lambda _, x: torch.cat([x, x, 2 * x], 1), 24),
    "concat": lambda: joined(lambda _, x: torch.concat([x, -x], 1), 16),
    "upsampled": lambda: joined(lambda _, x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)),
    "batched twice": lambda: joined(lambda _, x: torch.cat([x, x / 2], 0)),
    "permuted back": lambda: joined(lambda _, x: F.dropout2d(x.permute(0, 2, 3, 1), 0.5, False).permute(0, 3, 1, 2)),
    "sequence": sequence,
    "added through a view": lambda: joined(_added_through_a_view, more=conv(8, 8)),
    "normalised by the batch": lambda: joined(
        lambda net, x: net.more(x), more=nn.BatchNorm2d(8, track_running_stats=False)
    ),
    "padded pixels": lambda: joined(lambda _, x: F.pad(F.pad(x, (1, 0, 2, 1)), (1, 1, 1, 1), mode="reflect")),
    "sigmoid gate": lambda: squeezed(nn.Sigmoid()),
    "hardsigmoid gate": lambda: squeezed(nn.Hardsigmoid()),
    "channel shuffle": lambda: joined(lambda _, x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)),
    "chunk and cat": lambda: joined(lambda _, x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "part of the channels": lambda: joined(lambda _, x: x[:, 2:6], 4),
    "channels padded": lambda: joined(lambda _, x: F.pad(x, (0, 0, 0, 0, 1, 1)), 10),
    "pixels padded with ones": lambda: joined(lambda _, x: F.pad(x, (1, 1, 1, 1), value=1.0)),
    "a constant added": lambda: joined(lambda _, x: x + 1),
    "a tensor added": lambda: joined(lambda _, x: x + torch.ones(8, 8, 8)),
    "softplus": lambda: joined(lambda _, x: F.softplus(x)),
    "clamped above zero": lambda: joined(lambda _, x: x.clamp(min=0.1)),
    "largest pixel": lambda: joined(lambda _, x: F.adaptive_max_pool2d(x, 4)),
    "grouped": lambda: joined(lambda net, x: net.more(x), more=conv(8, 8, groups=2)),
    "group norm": lambda: joined(lambda net, x: net.more(x), more=nn.GroupNorm(2, 8)),
    "bare normalisation": lambda: joined(lambda net, x: net.more(x), more=nn.BatchNorm2d(8, affine=False)),
    "weight used whole": weight_in_the_output,
    "some channels tied": lambda: joined(
        lambda net, x: net.more(x) + torch.cat([x, net.rest(x)], 1), 12, more=conv(8, 12), rest=conv(8, 4)
    ),
    "size written down": HardView,
}
"""Nets of which at least one width can be cut."""

REFUSING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "written in part": (lambda: joined(_written_in_part, more=conv(8, 8)), "overwritten by copy_"),
    "one channel": (lambda: joined(lambda _, x: x[:, :1] + x[:, 1:2], 1), "taken alone by slice"),
    "one channel of many": (lambda: joined(lambda _, x: x * x.select(1, 3).unsqueeze(1)), "taken alone by select"),
    "channels cropped by padding": (lambda: joined(lambda _, x: F.pad(x, (0, 0, 0, 0, -1, 1))), "padded by pad"),
    "clamped by a tensor": (lambda: joined(lambda _, x: x.clamp(torch.zeros(()))), "reaches clamp"),
    "sorted": (lambda: joined(lambda _, x: x.sort(1).values), "reaches sort"),
    "softmax over channels": (lambda: joined(lambda _, x: x.softmax(1)), "mixed along the axis by softmax"),
    "largest channel": (lambda: joined(lambda _, x: x.amax(1, keepdim=True), 1), "reduced over by amax"),
    "gathered": (lambda: joined(lambda _, x: x[:, torch.tensor([3, 1, 2])], 3), "indexed by index"),
    "mixer": (
        lambda: joined(lambda net, x: net.mix(x.flatten(2)).unflatten(2, (8, 8)), mix=nn.Linear(64, 64)),
        "axis mixed by conv2d",
    ),
    "normalised pixels": (
        lambda: joined(lambda net, x: net.rows(x.permute(0, 2, 1, 3)).permute(0, 2, 1, 3), rows=nn.BatchNorm2d(8)),
        "axis mixed by batch_norm",
    ),
    "convolved across": (
        lambda: joined(lambda net, x: net.across(x.transpose(1, 2)).transpose(1, 2), across=conv(8, 8)),
        "axis mixed by conv2d",
    ),
    "pooled across": (
        lambda: joined(lambda _, x: F.avg_pool2d(x.permute(0, 2, 1, 3), (1, 1)).permute(0, 2, 1, 3)),
        "axis mixed by avg_pool2d",
    ),
    "layer norm over channels": (
        lambda: joined(lambda net, x: net.norm(x.movedim(1, -1)).movedim(-1, 1), norm=nn.LayerNorm(8)),
        "normalised over by layer_norm",
    ),
    "group norm over all channels": (
        lambda: joined(lambda net, x: net.norm(x), norm=nn.GroupNorm(1, 8)),
        "normalised over by group_norm",
    ),
    "shared with the image": (shared_with_image, "meets an axis that is not cut, conv2d"),
}
"""Nets with a width that must not be cut, and a part of the reason."""


@cache
def example(name: str) -> tuple[nn.Module, Graph]:
    """Return a net of the tables above, looking trained, and its graph; both are shared: copy before changing."""
    model = looking_trained(CUTTABLE[name]() if name in CUTTABLE else REFUSING[name][0]()).eval()
    return model, trace(model, (torch.ones(PIXELS),))


def anywhere() -> Profile:
    """Return a profile of a device that rounds nothing, so that every width is a candidate."""
    return Profile(
        schema=1,
        id="any.pytorch.fp32",
        device=Device(vendor="any", kind="npu", arch="any"),
        runtime=Runtime(name="pytorch"),
        dtype=Dtype(weights="fp32", activations="fp32"),
        peak=Peak(ops_per_s={"fp32_dense": 1.0}, confidence="computed", sources=("nowhere",)),
        source=(
            Source(
                id="nowhere",
                url="https://example.org",
                quote="so slow that only work counts",
                retrieved=date(2026, 11, 20),
            ),
        ),
    )


def knowing(**pays: str) -> Profile:
    """Return that profile with evidence for some kinds of structures, "yes" or "no"; N:M is 2:4."""
    told = tuple(
        Structure(
            kind=kind,  # type: ignore[arg-type]
            pattern="2:4" if kind == "nm_sparsity" else None,
            pays=word,  # type: ignore[arg-type]
            confidence="computed",
            sources=("nowhere",),
        )
        for kind, word in pays.items()
    )
    return anywhere().model_copy(update={"structure": told})


def table_of(graph: Graph, cost: Mapping[tuple[str, int, int], float], **about: Any) -> LatencyTable:
    """Return a table with these costs."""
    entries = tuple(
        Entry(operation=operation, inputs=inputs, outputs=outputs, latency_s=seconds, probes=1)
        for (operation, inputs, outputs), seconds in cost.items()
    )
    content = {"profile": "any.pytorch.fp32", "runtime": "pytorch", "runtime_version": "1", "device": "test"}
    content |= {"threads": 1, "created": "today", "fingerprint": graph.fingerprint, "overhead_s": 1e-5}
    return LatencyTable(**{**content, "entries": entries, "probes": (), "rates": {}, **about})


def whole_streams(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Scope:
    """Return a scope in which residual streams keep all of their channels."""
    return Scope(min_width={width.name: width.size for width in trace(model, inputs).cuttable if width.is_stream})
