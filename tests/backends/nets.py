"""What the tests of several runtimes share: profiles made to order, a small trained net, and its data."""

from functools import cache

import torch
from torch import Tensor, nn

from backends.samples import Samples
from profiles.schema import Device, Dtype, Granularity, Match, Profile, Source
from profiles.schema import Runtime as RuntimeTable

IMAGE = (1, 1, 16, 16)


def profile_of(runtime: str, number: str, *, kind: str = "cpu", arch: str = "x86-64", **options: object) -> Profile:
    """Return a profile that asks for `number` and, in its [runtime] table, for `options`."""
    table = RuntimeTable(name=runtime)
    if options:  # set behind the schema's back, which may not know the table yet
        table.__dict__["options"] = options
    return Profile(
        id=f"x.{runtime}.{number}",
        device=Device(vendor="test", kind=kind, arch=arch, match=Match(archspec="x86_64" if kind == "cpu" else None)),
        runtime=table,
        dtype=Dtype(weights=number, activations=number),
    )


def rule(axis: str, mode: str, quantum: int) -> tuple[Granularity, Source]:
    """Return a rule on convolutions, and its source."""
    fallback = {"fallback": "the convolution runs elsewhere"} if mode in ("cliff", "reject") else {}
    told = Granularity(
        op="conv2d", axis=axis, quantum=quantum, mode=mode, confidence="source", sources=("s",), **fallback
    )
    return told, Source(id="s", url="https://example.com", quote="so it is", retrieved="2026-01-01")


class Residual(nn.Module):
    """Convolutions with normalisations, a residual connection, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.pool((x + self.body(x)).relu()).flatten(1))


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images of horizontal, vertical and no stripes in noise, with their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    wave = torch.sin(torch.arange(16) * 1.6)
    kinds = torch.stack([wave[:, None].expand(16, 16), wave[None].expand(16, 16), torch.zeros(16, 16)])
    return kinds[labels][:, None] + 0.5 * torch.randn(count, *IMAGE[1:], generator=generator), labels


@cache
def trained() -> nn.Module:
    """Return a net that tells the stripes apart; copy it before changing it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Residual()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(40):
            images, labels = stripes(32, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def samples() -> Samples:
    """Return data to calibrate and to test the net with, in batches of one."""
    return Samples.of([stripes(40, 100)], [stripes(60, 101)], like=(torch.zeros(IMAGE),), calibrated=32)
