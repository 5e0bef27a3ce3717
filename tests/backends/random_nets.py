"""Random small nets: a list of steps, each of which reads tensors made before it; every tensor is n×c×h×w."""

from collections.abc import Callable
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
    size: tuple[int, ...] = ()  # that of the tensor first read when the net was made: what a forward hard-codes


WITH_WEIGHTS = (
    *("conv", "conv", "conv", "strange conv", "shared", "norm", "depthwise", "depthwise", "prelu", "linear"),
    *("residual", "residual", "transposed", "grouped", "group norm", "layer norm", "rms norm", "gate", "attention"),
    *("recurrent", "einsum", "half", "classes"),
)
OF_TWO = ("add", "add", "add_", "cat", "gated", "mul", "stacked")
OF_ONE = (
    *("relu", "relu_", "act", "act", "pool", "pad", "slice", "chunk", "twice", "scaled", "permuted", "reshaped"),
    *("constant", "upsampled", "shuffle", "pixels together", "pixels apart", "glu", "view", "split", "rolled"),
    *("softmax", "centred", "spread", "selected", "merged"),
)
STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from((*WITH_WEIGHTS, *OF_TWO, *OF_ONE)),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(1, 6),
    ),
    min_size=2,
    max_size=14,
)
MOST_CHANNELS = 32


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

    def _layer(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        if name not in self.layers:
            assert not hasattr(self, "made")
            self.layers[name] = make()
        return self.layers[name]

    def _run(self, x: Tensor) -> Tensor:
        tensors, unread = [x], {0}
        for index, step in enumerate(self.steps):
            first, second = (max(0, len(tensors) - 1 - back) for back in (step.first, step.second))
            if not hasattr(self, "made"):
                step = self.steps[index] = self._settled(str(index), step, tensors[first], tensors[second])
            unread -= {first}
            if step.kind in OF_TWO:
                unread -= {second}
            tensors.append(self._step(str(index), step, tensors[first], tensors[second]))
            unread.add(len(tensors) - 1)
        ends = [tensors[i] for i in sorted(unread)]
        flat = [self._layer(f"end{i}", lambda end=end: conv(end, 4))(end).mean((2, 3)) for i, end in enumerate(ends)]
        return self._layer("fc", lambda: nn.Linear(4 * len(flat), 3))(torch.cat(flat, 1))  # type: ignore[no-any-return]

    def _settled(self, name: str, step: Step, a: Tensor, b: Tensor) -> Step:
        """Return a step that its tensors allow, and that depends on no size that a cut changes."""
        step = replace(step, size=tuple(a.shape))
        if not _allowed(step, a, b):
            step = replace(step, kind="slice" if step.number > 4 else "relu")
        if step.kind == "slice":
            return replace(step, number=step.number % a.shape[1])
        if step.kind == "shared":
            return replace(step, kind=f"shared {self.shared.setdefault(a.shape[1], name)}")
        return step

    def _step(self, name: str, step: Step, a: Tensor, b: Tensor) -> Tensor:
        if step.kind in OF_TWO:
            return _of_two(step, a, b)
        if step.kind in OF_ONE:
            return _reordered(step, a)

        def run(make: Callable[[], nn.Module], x: Tensor) -> Tensor:
            key = step.kind if step.kind.startswith("shared") else name
            return self._layer(key, make)(x)  # type: ignore[no-any-return]

        return _layered(step, a, run)


def _allowed(step: Step, a: Tensor, b: Tensor) -> bool:
    """Whether a step can be done with these tensors, and does not make them grow without end."""
    channels, high = a.shape[1], a.shape[2]
    match step.kind:
        case "add" | "add_" | "gated" | "mul" | "stacked":
            return a.shape == b.shape
        case "cat":
            return a.shape[2:] == b.shape[2:] and channels + b.shape[1] <= MOST_CHANNELS
        case "grouped" | "glu" | "shuffle" | "half":
            return channels % 2 == 0
        case "pixels apart":
            return channels % 4 == 0 and high <= 8
        case "pixels together" | "upsampled":
            return 4 * channels <= MOST_CHANNELS and high >= 4 and high % 2 == 0
        case "twice" | "depthwise" | "spread":
            return 2 * channels <= MOST_CHANNELS
        case "pad" | "merged":
            return channels < MOST_CHANNELS
        case "split" | "chunk":
            return channels > 1
    return True


def conv(x: Tensor, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    """Return a convolution of `x` that keeps the image's size."""
    return nn.Conv2d(x.shape[1], outputs, 3, padding=1, bias=bias)


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel by what all of them say."""
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Attention(nn.Module):
    """Self-attention over pixels with two heads, fused or not, whose sizes are written down or taken from tensors."""

    def __init__(self, channels: int, size: int, *, fused: bool, written: bool) -> None:
        super().__init__()
        self.size, self.fused, self.written = size, fused, written
        self.into = nn.ModuleList(
            [nn.Linear(channels, 2 * size * (3 if fused else 1)) for _ in range(1 if fused else 3)]
        )
        self.out = nn.Linear(2 * size, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, and add."""
        n, _, high, wide = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        size = self.size if self.written else -1
        if self.fused:
            query, key, value = self.into[0](tokens).reshape(n, high * wide, 3, 2, size).permute(2, 0, 3, 1, 4)
        else:
            query, key, value = (p(tokens).reshape(n, high * wide, 2, size).transpose(1, 2) for p in self.into)
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        found = found.reshape(n, high * wide, 2 * self.size) if self.written else found.flatten(2)
        return x + self.out(found).transpose(1, 2).unflatten(2, (high, wide))


class Projected(nn.Module):
    """A contraction by einsum with a parameter of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Contract the channels."""
        return torch.einsum("nchw,dc->ndhw", x, self.weight)


class First(nn.Module):
    """The first of what a recurrent layer returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        return self.layer(x)[0]  # type: ignore[no-any-return]


def _layered(step: Step, a: Tensor, run: Callable[[Callable[[], nn.Module], Tensor], Tensor]) -> Tensor:
    """Do a step that has weights."""
    number, channels = step.number, a.shape[1]
    last = a.movedim(1, -1)
    match step.kind:
        case "conv":
            return run(lambda: conv(a, number + 1, bias=number % 2 == 0), a)
        case "strange conv":
            return run(lambda: conv(a.transpose(1, 2), a.shape[2]), a.transpose(1, 2)).transpose(1, 2)
        case "classes":  # a Linear over all pixels, and back
            return run(lambda: nn.Linear(a[0].numel(), 2 * number), a.flatten(1))[:, :, None, None].expand(-1, -1, 4, 4)
        case kind if kind.startswith("shared"):
            return run(lambda: conv(a, channels), a)
        case "norm":
            return run(lambda: nn.BatchNorm2d(channels), a)
        case "group norm":
            groups = (1, channels, 2 if channels % 2 == 0 else 1)[number % 3]
            return run(lambda: nn.GroupNorm(groups, channels), a)
        case "layer norm":
            return run(lambda: nn.LayerNorm(channels), last).movedim(-1, 1)
        case "rms norm":
            return run(lambda: nn.RMSNorm(channels), last).movedim(-1, 1)
        case "prelu":
            return run(lambda: nn.PReLU(channels if number % 2 else 1), a)
        case "gate":
            return run(lambda: Gate(channels, number), a)
        case "attention":
            return run(lambda: Attention(channels, 1 + number % 3, fused=number > 3, written=number % 2 == 0), a)
        case "recurrent":
            kind = nn.LSTM if number % 2 else nn.GRU
            made = run(
                lambda: First(kind(channels, number, batch_first=True, bidirectional=number > 3)), last.flatten(1, 2)
            )
            return made.transpose(1, 2).unflatten(2, tuple(a.shape[2:]))
        case "einsum":
            return run(lambda: Projected(channels, number), a)
        case "half":  # ShuffleNet: one half goes through a layer
            stays, goes = a.chunk(2, 1)
            return torch.cat([stays, run(lambda: conv(goes, goes.shape[1]), goes)], 1)
    return _convolved(step, a, run)


def _convolved(step: Step, a: Tensor, run: Callable[[Callable[[], nn.Module], Tensor], Tensor]) -> Tensor:
    """Do a step that is a less common convolution or several of them."""
    number, channels = step.number, a.shape[1]
    times = 1 + number % 2
    match step.kind:
        case "depthwise":
            return run(lambda: nn.Conv2d(channels, channels * times, 3, padding=1, groups=channels), a)
        case "grouped":
            kind = nn.Conv2d if number < 4 else nn.ConvTranspose2d
            return run(lambda: kind(channels, 2 * number, 3, padding=1, groups=2), a)
        case "transposed":
            return run(lambda: nn.ConvTranspose2d(channels, number + 1, 3, padding=1), a)
        case "linear":  # over the last axis, which need not be the channels
            return run(lambda: nn.Linear(a.shape[3], a.shape[3]), a)
        case "residual":
            parts = conv(a, number), nn.BatchNorm2d(number), nn.ReLU(), nn.Conv2d(number, channels, 1)
            return a + run(lambda: nn.Sequential(*parts), a)
    raise AssertionError(step.kind)


def _of_two(step: Step, a: Tensor, b: Tensor) -> Tensor:
    match step.kind:
        case "add":
            return a + b if step.number % 2 else a - b
        case "add_":
            x = a.clone()
            x += b
            return x
        case "gated":
            return a * torch.sigmoid(b)
        case "mul":
            return torch.tanh(a) * b
        case "stacked":
            both = torch.stack([a, b], 1)
            return both.sum(1) if step.number % 2 else both[:, 1] - both[:, 0]
        case "cat":
            return torch.cat([a, b], 1)
    raise AssertionError(step.kind)


def _acted(number: int, a: Tensor) -> Tensor:
    """Return a function of every element alone."""
    return (F.silu, F.hardswish, F.gelu, F.softplus, F.sigmoid, torch.tanh)[number - 1](a)


def _reordered(step: Step, a: Tensor) -> Tensor:
    """Do a step that moves or takes elements, or one of those that follow."""
    n, channels, high, wide = a.shape
    number = step.number
    match step.kind:
        case "slice":
            return a[:, number:]
        case "chunk":
            return torch.cat(a.chunk(2, 1)[::-1], 1)
        case "split":
            return torch.cat(a.split([1, a.shape[1] - 1], 1)[::-1], 1)
        case "twice":
            return torch.cat([a, a], 1)
        case "permuted":
            return F.relu(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        case "reshaped":
            flat = a.flatten(1) if number % 2 else a.reshape(n, channels, high * wide)
            return flat.view(n, channels, high, wide)
        case "view":  # with sizes written down
            return torch.relu(a.reshape(-1, step.size[1] * high * wide)).view(-1, *step.size[1:])
        case "shuffle":
            shuffled = a.reshape(n, 2, step.size[1] // 2, high, wide).transpose(1, 2)
            return shuffled.reshape(n, step.size[1], high, wide) if number % 2 else shuffled.flatten(1, 2)
        case "pixels together":
            return F.pixel_unshuffle(a, 2)
        case "pixels apart":
            return F.pixel_shuffle(a, 2)
        case "spread":
            return a.repeat(1, 2, 1, 1) if number % 2 else a.repeat_interleave(2, 1)
        case "rolled":
            return a.roll(1, 1) if number % 2 else a.flip(1)
        case "selected":
            return a * a[:, number % step.size[1]].unsqueeze(1)
    return _plain(step, a)


def _plain(step: Step, a: Tensor) -> Tensor:
    number = step.number
    match step.kind:
        case "relu":
            return F.relu(a)
        case "relu_":
            return F.relu(a * 1.0, inplace=True)
        case "act":
            return _acted(number, a)
        case "pool":
            return F.max_pool2d(a, 3, 1, 1) if number % 2 else F.avg_pool2d(a, 3, 1, 1)
        case "pad":
            return F.pad(a, (0, 0, 0, 0, number % 3, number % 2))
        case "scaled":
            return a * 0.5 if number % 2 else a / 3
        case "constant":
            return a + 0.5 if number % 2 else a.clamp(-1, 2)
        case "upsampled":
            return F.interpolate(F.avg_pool2d(a, 2), scale_factor=2)
        case "glu":
            return F.glu(a, 1)
        case "softmax":
            return a.softmax(1 + number % 2)
        case "centred":
            return a - a.mean(1, keepdim=True) if number % 2 else a - a.mean((2, 3), keepdim=True)
        case "merged":
            return torch.cat([a, a.mean(1, keepdim=True)], 1)
    raise AssertionError(step.kind)
