"""The search in numpy, for few groups or pools of one size, against sorted break-points and the search in torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from planner import envelope, newton

from .test_envelope_certificates import (
    FAMILIES,
    TOLERANCE,
    Array,
    Batch,
    draw,
    pooled,
    rounded,
    single_valued,
    sorted_search,
)

F64 = torch.float64


def arguments(batch: Batch, layout: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `scale`, with the problems as pools that are given in one of several ways."""
    step = torch.tensor(np.broadcast_to(batch.step, batch.x.shape).ravel()).to(dtype)
    given: dict[str, Any] = {"step": step, **pooled(batch, dtype)}
    match layout:
        case "size":
            given["pool"] = batch.x.shape[1]
        case "shuffled":
            order = torch.randperm(len(step), generator=torch.Generator().manual_seed(0))
            given |= {name: given[name][order] for name in ("norms", "a", "d", "step", "pool")}
    return given


def factors(batch: Batch, layout: str, *, debiased: bool, dtype: torch.dtype = F64) -> Array:
    given = arguments(batch, layout, dtype)
    result = envelope.scale(debiased=debiased, **given).double()
    if layout == "shuffled":
        order = torch.randperm(len(result), generator=torch.Generator().manual_seed(0))
        result = torch.empty_like(result).index_copy_(0, order, result)
    found: Array = result.numpy().reshape(batch.x.shape)
    return found


@pytest.fixture(params=FAMILIES)
def batch(request: pytest.FixtureRequest) -> Batch:
    return draw(request.param, np.random.default_rng(100 + FAMILIES.index(request.param)), problems=600)


@pytest.fixture(params=["size", "ids", "shuffled", "torch, size", "torch, ids"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the pools are given, and who solves them."""
    if request.param.startswith("torch"):
        monkeypatch.setattr(newton, "_FEW", 0)
    return str(request.param).removeprefix("torch, ")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("debiased", [False, True])
def test_every_way_agrees_with_sorted_break_points(
    batch: Batch, layout: str, debiased: bool, dtype: torch.dtype
) -> None:
    batch = rounded(single_valued(batch) if debiased else batch, dtype)
    u = sorted_search(batch, debiased=debiased)
    ridge = batch.step * batch.a
    expected = u / (u + ridge * (1 - u)) if debiased else u / (u + ridge)
    assert np.abs(factors(batch, layout, debiased=debiased, dtype=dtype) - expected).max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("debiased", [False, True])
def test_every_way_zeroes_the_same_groups(batch: Batch, layout: str, debiased: bool) -> None:
    batch = single_valued(batch) if debiased else batch
    found = factors(batch, layout, debiased=debiased)
    assert ((found == 0) == (sorted_search(batch, debiased=debiased) == 0)).all()
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize("debiased", [False, True])
def test_the_search_stays_far_below_its_limit(
    batch: Batch, layout: str, debiased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations = []

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            evaluations.append(1)
            return original(*given)

        return call

    monkeypatch.setattr(newton._Pools, "excess", counted(newton._Pools.excess))
    monkeypatch.setattr(envelope, "_spend", counted(envelope._spend))
    factors(single_valued(batch) if debiased else batch, layout, debiased=debiased)
    assert len(evaluations) <= 18 < min(newton._EVALUATIONS, envelope._EVALUATIONS)
    assert evaluations or (batch.k >= batch.d.sum(1, keepdims=True)).all()


@pytest.mark.parametrize("exponent", [-1040, -600, 900])
@pytest.mark.parametrize("debiased", [False, True])
def test_norms_may_be_subnormal_or_huge(exponent: int, layout: str, debiased: bool) -> None:
    plain = single_valued(draw("plain", np.random.default_rng(3)))
    x = np.ldexp(np.rint(np.ldexp(plain.x, 20)), -20)  # few digits: exact also as a subnormal
    shifted, same = (Batch(each, plain.a, plain.d, plain.step, plain.k) for each in (np.ldexp(x, exponent), x))
    found, expected = (factors(each, layout, debiased=debiased) for each in (shifted, same))
    assert np.abs(found - expected).max() <= 1e-14


@pytest.mark.parametrize("pool", [None, 3, torch.tensor([0, 0, 0, 0, 1, 1])])
def test_flushed_subnormal_norms_count_as_zero(pool: Tensor | int | None) -> None:
    norms = torch.full((6,), 1e-310, dtype=F64)
    torch.set_flush_denormal(True)
    try:
        scale = envelope.scale(norms, 0.1, 1.0, 1.0, 1.0, pool=pool)
    finally:
        torch.set_flush_denormal(False)
    assert scale.isfinite().all()


# --- numbers in place of arrays, and what is done for speed ---

ALIKE = ("plain", "integer budget", "norms span 1e30", "ties and zeros", "break-points that accumulate", "four groups")


def alike(family: str) -> Batch:
    """Return problems that share weight, cost and step."""
    batch = draw(family, np.random.default_rng(7), problems=160)
    one = np.ones_like(batch.x)
    return Batch(batch.x, 0.8 * one, 2.5 * one, 0.03 * np.ones_like(batch.k), 2.5 * batch.k)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("family", ALIKE)
@pytest.mark.parametrize("given", ["size", "ids"])
def test_numbers_stand_for_arrays_of_equal_entries(family: str, given: str, debiased: bool) -> None:
    batch = alike(family)
    arrays = arguments(batch, given, F64)
    numbers = {**arrays, "step": 0.03, "a": 0.8, "d": 2.5}
    assert batch.x.size <= newton._SORTED  # they are sorted for a start
    found, expected = (envelope.scale(debiased=debiased, **each) for each in (numbers, arrays))
    assert ((found - expected).abs() <= 1e-12).all()
    assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("family", ALIKE)
def test_where_the_search_starts_changes_nothing(family: str, debiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {**arguments(alike(family), "ids", F64), "step": 0.03, "a": 0.8, "d": 2.5, "debiased": debiased}
    found = envelope.scale(**given)
    monkeypatch.setattr(newton, "_SORTED", 0)
    assert ((found - envelope.scale(**given)).abs() <= 1e-12).all()


def test_a_start_from_sorted_norms_is_the_root_where_nothing_is_zeroed() -> None:
    x = np.array([5.0, 3.0, 1.0, 2.0, 7.0, 2.0])
    pools = newton._Segments(np.array([3, 3]))
    eta = pools.guess(x, 0.01, np.array([1.5, 2.0]))
    u = (np.repeat(eta, 3) * x - 0.01).clip(0, 1).reshape(2, 3)
    assert np.abs(u.sum(1) - [1.5, 2.0]).max() <= 1e-12


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 7, 100])
@pytest.mark.parametrize("chunk", [1, 64, 1 << 15])
def test_neither_chunks_nor_pools_that_leave_show(
    size: int, chunk: int, debiased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(size)
    norms = torch.empty(max(2000 // size, 30) * size, dtype=F64).log_normal_(0, 2, generator=generator)
    norms[::5] = 0
    k = torch.rand(len(norms) // size, dtype=F64, generator=generator) * size
    pool = torch.arange(len(norms)) // size
    expected = torch.cat(
        [envelope.scale(norms[pool == p], 0.2, 1.0, 1.0, k[p], debiased=debiased) for p in range(len(k))]
    )
    monkeypatch.setattr(newton, "_MANY", 1)
    monkeypatch.setattr(newton, "_CHUNK", chunk)
    found = envelope.scale(norms, 0.2, 1.0, 1.0, k, pool=size, debiased=debiased)
    assert ((found - expected).abs() <= 1e-12).all()


def test_few_pools_are_left_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = newton._Pools.only

    def seen(self: newton._Pools, pools: Any) -> newton._Pools:
        sizes.append(len(pools))
        return original(self, pools)

    monkeypatch.setattr(newton._Pools, "only", seen)
    norms = torch.empty(1 << 14).log_normal_(generator=torch.Generator().manual_seed(0))
    envelope.scale(norms, 0.003, 1.0, 1.0, 2.0, pool=4)
    assert sizes[0] <= 1 << 11
    assert sizes == sorted(sizes, reverse=True)


# --- dtypes, places to write to, numbers of groups ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pool", [None, 4, torch.tensor([1, 0, 2, 0] * 6)])
def test_results_have_the_dtype_and_the_place_asked_for(dtype: torch.dtype, pool: Tensor | int | None) -> None:
    norms = torch.linspace(0, 3, 24, dtype=dtype)
    k = 2.0 if pool is None else torch.full((6 if isinstance(pool, int) else 3,), 2.0)
    exact = envelope.scale(norms.double(), 0.1, 1.0, 1.0, k, pool=pool)
    fresh = envelope.scale(norms, 0.1, 1.0, 1.0, k, pool=pool)
    assert fresh.dtype == dtype
    assert (fresh.double() - exact).abs().max() <= torch.finfo(dtype).eps
    strided = torch.zeros(48, dtype=dtype)[::2]
    assert envelope.scale(norms, 0.1, 1.0, 1.0, k, pool=pool, out=strided) is strided
    assert torch.equal(strided, fresh)
    assert envelope.scale(norms, 0.1, 1.0, 1.0, k, pool=pool, out=norms) is norms
    assert torch.equal(norms, fresh)


def test_pools_that_are_too_large_for_numpy_are_left_to_torch() -> None:
    norms = torch.empty(3 * (newton._FEW + 1), dtype=F64).log_normal_(generator=torch.Generator().manual_seed(0))
    k = torch.tensor([10.0, 5000.0, 1e9])
    found = envelope.scale(norms, 0.1, 1.0, 1.0, k, pool=newton._FEW + 1, debiased=True)
    for part, own, budget in zip(norms.chunk(3), found.chunk(3), k, strict=True):
        alone = envelope.scale(part, 0.1, 1.0, 1.0, budget, debiased=True)
        assert ((own - alone).abs() <= 1e-10).all()
