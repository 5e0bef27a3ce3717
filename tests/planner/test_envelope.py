"""What the envelope, its prox and its de-biased prox must do: closed forms, limits, invariances, edges and errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from planner import envelope, newton, threshold

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def close(first: Tensor, second: Tensor, tolerance: float = 1e-12) -> bool:
    return bool(((first - second).abs() <= tolerance * second.abs().clamp(min=1e-3)).all())


# --- value ---


def test_value_with_a_budget_of_one_is_half_the_squared_sum() -> None:
    norms = random(50)
    assert close(envelope.value(norms, 1.0, 1.0, 1), norms.sum() ** 2 / 2)


def test_value_within_the_budget_is_the_quadratic() -> None:
    norms, a, d = random(50), 1 + random(50, seed=1), 1 + random(50, seed=2)
    assert close(envelope.value(norms, a, d, float(d.sum())), (a * norms**2).sum() / 2)


def test_value_tends_to_the_squared_weighted_group_lasso_for_small_budgets() -> None:
    norms, a, d = random(50), 1 + random(50, seed=1), 1 + random(50, seed=2)
    lasso = ((a * d).sqrt() * norms).sum() ** 2 / 2
    assert close(envelope.value(norms, a, d, 1e-6) * 1e-6, lasso)


@pytest.mark.parametrize("k", range(1, 21))
def test_value_is_half_the_squared_k_support_norm(k: int) -> None:
    """Argyriou, Foygel, Srebro, "Sparse Prediction with the k-Support Norm" (2012), proposition 2.1."""
    norms = normal(20, seed=k).abs() ** 3
    x = torch.cat([torch.tensor([torch.inf], dtype=F64), norms.sort(descending=True).values])
    r = next(r for r in range(k) if x[k - r - 1] > x[k - r :].sum() / (r + 1) >= x[k - r])
    squared = (x[1 : k - r] ** 2).sum() + x[k - r :].sum() ** 2 / (r + 1)
    assert close(envelope.value(norms, 1.0, 1.0, k), squared / 2)


@pytest.mark.parametrize("function", [envelope.value, envelope.debiased_value])
def test_value_is_homogeneous_of_degree_two(function: Callable[..., Tensor]) -> None:
    norms, a, d = random(40), 1 + random(40, seed=1), 1 + random(40, seed=2)
    assert close(function(7.3 * norms, a, d, 9.5), 7.3**2 * function(norms, a, d, 9.5))


def test_debiased_value_is_zero_if_and_only_if_the_support_is_within_the_budget() -> None:
    d = 0.1 + random(200, 12, seed=1)
    norms = random(200, 12) * (random(200, 12, seed=2) < 0.5)
    cost = (d * (norms > 0)).sum(1)
    for row in range(200):
        for k, within in ((cost[row] * 0.999, cost[row] == 0), (cost[row], True), (cost[row] + 0.1, True)):
            assert (envelope.debiased_value(norms[row], 1.0, d[row], k) == 0) == within


def test_debiased_value_is_the_value_less_the_quadratic() -> None:
    norms, a, d = random(40), 1 + random(40, seed=1), 1 + random(40, seed=2)
    difference = envelope.value(norms, a, d, 9.5) - (a * norms**2).sum() / 2
    assert close(envelope.debiased_value(norms, a, d, 9.5), difference, 1e-11)


@pytest.mark.parametrize("function", [envelope.value, envelope.debiased_value])
def test_gradient_agrees_with_finite_differences(function: Callable[..., Tensor]) -> None:
    a, d, pool = 1 + random(30, seed=1), 1 + random(30, seed=2), torch.arange(30) % 4
    k = torch.tensor([1.0, 3.0, 7.0, 100.0], dtype=F64)
    norms = (0.1 + random(30)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, a, d, k, pool=pool), norms, eps=1e-6, atol=1e-7)


def test_gradient_is_zero_at_norm_zero_and_finite_elsewhere() -> None:
    norms = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float32, requires_grad=True)
    (gradient,) = torch.autograd.grad(envelope.value(norms, 1.0, 1.0, 1.0), norms)
    assert gradient.tolist() == [0.0, 3.0, 3.0]


def test_value_of_a_budget_of_zero_is_infinite_unless_all_norms_are_zero() -> None:
    assert envelope.value(torch.tensor([1.0, 0.0]), 1.0, 1.0, 0) == torch.inf
    assert envelope.debiased_value(torch.tensor([1.0, 0.0]), 1.0, 1.0, 0) == torch.inf
    assert envelope.value(torch.zeros(2), 1.0, 1.0, 0) == 0


# --- prox ---


def objective(norms: Tensor, x: Tensor, k: float, a: Tensor, d: Tensor, *, debiased: bool) -> Tensor:
    """Return the objective of the prox with step 0.4, for each row of norms."""
    function = envelope.debiased_value if debiased else envelope.value
    values = torch.stack([function(row, a, d, k) for row in norms])
    return 0.4 * values + ((norms - x) ** 2).sum(-1) / 2


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("k", [0.7, 4.0, 12.5])
def test_prox_beats_random_points(debiased: bool, k: float) -> None:
    x, a, d = random(12), 0.5 + random(12, seed=1), 0.5 + random(12, seed=2)
    w = x * envelope.scale(x, 0.4, a, d, k, debiased=debiased)
    moves = normal(300, 12, seed=3) * torch.logspace(-5, 1, 300, dtype=F64)[:, None]
    others = torch.cat([(w + moves).abs(), w * random(100, 12, seed=4), x * random(100, 12, seed=5)])
    best = objective(w[None], x, k, a, d, debiased=debiased)
    assert (best < objective(others, x, k, a, d, debiased=debiased)).all()


@pytest.mark.parametrize("debiased", [False, True])
def test_prox_is_lipschitz_and_the_convex_one_non_expansive(debiased: bool) -> None:
    pairs, groups, size = 2000, 10, 3
    x = normal(pairs, groups, size)
    y = x + normal(pairs, groups, size, seed=1) * torch.logspace(-6, 1, pairs, dtype=F64)[:, None, None]
    a, d = 0.2 + random(pairs, groups, seed=2), 0.2 + random(pairs, groups, seed=3)
    k, pool = 4 * random(pairs, seed=4), torch.arange(pairs).repeat_interleave(groups)

    def prox(w: Tensor) -> Tensor:
        norms = w.norm(dim=2).flatten()
        scale = envelope.scale(norms, 0.7, a.flatten(), d.flatten(), k, pool=pool, debiased=debiased)
        return w * scale.view(pairs, groups, 1)

    constant = 1 / (1 - 0.7 * a.amax(1)) if debiased else torch.ones(pairs, dtype=F64)
    moved, apart = ((v - w).flatten(1).norm(dim=1) for v, w in ((prox(x), prox(y)), (x, y)))
    assert (moved <= constant * apart * (1 + 1e-9)).all()


@pytest.mark.parametrize("debiased", [False, True])
def test_prox_follows_a_permutation_of_the_groups(debiased: bool) -> None:
    norms, a, d = random(40), 0.5 + random(40, seed=1), 0.5 + random(40, seed=2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    scale = envelope.scale(norms, 0.3, a, d, 9.0, debiased=debiased)
    assert close(envelope.scale(norms[order], 0.3, a[order], d[order], 9.0, debiased=debiased), scale[order])


def test_long_steps_keep_the_k_largest_norms_exactly_when_the_gap_is_wide_enough() -> None:
    """prox = H_k / (1 + step) iff step (x_(k) - x_(k+1)) >= x_(k+1), where a = d = 1 and k is an integer."""
    wide = 0
    for seed in range(200):
        norms, step, k = random(12, seed=seed), 10.0, 1 + seed % 11
        scale = envelope.scale(norms, step, 1.0, 1.0, k)
        last, next_ = norms.sort(descending=True).values[k - 1 : k + 1]
        hard = (norms >= last).double() / (1 + step)
        assert close(scale, hard) == bool(step * (last - next_) >= next_)
        if step * (last - next_) >= next_:
            wide += 1
            assert scale[norms < last].tolist() == [0.0] * (12 - k)
    assert 20 < wide < 180


def test_debiased_prox_leaves_the_survivors_exactly_as_they_were() -> None:
    norms = torch.tensor([5.0, 4.0, 3.0, 0.1, 0.05])
    assert envelope.scale(norms, 0.5, 1.0, 1.0, 3, debiased=True).tolist() == [1, 1, 1, 0, 0]


def test_prox_never_falls_below_its_budget() -> None:
    d, k, pool = 0.2 + random(500, 8, seed=1), 2 * random(500, seed=2), torch.arange(500).repeat_interleave(8)
    for step in (0.01, 1.0, 100.0):
        scale = envelope.scale(random(4000), step, 1.0, d.flatten(), k, pool=pool)
        assert ((scale.view(500, 8) > 0) * d).sum(1).ge(k * (1 - 1e-12)).all()


def test_within_the_budget_the_prox_is_ridge_and_debiased_the_identity() -> None:
    norms, a = random(20) * (random(20, seed=1) < 0.5), 0.5 + random(20, seed=2)
    k = int((norms > 0).sum())
    assert torch.equal(envelope.scale(norms, 0.3, a, 1.0, k), 1 / (1 + 0.3 * a))
    assert torch.equal(envelope.scale(norms, 0.3, a, 1.0, k, debiased=True), torch.ones(20, dtype=F64))


# --- pools and chunks ---


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("debiased", [False, True])
def test_pools_are_solved_as_if_each_were_alone(dtype: torch.dtype, debiased: bool) -> None:
    norms, a, d = random(200), 0.5 + random(200, seed=1), 0.5 + random(200, seed=2)
    pool = (random(200, seed=3) * 9).to(dtype)
    k, steps = torch.linspace(0, 30, 9, dtype=F64), torch.linspace(0, 0.6, 9, dtype=F64)
    scale = envelope.scale(norms, steps[pool.long()], a, d, k, pool=pool, debiased=debiased)
    total = torch.zeros((), dtype=F64)
    for p in range(9):
        own = pool == p
        alone = envelope.scale(norms[own], steps[p], a[own], d[own], k[p], debiased=debiased)
        assert close(scale[own], alone)
        total += envelope.value(norms[own], a[own], d[own], 0.1 + k[p])
    assert close(envelope.value(norms, a, d, 0.1 + k, pool=pool), total)


@pytest.mark.parametrize("pool", [None, torch.arange(100) % 3, 4, 20, 50])
def test_chunks_do_not_show(pool: Tensor | int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    norms, a, d = random(100), 0.5 + random(100, seed=1), 0.5 + random(100, seed=2)
    monkeypatch.setattr(newton, "_FEW", 0)
    whole = envelope.scale(norms, 0.3, a, d, 9.0, pool=pool), envelope.value(norms, a, d, 9.0, pool=pool)
    monkeypatch.setattr(envelope, "_CHUNK_CPU", 7)
    assert close(envelope.scale(norms, 0.3, a, d, 9.0, pool=pool), whole[0])
    assert close(envelope.value(norms, a, d, 9.0, pool=pool), whole[1])


@pytest.mark.parametrize("size", [1, 4, 60])
def test_the_size_of_all_pools_says_what_ids_say(size: int) -> None:
    norms, a, d, k = random(60), 0.5 + random(60, seed=1), 0.5 + random(60, seed=2), size * random(60 // size, seed=3)
    ids = torch.arange(60) // size
    for function in (envelope.value, envelope.debiased_value):
        first, second = norms.clone().requires_grad_(), norms.clone().requires_grad_()
        by_size, by_ids = function(first, a, d, k, pool=size), function(second, a, d, k, pool=ids)
        assert close(by_size, by_ids)
        assert close(*(torch.autograd.grad(*each)[0] for each in ((by_size, first), (by_ids, second))))
    for debiased in (False, True):
        by_size, by_ids = (envelope.scale(norms, 0.3, a, d, k, pool=p, debiased=debiased) for p in (size, ids))
        assert close(by_size, by_ids)


@pytest.mark.parametrize("debiased", [False, True])
def test_starting_from_a_sample_changes_nothing(debiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton, "_FEW", 0)
    for seed in range(20):
        norms, a, d = normal(200, seed=seed).abs() ** 3, 0.5 + random(200, seed=1), 0.5 + random(200, seed=2)
        norms[:: 2 + seed] = 0.0  # also samples of nothing but zeros, and of pools within their budget
        for k in (0.0, 5.0, 100.0, 170.0):
            whole = envelope.scale(norms, 0.3, a, d, k, debiased=debiased)
            with monkeypatch.context() as patch:
                patch.setattr(envelope, "_SAMPLE", 5)
                assert close(envelope.scale(norms, 0.3, a, d, k, debiased=debiased), whole)


def test_a_pool_that_no_group_names_changes_nothing() -> None:
    norms, pool = random(10), torch.tensor([0, 2] * 5)
    k = torch.tensor([2.0, 0.0, 3.0])
    dense = envelope.scale(norms, 0.3, 1.0, 1.0, k[[0, 2]], pool=pool // 2)
    assert close(envelope.scale(norms, 0.3, 1.0, 1.0, k, pool=pool), dense)


# --- edges ---


@pytest.mark.parametrize("debiased", [False, True])
def test_a_budget_of_zero_scales_to_exact_zero_and_a_step_of_zero_leaves_all(debiased: bool) -> None:
    norms = torch.tensor([1.0, 0.0, 3.0])
    for step in (0.1, 1e-100):
        assert envelope.scale(norms, step, 1.0, 1.0, 0, debiased=debiased).tolist() == [0, 0, 0]
    for k in (0, 1, 5):
        assert envelope.scale(norms, 0.0, 1.0, 1.0, k, debiased=debiased).tolist() == [1, 1, 1]


@pytest.mark.parametrize("pool", [None, torch.zeros(0, dtype=torch.long), 4])
def test_no_groups_are_no_trouble(pool: Tensor | int | None) -> None:
    assert envelope.scale(torch.zeros(0), 0.1, 1.0, 1.0, 1, pool=pool).shape == (0,)
    assert envelope.value(torch.zeros(0), 1.0, 1.0, 1, pool=pool) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_results_have_the_dtype_of_the_norms(dtype: torch.dtype) -> None:
    norms = random(9).to(dtype)
    for result in (envelope.scale(norms, 0.1, 1.0, 1.0, 2), envelope.value(norms, 1.0, 1.0, 2)):
        assert result.dtype == dtype
        assert result.isfinite().all()


def test_flushed_subnormal_norms_count_as_zero() -> None:
    torch.set_flush_denormal(True)
    try:
        scale = envelope.scale(torch.full((3,), 1e-310, dtype=F64), 0.1, 1.0, 1.0, 1)
    finally:
        torch.set_flush_denormal(False)
    assert scale.isfinite().all()


def test_scale_does_not_track_gradients() -> None:
    assert not envelope.scale(random(5).requires_grad_(), 0.1, 1.0, 1.0, 2).requires_grad


# --- devices ---


class Elsewhere(Tensor):
    """A tensor that says it is not on the CPU and refuses to be read by the host."""

    is_cpu = False

    def _refuse(self, *_: object) -> Any:
        raise AssertionError("the host read a tensor of the device")

    for _name in ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "nonzero"):
        locals()[_name] = _refuse


@pytest.mark.parametrize("pool", [None, torch.arange(60) % 7, 5, 60])
@pytest.mark.parametrize("debiased", [False, True])
def test_a_device_is_never_read_and_agrees_with_the_cpu(pool: Tensor | int | None, debiased: bool) -> None:
    norms, d = random(60), 0.5 + random(60, seed=1)
    there = pool.as_subclass(Elsewhere) if isinstance(pool, Tensor) else pool
    scale = envelope.scale(norms.as_subclass(Elsewhere), 0.2, 1.0, d, 2.5, pool=there, debiased=debiased)
    assert close(scale.as_subclass(Tensor), envelope.scale(norms, 0.2, 1.0, d, 2.5, pool=pool, debiased=debiased))
    value = envelope.value(norms.as_subclass(Elsewhere), 1.0, d, 2.5, pool=there)
    assert close(value.as_subclass(Tensor), envelope.value(norms, 1.0, d, 2.5, pool=pool))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_on_a_device_norms_that_are_not_finite_leave_all_groups_alone(bad: float) -> None:
    norms = torch.tensor([1.0, bad, 2.0]).as_subclass(Elsewhere)
    assert envelope.scale(norms, 0.1, 1.0, 1.0, 1).as_subclass(Tensor).tolist() == [1, 1, 1]


@pytest.mark.parametrize("k", [2.0, torch.ones(3, device="meta")])
def test_shapes_do_not_depend_on_values(k: Tensor | float) -> None:
    norms, pool = torch.ones(12, device="meta"), torch.ones(12, dtype=torch.long, device="meta")
    assert envelope.scale(norms, norms, norms, norms, k, pool=pool, debiased=True).shape == (12,)
    assert envelope.value(norms, norms, norms, k, pool=pool).shape == ()
    assert envelope.scale(norms, norms, norms, norms, k, pool=4, debiased=True).shape == (12,)
    assert envelope.value(norms, norms, norms, k, pool=4).shape == ()


# --- errors ---

X = torch.tensor([1.0, 2.0])
ERRORS: dict[str, dict[str, Any]] = {
    "norms from nan": {"norms": torch.tensor([1.0, torch.nan])},
    "norms from 1.0 to inf": {"norms": torch.tensor([1.0, torch.inf])},
    "norms from -1.0": {"norms": torch.tensor([-1.0, 1.0])},
    r"norms are torch.float32 of shape \(1, 2\)": {"norms": X[None]},
    "norms are torch.int64": {"norms": torch.tensor([1, 2])},
    "a from 0.0 to 0.0; weights must be": {"a": 0.0},
    r"a has shape \(3,\), not \(2,\)": {"a": torch.ones(3)},
    "d from -2.0 to 1.0; costs must be": {"d": torch.tensor([1.0, -2.0])},
    "d from inf": {"d": torch.inf},
    "k from -1.0": {"k": -1},
    "k from nan": {"k": torch.tensor([torch.nan])},
    r"k has shape \(2,\) for 1 pools": {"k": torch.ones(2)},
    "step from -0.1": {"step": -0.1},
    "2 groups do not make pools of 3; give a size that divides them": {"pool": 3},
    "2 groups do not make pools of 0": {"pool": 0},
    r"k has shape \(3,\) for 2 pools": {"pool": 1, "k": torch.ones(3)},
    r"pool is torch.int64 of shape \(3,\)": {"pool": torch.zeros(3, dtype=torch.long)},
    "pool is torch.float32": {"pool": torch.zeros(2)},
    r"pool ids from -1 to 0; they must lie in 0..0": {"pool": torch.tensor([0, -1])},
    "step 1.2 × a 1.0 must stay below 1 in the de-biased form": {"step": 1.2, "debiased": True},  # noqa: RUF001
    "step 0.5 × a 2.0 must stay below 1 in the de-biased form": {  # noqa: RUF001
        "a": torch.tensor([1.0, 2.0]),
        "step": torch.full((2,), 0.5),
        "debiased": True,
    },
}


@pytest.mark.parametrize("message", ERRORS)
def test_wrong_input_is_refused_with_its_value(message: str) -> None:
    given: dict[str, Any] = {"norms": X, "step": 0.1, "a": 1.0, "d": 1.0, "k": 1.0, **ERRORS[message]}
    with pytest.raises(ValueError, match=message):
        envelope.scale(**given)


# --- properties ---

positive = st.floats(1e-3, 1e3)
norm = st.one_of(st.just(0.0), st.floats(0, 1e30), st.floats(0, 10, width=32), st.integers(0, 3).map(float))
groups = st.lists(st.tuples(norm, positive, positive), min_size=1, max_size=12)


def columns(rows: list[tuple[float, float, float]]) -> tuple[Tensor, Tensor, Tensor]:
    x, a, d = torch.tensor(rows, dtype=F64).T.contiguous()
    return x, a, d


@given(groups, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(1, 10))
@settings(deadline=None, max_examples=100)
def test_factors_lie_between_zero_and_ridge_and_grow_with_the_budget(
    rows: list[tuple[float, float, float]], step: float, k: float, more: float
) -> None:
    x, a, d = columns(rows)
    less, ridge = envelope.scale(x, step, a, d, k), 1 / (1 + step * a)
    assert (less >= 0).all()
    assert (less <= ridge * (1 + 1e-12)).all()
    assert (less <= envelope.scale(x, step, a, d, k * more) + 1e-12).all()


@given(groups, groups, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_value_is_jointly_convex_in_norms_and_budget(
    rows: list[tuple[float, float, float]], others: list[tuple[float, float, float]], k: float, j: float, t: float
) -> None:
    x, a, d = columns(rows)
    y = torch.nn.functional.pad(columns(others)[0], (0, len(rows)))[: len(rows)]
    chord = (1 - t) * envelope.value(x, a, d, k) + t * envelope.value(y, a, d, j)
    assert envelope.value((1 - t) * x + t * y, a, d, (1 - t) * k + t * j) <= chord * (1 + 1e-11)


@given(groups, st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=100)
def test_value_is_at_least_the_quadratic_and_falls_with_the_budget(
    rows: list[tuple[float, float, float]], k: float
) -> None:
    x, a, d = columns(rows)
    value = envelope.value(x, a, d, k)
    assert value >= (a * x * x).sum() / 2 * (1 - 1e-12)
    assert value >= envelope.value(x, a, d, 2 * k) * (1 - 1e-12)


# --- one large pool of alike groups ---


def drawn(groups: int = 20_000, *, seed: int = 0) -> dict[str, Tensor]:
    """Return norms of several kinds, in float64."""
    x = normal(groups, seed=seed).abs()
    return {
        "half-normal": x,
        "log-normal": normal(groups, seed=seed).mul(3).exp(),
        "many zeros": x * (random(groups, seed=seed + 1) < 0.3),
        "rounded": x.bfloat16().double(),
        "huge": x * 1e25,
        "tiny": x * 1e-25,
        "equal": torch.ones(groups, dtype=F64),
        "one in a thousand": torch.where(random(groups, seed=seed + 1) < 1e-3, x, 1e-3 * x),
        "two heaps": torch.where(random(groups, seed=seed + 1) < 0.5, 10 + x, 1e-4 * x),
    }


def both_ways(monkeypatch: pytest.MonkeyPatch, *given: Any, **named: Any) -> tuple[Tensor, Tensor, float | None]:
    """Return the factors of the threshold search, those of Newton's method, and the multiplier of the former."""
    found: list[float | None] = []
    original = threshold.multiplier

    def seen(*args: Any) -> float | None:
        found.append(original(*args))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(threshold, "LEAST_GROUPS", 1)
        patch.setattr(threshold, "_CHUNK", 1 << 12)
        patch.setattr(threshold, "_SAMPLE", 1 << 10)
        patch.setattr(threshold, "multiplier", seen)
        fast = envelope.scale(*given, **named)
    with monkeypatch.context() as patch:
        patch.setattr(newton, "_FEW", 0)
        return fast, envelope.scale(*given, **named), found[-1]


TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("kind", drawn(1))
def test_two_searches_agree_in_a_large_pool(
    kind: str, debiased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = drawn()[kind].to(dtype).clamp(max=torch.finfo(dtype).max)
    for step in (1e-3, 0.4):
        for share in (0.0, 0.002, 0.3, 0.9):
            fast, slow, _ = both_ways(monkeypatch, norms, step, 0.8, 2.5, 2.5 * share * 20_000, debiased=debiased)
            assert (fast.double() - slow.double()).abs().max() <= TOLERANCE[dtype]
            assert fast.dtype == dtype
            assert fast.min() >= 0
            assert fast.max() <= 1


@pytest.mark.parametrize("debiased", [False, True])
def test_thresholds_zero_the_same_groups_and_leave_the_same_survivors(
    debiased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for norms in (drawn()["half-normal"], drawn()["log-normal"], drawn()["many zeros"]):
        fast, slow, eta = both_ways(monkeypatch, norms, 0.05, 1.0, 1.0, 5000, debiased=debiased)
        assert eta is not None
        assert torch.equal(fast == 0, slow == 0)
        assert torch.equal(fast == fast.max(), slow >= slow.max() * (1 - 1e-12))
        assert fast.max() == (1.0 if debiased else 1 / 1.05)


@pytest.mark.parametrize("missing", [-1, 0, 1, 50])
def test_a_large_pool_near_its_budget(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = drawn()["many zeros"].float()
    k = int((norms > 0).sum()) - missing
    fast, slow, eta = both_ways(monkeypatch, norms, 0.1, 1.0, 1.0, k, debiased=True)
    assert (eta == torch.inf) == (missing <= 0)
    assert close(fast, slow, 1e-6)


def test_thresholds_meet_the_budget_to_the_precision_of_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("half-normal", "log-normal", "many zeros"):
        norms = drawn()[kind].float()
        *_, eta = both_ways(monkeypatch, norms, 0.2, 1.0, 1.0, 4000.5)
        assert eta is not None
        assert (eta * norms.double() - 0.2).clamp(0, 1).sum().item() == pytest.approx(4000.5, rel=3e-7)


def test_doubt_is_admitted_where_no_norm_is_between_the_thresholds() -> None:
    norms = torch.cat([torch.full((1000,), 2.0), torch.full((1000,), 0.1)])
    assert threshold.multiplier(norms, 0.5, 1000.0) is None  # every eta from 0.75 to 5 will do
    assert envelope.scale(norms, 0.5, 1.0, 1.0, 1000).unique().tolist() == pytest.approx([0, 1 / 1.5])


@pytest.mark.parametrize("least", [1, 1 << 30])
@pytest.mark.parametrize("debiased", [False, True])
def test_factors_can_take_the_place_of_the_norms(least: int, debiased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "LEAST_GROUPS", least)
    norms = drawn()["half-normal"]
    fresh = envelope.scale(norms, 0.1, 1.0, 1.0, 4000, debiased=debiased)
    given = norms.clone()
    assert envelope.scale(given, 0.1, 1.0, 1.0, 4000, debiased=debiased, out=given) is given
    assert torch.equal(given, fresh)


def test_numbers_given_per_group_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    norms, pool = drawn()["half-normal"], torch.zeros(20_000, dtype=torch.long)
    a, d, k = torch.full((20_000,), 0.8), torch.full((20_000,), 2.0), torch.tensor([9000.0])
    fast, _, eta = both_ways(monkeypatch, norms, 0.1, a, d, k, pool=pool)
    assert eta is not None
    assert close(fast, envelope.scale(norms, 0.1, float(a[0]), 2.0, 9000.0))
