"""Kernels whose positions are zero in all filters become smaller ones, or gathers, that compute the same."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import backends
from backends.equivalence import TOLERANCE_FLOAT64, run
from backends.rebuild import cut
from backends.record import CROPPED, KEPT
from backends.shapes import CroppedConv, GatheredConv2d, crop, gather
from planner.graph import Graph, trace
from planner.groups import group
from planner.structures import FilterShape
from profiles.errors import BuildError

from ..planner.nets import Lambda, conv, looking_trained

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
QUICK = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def zeroed(layer: nn.Module, *places: tuple[Any, ...]) -> Any:
    """Return the layer with zeros at places of its weight."""
    with torch.no_grad():
        for place in places:
            layer.weight[place] = 0
    return layer


def centre(layer: nn.Module) -> Any:
    """Return the layer with nothing but the centre of its 3x3 kernels."""
    return zeroed(layer, (..., 0, slice(None)), (..., 2, slice(None)), (..., 0), (..., 2))


def image(*shape: int) -> Tensor:
    """Return a random image in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def difference(model: nn.Module, dense: nn.Module, shape: tuple[int, ...]) -> float:
    """Return max|dense - masked| / max|masked| in float64 on fresh inputs."""
    x = image(*shape)
    expected, found = (run(copy.deepcopy(net).double(), (x,)) for net in (model, dense))
    assert expected.shape == found.shape
    return float((found - expected).abs().max() / expected.abs().max())


def traced(model: nn.Module, *shape: int) -> tuple[nn.Module, Graph]:
    """Return a model that looks trained where it is not zero, and its graph."""
    alive = {name: parameter != 0 for name, parameter in model.named_parameters()}
    model = looking_trained(model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 2:
                parameter.mul_(alive[name])
    return model, trace(model, (torch.ones(shape),))


# --- shape fibres, through the group maps -------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Conv2d:
    """Return any convolution of 6 channels."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    dilation, mode = (
        draw(st.integers(1, 2)),
        draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
    )
    same = draw(st.booleans())
    stride = 1 if same else draw(st.sampled_from([1, 2, (2, 3)]))
    padding = "same" if same else draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    about = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
    return nn.Conv2d(6, 6, kernel, groups=draw(st.sampled_from([1, 2, 6])), **about)


@QUICK
@given(
    conv=convolutions(), dead=st.floats(0.2, 0.95), ends=st.tuples(*[st.integers(0, 2)] * 4), seed=st.integers(0, 99)
)
def test_random_shape_fibres_leave_what_the_masked_model_computes(
    conv: nn.Conv2d, dead: float, ends: tuple[int, ...], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape, (top, bottom, left, right) = (2, 3, 13, 14), ends
    model, graph = traced(
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), conv, nn.BatchNorm2d(6)), *shape
    )
    fibres = FilterShape("3.weight", tuple(conv.weight.shape[1:]))
    stay = torch.rand(fibres.shape, generator=torch.Generator().manual_seed(seed)) >= dead
    stay[:, :top], stay[:, stay.shape[1] - bottom :], stay[..., :left] = False, False, False
    stay[..., stay.shape[2] - right :] = False
    group([fibres], model).scale_(dict(model.named_parameters()), stay.flatten().float())
    cropped = crop(model, graph)
    irregular = bool(stay.any()) and not bool(cropped.get_parameter("3.weight").ne(0).any(0).all())
    results = [cropped, gather(cropped, graph, ["3"])] if irregular else [cropped]
    for dense in results:
        assert difference(model, dense, (3, 3, 11, 15)) <= TOLERANCE_FLOAT64
        agrees_in_onnxruntime(model, dense, shape, tmp_path_factory.mktemp("onnx"))
    sizes = [net.get_parameter("3.weight").numel() for net in (model, cropped, results[-1])]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 6 * (int(stay.sum()) if stay.any() else stay.shape[0])


def agrees_in_onnxruntime(model: nn.Module, dense: nn.Module, shape: tuple[int, ...], folder: Path) -> None:
    """Assert that the exported file computes what the model does."""
    onnxruntime = pytest.importorskip("onnxruntime")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = backends.export_onnx(dense, (x,), folder / "dense.onnx").path
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_0": x.numpy()})
    expected = run(model, (x,))
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-4 * expected.abs().max()


# --- crop ---------------------------------------------------------------------------------------------------------


def test_a_kernel_with_nothing_but_its_centre_becomes_1x1() -> None:
    model, graph = traced(nn.Sequential(centre(nn.Conv2d(3, 8, 3, stride=2, padding=1))), 2, 3, 8, 9)
    dense = crop(model, graph)
    layer = dense.get_submodule("0")
    assert type(layer) is nn.Conv2d
    assert (layer.kernel_size, layer.stride, layer.padding) == ((1, 1), (2, 2), (0, 0))
    assert torch.equal(layer.weight, model.get_parameter("0.weight")[:, :, 1:2, 1:2])
    assert difference(model, dense, (3, 3, 10, 7)) <= TOLERANCE_FLOAT64
    assert model.get_submodule("0").kernel_size == (3, 3)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("options", "dead"),
    [
        ({"padding": 2}, [0, 4]),  # alike on both sides: stays a convolution
        ({"padding": 2, "stride": 2}, [0]),
        ({"padding": 4, "dilation": 2, "groups": 2}, [3, 4]),
        ({"padding": "same", "groups": 4}, [0, 1, 4]),
        ({"padding": "same", "dilation": 2}, [0, 1, 2, 3]),
        ({"padding": 1}, [0, 1, 2, 4]),  # more is cropped than was padded before, less after
        ({"padding": "valid"}, [0, 1, 4]),
        ({}, [0, 1, 2, 3, 4]),  # nothing stays
    ],
)
def test_every_kind_of_convolution_is_cropped(rank: int, mode: str, options: dict[str, Any], dead: list[int]) -> None:
    layer = zeroed(KINDS[rank](4, 4, 5, padding_mode=mode, **options), *((..., place) for place in dead))
    model, graph = traced(nn.Sequential(layer), 2, 4, *[13] * rank)
    dense = crop(model, graph)
    assert difference(model, dense, (3, 4, *[14] * rank)) <= TOLERANCE_FLOAT64
    assert dense.get_parameter("0.weight").shape[-1] == max(1, 5 - len(dead))
    assert model.state_dict().keys() == dense.state_dict().keys()


def test_what_is_cropped_trains_as_the_masked_model_does() -> None:
    layers = [
        zeroed(nn.Conv2d(3, 4, 3, padding=1), (..., 0)),
        nn.ReLU(),
        zeroed(nn.Conv2d(4, 2, 3), (..., 2, slice(None))),
    ]
    model, graph = traced(nn.Sequential(*layers), 2, 3, 8, 8)
    dense, x = crop(model.train(), graph).double(), image(2, 3, 8, 8)
    model.double()
    assert [type(module) for module in dense] == [CroppedConv, nn.ReLU, CroppedConv]
    assert all(module.training for module in dense.modules())
    for net in (model, dense):
        net(x).square().sum().backward()
    for name, part in [
        ("0.weight", (..., slice(1, 3))),
        ("2.weight", (..., slice(0, 2), slice(None))),
        ("2.bias", ...),
    ]:
        torch.testing.assert_close(dense.get_parameter(name).grad, model.get_parameter(name).grad[part])


def test_an_unbatched_image_passes() -> None:
    model, graph = traced(nn.Sequential(zeroed(nn.Conv2d(3, 4, 3, padding=1), (..., 0))), 2, 3, 8, 8)
    x = image(3, 8, 8)
    torch.testing.assert_close(crop(model, graph).double()(x), model.double()(x))


def test_a_whole_kernel_and_an_original_stay_as_they_are() -> None:
    model, graph = traced(nn.Sequential(nn.Conv2d(3, 4, 4, padding="same"), centre(conv(4, 4))), 2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    dense = crop(model, graph)
    assert dense.get_submodule("0").padding == "same"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert getattr(dense, CROPPED) == {"1.weight": ((1, 2), (1, 2))}


def test_a_second_crop_says_where_it_is_in_the_first_kernel() -> None:
    model, graph = traced(nn.Sequential(zeroed(nn.Conv2d(3, 4, 7, padding=3), (..., 0), (..., 6))), 2, 3, 8, 8)
    once = crop(model, graph)
    zeroed(once.get_submodule("0"), (..., 0), (..., 4))
    assert getattr(crop(once, graph), CROPPED) == {"0.weight": ((0, 7), (2, 5))}


def test_the_root_may_be_a_convolution() -> None:
    for options in ({"padding": 1}, {}):
        model, graph = traced(zeroed(nn.Conv2d(3, 4, 3, **options), (..., 0)), 2, 3, 8, 8)
        assert crop(model, graph).get_parameter("weight").shape == (4, 3, 3, 2)


def test_shared_modules_and_weights_stay_shared() -> None:
    one, two = centre(conv(4, 4)), conv(4, 4)
    two.weight = one.weight
    lopsided = zeroed(conv(4, 4), (..., 0))
    model, graph = traced(nn.Sequential(conv(3, 4), one, two, lopsided, nn.ReLU(), lopsided), 2, 3, 8, 8)
    dense = crop(model, graph)
    assert dense.get_parameter("1.weight") is dense.get_parameter("2.weight")
    assert dense.get_parameter("1.weight").shape == (4, 4, 1, 1)
    assert type(dense.get_submodule("3")) is CroppedConv
    assert dense.get_submodule("3") is dense.get_submodule("5")


class Standardised(nn.Conv2d):
    """A convolution of weights without a mean."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, self.stride, self.padding)  # type: ignore[arg-type]


class Holder(nn.Module):
    """Holds the weight of another module."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.own = weight

    def forward(self, x: Tensor) -> Tensor:
        """Add its mean."""
        return x + self.own.mean()


def _parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(centre(conv(3, 4)), dim=0)


def _hooked() -> nn.Module:
    layer: nn.Module = centre(conv(3, 4))
    layer.register_forward_hook(lambda *_: None)
    return layer


def _held() -> nn.Module:
    layer = centre(conv(3, 4))
    return nn.Sequential(layer, Holder(layer.weight))


@pytest.mark.parametrize("make", [_parametrised, _hooked, _held, lambda: centre(Standardised(3, 4, 3, padding=1))])
def test_what_is_not_a_convolution_of_its_own_stays(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make()).eval()
    graph = trace(model, (torch.ones(2, 3, 8, 8),))
    dense = crop(model, graph)
    assert [tensor.shape for tensor in dense.state_dict().values()] == [
        tensor.shape for tensor in model.state_dict().values()
    ]
    assert getattr(dense, CROPPED) == {}


def test_a_weight_that_the_forward_reads_is_refused_by_name_and_can_be_left() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.three(F.conv2d(net.one(x), net.two.weight, padding=1)) + net.two(net.one(x)).mean()  # type: ignore[no-any-return]

    model, graph = traced(Lambda(forward, one=centre(conv(3, 4)), two=centre(conv(4, 4)), three=conv(4, 2)), 2, 3, 8, 8)
    with pytest.raises(BuildError, match=r"^two cannot be cropped: .*; name it in ignored_layers"):
        crop(model, graph)
    dense = crop(model, graph, ignored_layers=["two"])
    assert [dense.get_submodule(name).weight.shape[-1] for name in ("one", "two")] == [1, 3]
    with pytest.raises(BuildError, match="no layer tow"):
        crop(model, graph, ignored_layers=["tow"])


def test_channels_that_were_cut_before_stay_on_record() -> None:
    model, graph = traced(nn.Sequential(conv(3, 8), nn.ReLU(), centre(conv(8, 4))), 2, 3, 8, 8)
    dense = crop(cut(model, graph, {"0": torch.arange(5)}), graph)
    assert dense.get_parameter("2.weight").shape == (4, 5, 1, 1)
    assert torch.equal(getattr(dense, KEPT)["0"], torch.arange(5))


# --- gather -------------------------------------------------------------------------------------------------------


def scattered(**options: Any) -> nn.Conv2d:
    """Return a convolution with half of its positions zero, none of them a whole row."""
    layer = nn.Conv2d(4, 6, 3, **options)
    return zeroed(layer, *((slice(None), c, y, (c + y) % 3) for c in range(layer.weight.shape[1]) for y in range(3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_gathered_convolution_trains_as_the_masked_one_does(groups: int) -> None:
    model, graph = traced(nn.Sequential(conv(3, 4), scattered(padding=1, stride=2, groups=groups)), 2, 3, 9, 8)
    dense, x = gather(model, graph, ["1"]).double(), image(2, 3, 9, 8)
    model.double()
    layer = dense.get_submodule("1")
    assert isinstance(layer, GatheredConv2d)
    assert layer.weight.shape == (6, 24 // groups, 1, 1)
    assert model.state_dict().keys() == dense.state_dict().keys()
    for net in (model, dense):
        net(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, layer.take(model.get_parameter("1.weight").grad))
    torch.testing.assert_close(dense.get_parameter("0.weight").grad, model.get_parameter("0.weight").grad)
    torch.testing.assert_close(dense(x[0]), model(x[0]))


def test_only_named_layers_are_gathered() -> None:
    shared = scattered(padding=1)
    model, graph = traced(
        nn.Sequential(conv(3, 4), shared, conv(6, 4), shared, nn.Conv2d(6, 4, 1), scattered()), 2, 3, 9, 9
    )
    dense = gather(model, graph, ["1", "3"])
    assert [type(module) for module in dense] == [
        nn.Conv2d,
        GatheredConv2d,
        nn.Conv2d,
        GatheredConv2d,
        *[nn.Conv2d] * 2,
    ]
    assert dense.get_submodule("1") is dense.get_submodule("3")
    assert difference(model, dense, (3, 3, 9, 9)) <= TOLERANCE_FLOAT64


def test_a_cropped_convolution_is_gathered() -> None:
    model, graph = traced(nn.Sequential(zeroed(scattered(padding=1), (..., 0))), 2, 4, 9, 9)
    dense = gather(crop(model, graph), graph, ["0"])
    assert dense.get_parameter("0.weight").shape == (6, int(model.get_parameter("0.weight").ne(0).any(0).sum()), 1, 1)
    assert difference(model, dense, (3, 4, 9, 9)) <= TOLERANCE_FLOAT64


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("9", "9 cannot be gathered: the model has no such layer"),
        ("0", r"0 cannot be gathered: none of its \(channel, y, x\) positions is zero"),
        ("1", "1 cannot be gathered: BatchNorm2d is no Conv2d"),
        ("2", "2 cannot be gathered: another module holds its weight"),
    ],
)
def test_what_cannot_be_gathered_is_refused_by_name(name: str, said: str) -> None:
    layer = scattered(padding=1)
    model, graph = traced(nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), layer, Holder(layer.weight)), 2, 3, 9, 9)
    with pytest.raises(BuildError, match=said):
        gather(model, graph, [name])


def test_a_weight_that_the_forward_reads_is_not_gathered() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return F.conv2d(x, net.one.weight) + net.one(x)  # type: ignore[no-any-return]

    model, graph = traced(Lambda(forward, one=scattered()), 2, 4, 9, 9)
    with pytest.raises(BuildError, match="one cannot be gathered"):
        gather(model, graph, ["one"])
