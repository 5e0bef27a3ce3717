"""One small net per rule: which widths it has, which cannot be cut and why, and that the others are cut rightly."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backends.rebuild import cut
from planner.axes import Slice
from planner.graph import Graph, trace

from .nets import PIXELS, Lambda, conv, looking_trained

OUTPUT = "it is an output of the model"
TOKENS = (2, 5, 12)  # batch, tokens, features
Widths = dict[str, tuple[int, str | None]]  # name -> size, and a part of why it cannot be cut


@dataclass(frozen=True)
class Case:
    """A net, the shape of its input, and its widths beside that of the output."""

    make: Callable[[], nn.Module]
    widths: Widths
    shape: tuple[int, ...] = PIXELS
    dtype: torch.dtype = torch.float32


def image(
    forward: Callable[[nn.Module, Tensor], Tensor], into: int = 8, **parts: nn.Module | nn.Parameter
) -> nn.Module:
    """Return conv `one` with 8 channels -> `forward` -> conv `out`, which reads `into` channels."""
    return Lambda(lambda net, x: net.out(forward(net, net.one(x))), one=conv(3, 8), out=conv(into, 2), **parts)


def text(forward: Callable[[nn.Module, Tensor], Tensor], into: int = 8, **parts: nn.Module | nn.Parameter) -> nn.Module:
    """Return linear `one` with 8 features -> `forward` -> linear `out`, which reads `into` features."""
    made = {"one": nn.Linear(12, 8), "out": nn.Linear(into, 2)}
    return Lambda(lambda net, x: net.out(forward(net, net.one(x))), **{**made, **parts})


def heads(x: Tensor, count: int) -> Tensor:
    """Return a projection by heads: batch, heads, tokens, features."""
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """Return heads side by side."""
    return x.transpose(1, 2).flatten(2)


def attended(net: nn.Module, x: Tensor) -> Tensor:
    """Four query heads and as many of keys and values as the net has."""
    groups = net.k.out_features // 4
    q, k, v = heads(net.q(x), 4), heads(net.k(x), groups), heads(net.v(x), groups)
    return joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=groups < 4))


def repeated(net: nn.Module, x: Tensor) -> Tensor:
    """Grouped queries by repeating keys and values, and the scores by hand."""
    q, k, v = heads(net.q(x), 4), heads(net.k(x), 2).repeat_interleave(2, 1), heads(net.v(x), 2).repeat_interleave(2, 1)
    return joined((q @ k.transpose(-2, -1) / 2).softmax(-1) @ v)


def fused(net: nn.Module, x: Tensor) -> Tensor:
    """Queries, keys and values from one projection."""
    q, k, v = net.qkv(x).view(x.shape[0], x.shape[1], 3, 4, 4).permute(2, 0, 3, 1, 4)
    return joined(F.scaled_dot_product_attention(q, k, v))


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding: halves of each head turn against each other."""
    angle = torch.arange(x.shape[2])[:, None] * torch.ones(x.shape[3])
    low, high = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-high, low], -1) * angle.sin()


def rotary(net: nn.Module, x: Tensor) -> Tensor:
    """Attention whose queries and keys are turned by their positions."""
    q, k, v = (heads(project(x), 4) for project in (net.q, net.k, net.v))
    return joined(F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True))


def projections(keys: int = 4) -> dict[str, nn.Module]:
    """Return the projections of four heads of four features on 8 features."""
    return {"q": nn.Linear(8, 16), "k": nn.Linear(8, 4 * keys), "v": nn.Linear(8, 4 * keys)}


def squeezed(net: nn.Module, x: Tensor) -> Tensor:
    """Squeeze and excite."""
    return x * torch.sigmoid(net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))))


def positions(net: nn.Module, x: Tensor) -> Tensor:
    """A class token before the others, and a learned position added to each."""
    return (torch.cat([net.token.expand(len(x), -1, -1), x], 1) + net.place)[:, 0]  # type: ignore[operator, union-attr]


def overwritten(net: nn.Module, x: Tensor) -> Tensor:
    """Activations, sums and products in place."""
    x = F.relu_(net.more(x))
    x += net.less(x)
    return x.mul_(2).clamp_(0, 6)


def _dead(net: nn.Module, x: Tensor) -> Tensor:
    torch.sort(net.dead(x), 1)  # nobody reads it
    return x


def tied() -> nn.Module:
    """A language model whose output layer is its embedding."""
    net = Lambda(lambda net, x: net.head(F.gelu(net.body(net.table(x)))), body=nn.Linear(8, 8))
    net.table, net.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    net.head.weight = net.table.weight
    return net


def recurrent(kind: type[nn.RNNBase], **options: bool) -> Callable[[], nn.Module]:
    """Return a net that reads the outputs of a recurrent layer of 6 hidden units."""
    into = 12 if options.get("bidirectional") else 6
    layer = kind(8, 6, batch_first=True, **options)  # type: ignore[arg-type]
    return lambda: text(lambda net, x: net.cells(x)[0], into, cells=layer)


def parameter(*shape: int) -> nn.Parameter:
    """Return a parameter of a shape."""
    return nn.Parameter(torch.ones(shape))


FREE = {"one": (8, None)}
CASES: dict[str, Case] = {
    "linear by heads": Case(lambda: text(attended, 16, **projections()), {**FREE, "q": (4, None)}, TOKENS),
    "grouped queries": Case(lambda: text(attended, 16, **projections(2)), {**FREE, "q": (2, None)}, TOKENS),
    "one key for all": Case(
        lambda: text(attended, 16, **projections(1)),
        {
            **FREE,
            "q": (4, None),
            "k": (4, "axis mixed by scaled_dot_product_attention at "),
            "v": (4, "axis merged with another that can be cut by flatten at "),
        },
        TOKENS,
    ),
    "queries grouped by repeating": Case(
        lambda: text(repeated, 16, **projections(2)), {**FREE, "q": (2, None)}, TOKENS
    ),
    "fused heads": Case(lambda: text(fused, 16, qkv=nn.Linear(8, 48)), {**FREE, "qkv": (4, None)}, TOKENS),
    "rotary": Case(lambda: text(rotary, 16, **projections()), {**FREE, "q": (4, None)}, TOKENS),
    "multi-head attention module": Case(
        lambda: text(
            lambda net, x: net.attend(x, x, x, need_weights=False)[0],
            attend=nn.MultiheadAttention(8, 4, batch_first=True),
        ),
        {"one": (8, None), "attend": (4, None), "attend#2": (8, None)},
        TOKENS,
    ),
    "class token and positions": Case(
        lambda: text(positions, token=parameter(1, 1, 8), place=parameter(1, 6, 8)), FREE, TOKENS
    ),
    "squeeze and excite": Case(
        lambda: image(squeezed, down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1)), {**FREE, "down": (4, None)}
    ),
    "layer norm": Case(
        lambda: text(lambda net, x: net.norm(x), norm=nn.LayerNorm(8)),
        {"one": (8, "normalised over by layer_norm at ")},
        TOKENS,
    ),
    "rms norm": Case(lambda: text(lambda net, x: net.norm(x), norm=nn.RMSNorm(8)), FREE, TOKENS),
    "rms norm by hand": Case(
        lambda: text(
            lambda net, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * net.scale, scale=parameter(8)
        ),
        FREE,
        TOKENS,
    ),
    "group norm": Case(lambda: image(lambda net, x: net.norm(x), norm=nn.GroupNorm(4, 8)), {"one": (4, None)}),
    "group norm of each": Case(lambda: image(lambda net, x: net.norm(x), norm=nn.GroupNorm(8, 8)), FREE),
    "instance norm": Case(lambda: image(lambda net, x: net.norm(x), norm=nn.InstanceNorm2d(8, affine=True)), FREE),
    "LSTM": Case(recurrent(nn.LSTM), {**FREE, "cells": (6, None)}, TOKENS),
    "GRU both ways": Case(recurrent(nn.GRU, bidirectional=True), {**FREE, "cells": (6, None)}, TOKENS),
    "pixel shuffle": Case(lambda: image(lambda net, x: F.pixel_shuffle(x, 2), 2), {"one": (2, None)}),
    "pixel unshuffle": Case(lambda: image(lambda net, x: F.pixel_unshuffle(x, 2), 32), FREE),
    "padded channels": Case(lambda: image(lambda net, x: F.pad(x, (0, 0, 0, 0, 2, 1)), 11), FREE),
    "joined with what is not cut": Case(
        lambda: Lambda(lambda net, x: net.out(torch.cat([x, net.one(x)], 1)), one=conv(3, 8), out=conv(11, 2)), FREE
    ),
    "added to what is not cut": Case(
        lambda: Lambda(lambda net, x: net.out(x + net.one(x)), one=conv(3, 3), out=conv(3, 2)),
        {"one": (3, "meets an axis that is not cut, add at ")},
    ),
    "expanded": Case(lambda: text(lambda net, x: net.token.expand(2, 5, -1) * x, token=parameter(8)), FREE, TOKENS),
    "einsum": Case(
        lambda: text(lambda net, x: torch.einsum("btc,cd->btd", x, net.weight), 6, weight=parameter(8, 6)),
        {**FREE, "einsum": (6, None)},
        TOKENS,
    ),
    "einsum by heads": Case(
        lambda: text(
            lambda net, x: torch.einsum("btc,chd->bthd", x, net.weight).flatten(2), 12, weight=parameter(8, 4, 3)
        ),
        {**FREE, "einsum": (4, None), "einsum#2": (3, "axis merged with another that can be cut by flatten at ")},
        TOKENS,
    ),
    "tied embedding": Case(
        tied, {"table": (8, None), "head": (20, "indexed by embedding at ")}, (2, 5), torch.int64
    ),
    "in place": Case(
        lambda: image(overwritten, more=conv(8, 8), less=conv(8, 8)), {**FREE, "more": (8, None)}
    ),
    "dead code": Case(lambda: image(_dead, dead=conv(8, 8)), FREE),
    "depthwise": Case(lambda: image(lambda net, x: net.more(x), 16, more=conv(8, 16, groups=8)), FREE),
    "grouped": Case(lambda: image(lambda net, x: net.more(x), 12, more=conv(8, 12, groups=4)), {"one": (4, None)}),
    "transposed": Case(
        lambda: image(lambda net, x: net.more(x), 6, more=nn.ConvTranspose2d(8, 6, 2, stride=2)),
        {**FREE, "more": (6, None)},
    ),
    "grouped and transposed": Case(
        lambda: image(lambda net, x: net.more(x), 4, more=nn.ConvTranspose2d(8, 4, 2, groups=4)), {"one": (4, None)}
    ),
    "channel shuffle": Case(
        lambda: image(lambda net, x: x.view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)), FREE
    ),
    "halves apart": Case(
        lambda: image(lambda net, x: torch.cat([x[:, :4], net.more(x[:, 4:])], 1), more=conv(4, 4)),
        {"one": (4, None), "one#2": (4, None), "more": (4, None)},
    ),
    "halves gate each other": Case(lambda: image(lambda net, x: F.glu(x, 1), 4), {"one": (4, None)}),
    "both halves alike": Case(lambda: image(lambda net, x: x[:, ::2] * x[:, 1::2], 4), {"one": (4, None)}),
    "maxout": Case(lambda: image(lambda net, x: x.unflatten(1, (4, 2)).amax(2), 4), {"one": (4, None)}),
    "pixels selected": Case(
        lambda: image(lambda net, x: x.index_select(3, torch.tensor([0, 5, 2]))[:, :, [1, 4]]), FREE
    ),
    "channels selected": Case(
        lambda: image(lambda net, x: x.index_select(1, torch.tensor([0, 5, 2])), 3),
        {"one": (8, "indexed by index_select at ")},
    ),
    "stacked": Case(lambda: image(lambda net, x: torch.stack([x, -x], 1).flatten(1, 2), 16), FREE),
    "repeated": Case(lambda: image(lambda net, x: x.repeat(1, 2, 1, 1), 16), FREE),
    "rolled": Case(lambda: image(lambda net, x: x.roll(3, 1)), FREE),
    "flattened pixels": Case(
        lambda: Lambda(lambda net, x: net.out(net.one(x).flatten(1)), one=conv(3, 8), out=nn.Linear(512, 2)), FREE
    ),
    "channels last": Case(
        lambda: image(lambda net, x: net.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 6, mix=nn.Linear(8, 6)),
        {**FREE, "mix": (6, None)},
    ),
    "mean over channels": Case(lambda: image(lambda net, x: x * x.mean(1, keepdim=True)), FREE),
    "mean of what is not zero": Case(
        lambda: image(lambda net, x: torch.exp(x).mean(1, keepdim=True), 1), {"one": (8, "reduced over by mean at ")}
    ),
    "logarithm": Case(lambda: image(lambda net, x: torch.log(x.abs())), {"one": (8, "not finite at zero, log at ")}),
    "divided by": Case(lambda: image(lambda net, x: 1 / F.relu(x)), {"one": (8, "at ")}),
    "a normal function": Case(lambda: image(lambda net, x: F.softplus(x) + 1), FREE),
    "variance of each": Case(
        lambda: image(lambda net, x: x / (x.var(dim=(2, 3), keepdim=True, unbiased=False) + 1).sqrt()), FREE
    ),
    "gathered": Case(lambda: text(lambda net, x: x.gather(1, torch.tensor([[[4]]]).expand(2, 3, 8))), FREE, TOKENS),
    "added up by numbers": Case(
        lambda: text(lambda net, x: torch.zeros_like(x).index_add_(1, torch.tensor([0, 0, 1, 2, 1]), x)), FREE, TOKENS
    ),
    "scattered": Case(
        lambda: text(lambda net, x: torch.zeros_like(x).scatter_add(1, torch.tensor([[[2]]]).expand(2, 5, 8), x)),
        FREE,
        TOKENS,
    ),
    "alike by angle": Case(
        lambda: text(lambda net, x: F.cosine_similarity(x, x.roll(1, 1), dim=-1).unsqueeze(-1), 1), FREE, TOKENS
    ),
    "weight norm": Case(
        lambda: image(lambda net, x: net.more(x), 6, more=nn.utils.parametrizations.weight_norm(conv(8, 6))),
        {**FREE, "more": (6, None)},
    ),
    "cells": Case(
        lambda: text(lambda net, x: net.cell(x[:, 1], net.cell(x[:, 0])).unsqueeze(1), 6, cell=nn.GRUCell(8, 6)),
        {**FREE, "cell": (6, None)}, TOKENS,
    ),
    "a region": Case(lambda: image(lambda net, x: torch.autocast("cpu", enabled=False)(F.relu)(x)), FREE),
    "unknown": Case(lambda: image(lambda net, x: torch.sort(x, 1).values), {"one": (8, "reaches sort at ")}),
    "unknown elsewhere": Case(
        lambda: image(
            lambda net, x: net.more(x) * torch.sort(x.mean((2, 3)), 1).values[:, :1, None, None], 6, more=conv(8, 6)
        ),
        {"one": (8, "reaches sort at "), "more": (6, None)},
    ),
}  # fmt: skip


@cache
def example(name: str) -> tuple[nn.Module, Graph]:
    """Return the net of a case, looking trained, and its graph."""
    torch.manual_seed(0)
    model = looking_trained(CASES[name].make()).eval()
    return model, trace(model, (torch.ones(CASES[name].shape, dtype=CASES[name].dtype),))


@pytest.mark.parametrize("name", CASES)
def test_widths_are_those_that_a_reader_expects(name: str) -> None:
    _, graph = example(name)
    found = {width.name: (width.size, width.frozen) for width in graph.widths if width.frozen != OUTPUT}
    assert {width: size for width, (size, _) in found.items()} == {
        w: size for w, (size, _) in CASES[name].widths.items()
    }
    for width, (_, reason) in CASES[name].widths.items():
        assert (found[width][1] is None) == (reason is None), found[width]
        if reason is not None:
            assert reason in (found[width][1] or "")
            if reason.endswith(" at "):
                assert re.search(r" at /.*(test_rules|nets)\.py:\d+", found[width][1] or "")


@pytest.mark.parametrize("name", [name for name in CASES if any(not why for _, why in CASES[name].widths.values())])
@pytest.mark.parametrize("first", [True, False], ids=["first half", "last half"])
def test_what_can_be_cut_is_cut_rightly(name: str, first: bool) -> None:
    model, graph = example(name)
    half = {width.name: width.size // 2 for width in graph.cuttable}
    kept = {w.name: torch.arange(half[w.name]) + (0 if first else w.size - half[w.name]) for w in graph.cuttable}
    dense = cut(model, graph, kept)  # which proves that it computes what the masked model does
    assert sum(p.numel() for p in dense.parameters()) < sum(p.numel() for p in model.parameters())


# --- what must be zero --------------------------------------------------------------------------------------------


def piece(name: str, width: str, tensor: str, axis: int) -> Slice:
    """Return what a width owns of one axis of a tensor."""
    (found,) = [p for p in example(name)[1].width[width].slices if (p.tensor, p.axis) == (tensor, axis)]
    return found


PENALISED = [
    # A sigmoid of zero is not zero, but what it gates is.
    ("squeeze and excite", "one", "one.weight", 0, True),
    ("squeeze and excite", "one", "out.weight", 1, False),
    ("squeeze and excite", "down", "down.weight", 0, True),
    # What reads a softplus must be zero, since nothing before it makes it so.
    ("a normal function", "one", "out.weight", 1, True),
    ("linear by heads", "q", "v.weight", 0, True),
    ("linear by heads", "q", "out.weight", 1, False),
    ("class token and positions", "one", "token", 2, True),
    ("class token and positions", "one", "place", 2, True),
    ("rms norm", "one", "norm.weight", 0, False),
    ("group norm", "one", "norm.weight", 0, True),
    ("group norm", "one", "norm.bias", 0, True),
    ("LSTM", "cells", "cells.weight_ih_l0", 0, True),
    ("LSTM", "cells", "cells.weight_hh_l0", 0, True),
    ("LSTM", "cells", "cells.weight_hh_l0", 1, False),
    ("tied embedding", "table", "table.weight", 1, True),
]


@pytest.mark.parametrize(("name", "width", "tensor", "axis", "penalised"), PENALISED)
def test_what_must_be_zero_for_a_channel_to_leave(
    name: str, width: str, tensor: str, axis: int, penalised: bool
) -> None:
    assert piece(name, width, tensor, axis).penalised == penalised


def test_gates_and_halves_repeat_their_channel_in_the_weights() -> None:
    hidden = [0, 1, 2, 3, 4, 5]
    assert piece("LSTM", "cells", "cells.weight_ih_l0", 0).units.tolist() == hidden * 4
    assert piece("GRU both ways", "cells", "out.weight", 1).units.tolist() == hidden * 2
    assert piece("halves gate each other", "one", "one.weight", 0).units.tolist() == [0, 1, 2, 3] * 2
    assert piece("both halves alike", "one", "one.weight", 0).units.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert piece("pixel unshuffle", "one", "out.weight", 1).units.tolist() == [i // 4 for i in range(32)]
    assert piece("fused heads", "qkv", "qkv.weight", 0).units.tolist() == [i // 4 for i in range(16)] * 3
    assert piece("grouped queries", "q", "q.weight", 0).units.tolist() == [i // 8 for i in range(16)]
    assert piece("grouped queries", "q", "k.weight", 0).units.tolist() == [i // 4 for i in range(8)]
    assert piece("channel shuffle", "one", "out.weight", 1).units.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("name", ["rms norm", "rms norm by hand", "mean over channels"])
def test_what_divides_by_the_number_of_channels_is_counted(name: str) -> None:
    _, graph = example(name)
    ((_, extent),) = graph.counted
    assert (extent.fixed, extent.parts) == (0, (("one", 1),))


def test_a_layer_norm_is_cut_where_it_is_allowed_to_differ() -> None:
    model, _ = example("layer norm")
    graph = trace(model, (torch.ones(TOKENS),), lossy=True)
    assert graph.width["one"].frozen is None
    assert re.match(r"normalised over by layer_norm at /.*nets\.py:\d+", graph.width["one"].lossy or "")
    dense = cut(model, graph, {"one": torch.arange(5)})
    assert dense(torch.ones(TOKENS)).shape == (2, 5, 2)


def test_a_model_without_data_has_the_same_graph() -> None:
    _, graph = example("linear by heads")
    with torch.device("meta"):
        model = CASES["linear by heads"].make()
        found = trace(model, (torch.ones(TOKENS),))
    assert found.fingerprint == graph.fingerprint
    assert [(width.name, width.size) for width in found.widths] == [(width.name, width.size) for width in graph.widths]
