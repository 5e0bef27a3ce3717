"""BatchNorm folded in exported graphs: what the graph computes stays, and the norms are gone where they can be."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import backends
from backends.folding import exported
from backends.program import opened_program
from profiles.errors import BuildError

from .nets import IMAGE, profile_of, stripes, trained


class Shared(nn.Module):
    """One convolution in two places, before two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.conv(self.one(self.conv(x)).relu()))


class ReadTwice(nn.Module):
    """A convolution that something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Standardised(nn.Module):
    """A convolution that computes its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(nn.functional.conv2d(x, self.weight - self.weight.mean()))


def looking_trained(model: nn.Module) -> nn.Module:
    """Return `model` evaluating, with statistics of all sizes in its norms."""
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.2, 3, generator=generator)
            if norm.affine:
                nn.init.normal_(norm.weight, generator=generator)
                nn.init.normal_(norm.bias, generator=generator)
    return model.eval()


FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d, with a bias": (lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), (2, 3, 9)),
    "3d, no bias": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3, bias=False), nn.BatchNorm3d(4)), (2, 3, 5, 5, 5)),
    "groups, padding same": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding="same", groups=4), nn.BatchNorm2d(8), nn.ReLU()),
        (2, 4, 6, 6),
    ),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, bias=False), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "transposed in groups": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 2, groups=2), nn.BatchNorm1d(6)),
        (2, 4, 5),
    ),
    "linear, not affine": (lambda: nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5, affine=False)), (3, 7)),
    "one weight, two norms": (Shared, (2, 3, 4, 4)),
}
KEPT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "before the convolution": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)), (2, 3, 5, 5)),
    "of the batch": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        (2, 3, 5, 5),
    ),
    "of the rows": (lambda: nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)), (3, 5, 7)),
    "without a batch": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4)), (3, 4, 4)),
    "read twice": (ReadTwice, (2, 3, 5, 5)),
    "a computed weight": (Standardised, (2, 3, 5, 5)),
}


def norms(graph: torch.fx.GraphModule) -> int:
    return sum("batch_norm" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("name", FOLDED)
def test_what_is_folded_computes_the_same(name: str) -> None:
    factory, shape = FOLDED[name]
    torch.manual_seed(0)
    model, x = looking_trained(factory()), torch.randn(shape)
    before = copy.deepcopy(model.state_dict())
    graph, _ = exported(model, (x,))
    assert norms(graph) == 0
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
    names = list(graph.state_dict())
    assert not [each for each in names if "running" in each or "batches" in each], names  # nothing dead in the file
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_folded_stays(name: str) -> None:
    factory, shape = KEPT[name]
    torch.manual_seed(0)
    model, x = looking_trained(factory()), torch.randn(shape)
    graph, _ = exported(model, (x,))
    assert norms(graph) == 1
    torch.testing.assert_close(graph(x), model(x))


def test_folded_weights_are_not_subnormal() -> None:
    model = copy.deepcopy(trained())
    with torch.no_grad():
        model.stem[0].weight[:4] = 1e-30
        model.stem[1].weight[:4] = 1e-10  # folded: 1e-40, a subnormal
    graph, count = exported(model, (torch.zeros(IMAGE),))
    assert count == 4 * 9
    bits = np.concatenate([tensor.detach().numpy().view(np.uint32).ravel() for tensor in graph.state_dict().values()])
    assert not (((bits & 0x7F800000) == 0) & ((bits & 0x007FFFFF) != 0)).any()
    assert torch.allclose(graph(stripes(1, 3)[0]), model(stripes(1, 3)[0]), atol=1e-5)


@pytest.mark.parametrize("number", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_program_holds_no_norm(number: str, layout: str, tmp_path: Path) -> None:
    profile = profile_of("pytorch", number, mode="exported", layout=layout)
    artifact = backends.load("pytorch").build(trained(), (torch.zeros(IMAGE),), profile, tmp_path / "m.pt2")
    program = opened_program(artifact.content())
    assert norms(program) == 0
    assert not [name for name in program.state_dict() if "running" in name]
    weights = [value for value in program.state_dict().values() if value.dim() == 4 and min(value.shape) > 1]
    assert {value.dtype for value in weights} == {torch.bfloat16 if number == "bf16" else torch.float32}
    last = layout == "channels_last"
    assert all(value.is_contiguous(memory_format=torch.channels_last) == last for value in weights if value.size(2) > 1)
    assert any(isinstance(module, nn.BatchNorm2d) for module in trained().modules())  # the user's module keeps its own


def test_a_model_that_cannot_be_exported_is_refused() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * int(x.sum())

    with pytest.raises(BuildError, match="the model cannot be exported"):
        exported(Counting(), (torch.zeros(2),))
