"""Groups measure and scale each weight once, however parameters are cut into parts and whatever they are kept in."""

import pytest
import torch
from torch import Tensor, nn

from planner import groups as module
from planner.groups import Groups, group
from planner.pools import Share, pooled
from planner.structures import NM, Channel, FilterShape, Rows, Structure, Weight

SHAPES = {"fc": (6, 8), "conv": (7, 4, 3, 3), "bias": (7,), "narrow": (1, 8), "tall": (12, 1)}
STRUCTURES: dict[str, Structure] = {
    "filters with bias": Rows(("conv", "bias"), 7, 1),
    "heads": Rows(("fc",), 2, 3),
    "heads, fused": Rows(("fc",), 2, 1),
    "channels": Channel("conv", 4),
    "shape": FilterShape("conv", (4, 3, 3)),
    "weights": Weight("conv", 252),
    "weights of a vector": Weight("bias", 7),
    "one row": Channel("narrow", 8),
    "one column": Weight("tall", 12),
    "2:4": NM("fc", 48, 2, 4),
    "1:2 of a convolution": NM("conv", 252, 1, 2),
}


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return parameters of many shapes."""
    generator = torch.Generator().manual_seed(0)
    made = nn.Module()
    for name, shape in SHAPES.items():
        made.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
    return made


def by_hand(structure: Structure, made: nn.Module, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return norms, sums, sizes and scaled weights, weight by weight."""
    parameters = {name: parameter.detach().float() for name, parameter in made.named_parameters()}
    figures = torch.zeros(3, structure.count)
    for tensor, ids in structure.maps({name: p.shape for name, p in parameters.items()}):
        weights = parameters[tensor]
        for i, weight in zip(ids.expand(weights.shape).flatten().tolist(), weights.flatten().tolist(), strict=True):
            figures[:, i] += torch.tensor([weight**2, weight, 1.0])
        parameters[tensor] = weights * scale[ids]
    return figures[0].sqrt(), figures[1], figures[2], parameters


@pytest.mark.parametrize("chunk", [1, 5, 9, 50, 2**18])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_parts_add_up_to_the_whole(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_CPU", chunk)
    made, structure = model(), STRUCTURES[kind]
    scale = torch.linspace(0.25, 1, structure.count)
    norms, sums, sizes, scaled = by_hand(structure, made, scale)
    groups, parameters = group([structure], made), dict(made.named_parameters())
    torch.testing.assert_close(groups.norms(parameters), norms)
    torch.testing.assert_close(groups.sums(parameters), sums)
    assert torch.equal(groups.sizes(parameters), sizes)
    groups.scale_(parameters, scale)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), scaled[name])


@pytest.mark.parametrize("kind", STRUCTURES)
def test_norms_of_bfloat16_are_summed_in_float32(kind: str) -> None:
    made = model(torch.bfloat16)
    norms = by_hand(STRUCTURES[kind], made, torch.ones(252))[0]
    measured = group([STRUCTURES[kind]], made).norms(dict(made.named_parameters()))
    assert measured.dtype == torch.float32
    torch.testing.assert_close(measured, norms)


def test_parts_are_as_small_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_CPU", 80)
    groups = group([STRUCTURES["weights"], STRUCTURES["shape"]], model())
    weights = model().get_parameter("conv")
    for member in groups.members:
        parts = [part for _, part in member.parts(weights)]
        assert [len(part) for part in parts] == [2, 2, 2, 1]
        assert torch.equal(torch.cat(parts), weights)


def test_ids_that_members_share_are_gathered_once() -> None:
    made = model()
    groups = group([STRUCTURES["filters with bias"], STRUCTURES["heads"], STRUCTURES["channels"]], made)
    joined = groups.joined
    assert joined is not None
    assert joined.lengths == [7, 6, 4]
    assert [place for place, _ in joined.uses] == [0, 0, 1, 2]
    assert len(joined.once) == 17
    assert len(joined.ids) == 24
    per_group = torch.arange(groups.count + 1)
    for member, spread in zip(groups.members, joined.spread(per_group), strict=True):
        assert torch.equal(spread, per_group[member.ids])


def test_joined_ids_move_with_the_groups() -> None:
    moved = group([STRUCTURES["filters with bias"]], model()).to(torch.device("meta"))
    assert moved.joined is not None
    assert moved.joined.ids.is_meta
    assert moved.joined.once.is_meta


def test_pools_of_one_size_are_given_to_the_envelope_by_their_size() -> None:
    made = model()
    cases: list[tuple[list[Share], int | None]] = [
        ([Share.of(STRUCTURES["2:4"], 2)], 4),
        ([Share.of(STRUCTURES["2:4"], 2), Share.of(STRUCTURES["1:2 of a convolution"], 1)], 0),
        ([Share.of(STRUCTURES["one row"], 2), Share.of(Channel("fc", 8), 3)], 8),
        ([Share.of(STRUCTURES["one row"], 2)], None),
    ]
    for shares, size in cases:
        state = pooled(shares, made)
        if size == 0:
            assert state.layout is state.pool
        else:
            assert state.layout == size
        if size:
            assert torch.equal(state.pool, torch.arange(len(state.pool)) // size)
            assert len(state.k) * size == len(state.pool)


def test_whole_layers_need_no_gather() -> None:
    def spans(groups: Groups) -> list[slice | None]:
        return [member.span for member in groups.members]

    made = model()
    assert spans(group([STRUCTURES["weights"], STRUCTURES["filters with bias"]], made)) == [
        slice(0, 252), slice(252, 259), slice(252, 259),
    ]  # fmt: skip
    assert spans(group([STRUCTURES["heads"]], made)) == [None]
