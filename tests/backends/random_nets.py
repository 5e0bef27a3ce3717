"""Random small convolutional nets: a list of steps, each of which reads tensors made before it."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Step:
    """One operation: what it does, which earlier tensors it reads (from the end), and a number that it may need."""

    kind: str
    first: int
    second: int
    number: int


KINDS = (
    *("conv", "conv", "conv", "strange conv", "shared", "norm", "relu", "relu_", "act", "add", "add", "add_", "cat"),
    *("depthwise", "depthwise", "pool", "pad", "slice", "chunk", "twice", "scaled", "permuted", "reshaped", "gated"),
    *("constant", "prelu", "linear", "upsampled", "residual", "residual"),
)
STEPS = st.lists(
    st.builds(Step, st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 3), st.integers(1, 6)),
    min_size=2,
    max_size=14,
)


class RandomNet(nn.Module):
    """Runs its steps; every tensor that nothing has read flows into the output."""

    def __init__(self, steps: list[Step], example: Tensor) -> None:
        super().__init__()
        self.steps = list(steps)
        self.layers = nn.ModuleDict()
        self.shared: dict[int, str] = {}  # by the number of channels
        self._run(example)  # makes the layers and settles the steps
        self.made = True

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        return self._run(x)

    def _layer(self, name: str, layer: nn.Module) -> nn.Module:
        if name not in self.layers:
            assert not hasattr(self, "made")
            self.layers[name] = layer
        return self.layers[name]

    def _run(self, x: Tensor) -> Tensor:
        tensors, unread = [x], {0}
        for index, step in enumerate(self.steps):
            first, second = (max(0, len(tensors) - 1 - back) for back in (step.first, step.second))
            if not hasattr(self, "made"):
                step = self.steps[index] = self._settled(str(index), step, tensors[first], tensors[second])
            unread -= {first}
            if step.kind in ("add", "add_", "cat", "gated"):
                unread -= {second}
            tensors.append(self._step(str(index), step, tensors[first], tensors[second]))
            unread.add(len(tensors) - 1)
        ends = [tensors[i] for i in sorted(unread)]
        flat = [self._layer(f"end{i}", conv(end, 4))(end).mean((2, 3)) for i, end in enumerate(ends)]
        return self._layer("fc", nn.Linear(4 * len(flat), 3))(torch.cat(flat, 1))  # type: ignore[no-any-return]

    def _settled(self, name: str, step: Step, a: Tensor, b: Tensor) -> Step:
        """Return a step that does not depend on sizes that a cut changes."""
        if step.kind in ("add", "add_", "gated") and a.shape != b.shape:
            step = replace(step, kind="slice" if step.number > 4 else "relu")
        if step.kind == "slice":
            return replace(step, number=step.number % a.shape[1])
        if step.kind == "shared":
            return replace(step, kind=f"shared {self.shared.setdefault(a.shape[1], name)}")
        return step

    def _step(self, name: str, step: Step, a: Tensor, b: Tensor) -> Tensor:
        layer, number, channels = self._layer, step.number, a.shape[1]
        match step.kind:
            case "conv":
                return layer(name, conv(a, number + 1, bias=number % 2 == 0))(a)  # type: ignore[no-any-return]
            case "strange conv":
                x = a.transpose(1, 2)
                return layer(name, conv(x, x.shape[1]))(x).transpose(1, 2)  # type: ignore[no-any-return]
            case kind if kind.startswith("shared"):
                return layer(kind, conv(a, channels))(a)  # type: ignore[no-any-return]
            case "norm":
                return layer(name, nn.BatchNorm2d(channels))(a)  # type: ignore[no-any-return]
            case "prelu":
                return layer(name, nn.PReLU(channels if number % 2 else 1))(a)  # type: ignore[no-any-return]
            case "depthwise":
                filters = nn.Conv2d(channels, channels * (1 + number % 2), 3, padding=1, groups=channels)
                return layer(name, filters)(a)  # type: ignore[no-any-return]
            case "linear":  # over the last axis, which need not be the channels
                return layer(name, nn.Linear(a.shape[3], a.shape[3]))(a)  # type: ignore[no-any-return]
            case "residual":
                body = nn.Sequential(conv(a, number), nn.BatchNorm2d(number), nn.ReLU(), nn.Conv2d(number, channels, 1))
                return a + layer(name, body)(a)  # type: ignore[no-any-return]
        return _plain(step, a, b)


def conv(x: Tensor, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    """Return a convolution of `x` that keeps the image's size."""
    return nn.Conv2d(x.shape[1], outputs, 3, padding=1, bias=bias)


def _plain(step: Step, a: Tensor, b: Tensor) -> Tensor:
    """Do a step that has no weights."""
    n, channels, high, wide = a.shape
    number = step.number
    match step.kind:
        case "relu":
            return F.relu(a)
        case "relu_":
            return F.relu(a * 1.0, inplace=True)
        case "act":
            return (F.silu, F.hardswish, F.gelu, F.relu6, F.sigmoid, torch.tanh)[number - 1](a)
        case "add":
            return a + b if number % 2 else a - b
        case "add_":
            x = a.clone()
            x += b
            return x
        case "gated":
            return a * torch.sigmoid(b)
        case "cat":
            return torch.cat([a, b], 1)
        case "pool":
            return F.max_pool2d(a, 3, 1, 1) if number % 2 else F.avg_pool2d(a, 3, 1, 1)
        case "pad":
            return F.pad(a, (0, 0, 0, 0, number % 3, number % 2))
        case "slice":
            return a[:, number:]
        case "chunk":
            return torch.cat(a.chunk(2, 1)[::-1], 1)
        case "twice":
            return torch.cat([a, a], 1)
        case "scaled":
            return a * 0.5 if number % 2 else a / 3
        case "constant":
            return a + 0.5 if number % 2 else a.clamp(-1, 2)
        case "permuted":
            return F.relu(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        case "reshaped":
            flat = a.flatten(1) if number % 2 else a.reshape(n, channels, high * wide)
            return flat.view(n, channels, high, wide)
        case "upsampled":
            return F.interpolate(F.avg_pool2d(a, 2), scale_factor=2)
    raise AssertionError(step.kind)
