"""The envelope, its prox and its de-biased prox against certificates of optimality and a second root search.

Each family is a batch of random problems of one size, solved as the pools of one call. The certificates are computed in
extended precision from the definitions, with no part of the solver.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from planner import envelope, newton

Array = NDArray[Any]
PROBLEMS, GROUPS = 1000, 24  # of each family
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


@dataclass(frozen=True)
class Batch:
    """Problems in rows, groups in columns; `step` and `k` are columns of one number a problem."""

    x: Array
    a: Array
    d: Array
    step: Array
    k: Array


def draw(family: str, rng: np.random.Generator, problems: int = PROBLEMS, groups: int = GROUPS) -> Batch:
    def uniform(low: float, high: float, columns: int = groups) -> Array:
        return rng.uniform(low, high, (problems, columns))

    one = np.ones((problems, groups))
    x, a, d = np.abs(rng.standard_normal((problems, groups))), one, one
    step, part = 10 ** uniform(-3, 1, 1), uniform(0.001, 0.999, 1)
    match family:
        case "integer budget":
            return Batch(x, a, d, step, rng.integers(1, groups, (problems, 1)).astype(float))
        case "norms span 1e30":
            x = 10 ** uniform(-15, 15)
        case "costs span 1e6":
            d = 10 ** uniform(-3, 3)
        case "weights and costs span 1e6":
            a, d, step = 10 ** uniform(-3, 3), 10 ** uniform(-3, 3), step / 10
        case "everything spans":
            x, a, d = 10 ** uniform(-15, 15), 10 ** uniform(-1, 1), 10 ** uniform(-3, 3)
        case "ties and zeros":
            x, k = rng.integers(0, 4, (problems, groups)).astype(float), rng.integers(1, groups, (problems, 1))
            return Batch(x, a, d, step, k.astype(float))
        case "near ties":
            x, d = 1 + 1e-10 * uniform(-1, 1), 10 ** uniform(-1, 1)
        case "break-points that accumulate":
            x = 1 + 2.0 ** -rng.integers(1, 52, (problems, groups)) * rng.choice([-0.9, 1], (problems, groups))
        case "long steps":
            step = 10 ** uniform(1, 3, 1)
        case "short steps":
            step = 10 ** uniform(-6, -3, 1)
        case "budget below every cost":
            d = 10 ** uniform(-3, 3)
            return Batch(x, a, d, step, part * d.min(1, keepdims=True))
        case "budget above all costs":
            d = 10 ** uniform(-3, 3)
            return Batch(x, a, d, step, (1 + part) * d.sum(1, keepdims=True))
        case "one group":
            x, a, d = x[:, :1], a[:, :1], 10 ** uniform(-3, 3, 1)
        case "four groups":
            x, a, d = x[:, :4], a[:, :4], d[:, :4]
    return Batch(x, a, d, step, part * d.sum(1, keepdims=True))


FAMILIES = (
    "plain",
    "integer budget",
    "norms span 1e30",
    "costs span 1e6",
    "weights and costs span 1e6",
    "everything spans",
    "ties and zeros",
    "near ties",
    "break-points that accumulate",
    "long steps",
    "short steps",
    "budget below every cost",
    "budget above all costs",
    "one group",
    "four groups",
)


@pytest.fixture(params=FAMILIES)
def batch(request: pytest.FixtureRequest) -> Batch:
    return draw(request.param, np.random.default_rng(FAMILIES.index(request.param)))


def single_valued(batch: Batch) -> Batch:
    """Shorten the steps until the de-biased prox is single-valued."""
    return Batch(batch.x, batch.a, batch.d, np.minimum(batch.step, 0.9 / batch.a.max(1, keepdims=True)), batch.k)


def rounded(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return the batch that a tensor of this dtype holds."""
    x, a, d, step = (torch.tensor(part).to(dtype).double().numpy() for part in (batch.x, batch.a, batch.d, batch.step))
    return Batch(x, a, d, step, batch.k)


def pooled(batch: Batch, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Return the arguments of `value`, with the problems as pools."""
    tensors = {
        name: torch.tensor(part.ravel()).to(dtype)
        for name, part in (("norms", batch.x), ("a", batch.a), ("d", batch.d))
    }
    pool = torch.arange(len(batch.x)).repeat_interleave(batch.x.shape[1])
    return {**tensors, "k": torch.tensor(batch.k.ravel()), "pool": pool}


def factors(batch: Batch, *, debiased: bool, dtype: torch.dtype = torch.float64) -> Array:
    step = torch.tensor(np.broadcast_to(batch.step, batch.x.shape).ravel()).to(dtype)
    result: Array = envelope.scale(step=step, debiased=debiased, **pooled(batch, dtype)).double().numpy()
    return result.reshape(batch.x.shape)


def sorted_search(batch: Batch, *, debiased: bool) -> Array:
    """Return u from sorted break-points: bisect their order, then solve the piece; independent of the solver."""
    x, a, d, step, k = (np.asarray(part, np.longdouble) for part in (batch.x, batch.a, batch.d, batch.step, batch.k))
    top = x.max(1, keepdims=True)
    ridge = np.broadcast_to(step * a, x.shape)
    room = 1 - ridge if debiased else np.ones_like(ridge)
    c, b = x / np.where(top > 0, top, 1) * np.sqrt(a / d) / room, ridge / room
    with np.errstate(divide="ignore", invalid="ignore"):
        start, end = np.where(c > 0, b / c, np.inf), np.where(c > 0, (1 + b) / c, np.inf)
        points = np.pad(np.sort(np.concatenate([start, end], 1), 1), ((0, 0), (1, 0)))  # h(0) = -k
        left, right = np.zeros(len(x), int), np.isfinite(points).sum(1) - 1
        while (right - left > 1).any():
            middle = (left + right) // 2
            at = np.take_along_axis(points, middle[:, None], 1)
            below = (d * np.clip(np.where(np.isfinite(at), at * c - b, 0), 0, 1)).sum(1) < k[:, 0]
            left, right = np.where(below, middle, left), np.where(below, right, np.maximum(middle, left + 1))
        low, high = (np.take_along_axis(points, side[:, None], 1) for side in (left, np.maximum(right, 0)))
        full, inside = end <= low, (start <= low) & (end >= high) & (c > 0)
        eta = k - (d * full).sum(1, keepdims=True) + (d * b * inside).sum(1, keepdims=True)
        eta = eta / (d * c * inside).sum(1, keepdims=True)
        u = np.where(inside, np.clip(eta * c - b, 0, 1), full)
    return np.where((d * (x > 0)).sum(1, keepdims=True) <= k, 1, u)


def knapsack(batch: Batch, y: Array) -> Array:
    """Return GS*(y) of each row: half the fractional knapsack of y^2 / a with costs d and budget k."""
    d, worth = np.asarray(batch.d, np.longdouble), np.asarray(y, np.longdouble) ** 2 / batch.a
    order = np.argsort(-worth / d, 1)
    cost, worth = np.take_along_axis(d, order, 1), np.take_along_axis(worth, order, 1)
    taken = np.clip((batch.k - (np.cumsum(cost, 1) - cost)) / cost, 0, 1)
    total: Array = (taken * worth).sum(1) / 2
    return total


def primal(batch: Batch, w: Array) -> Array:
    """Return GS(w) of each row by its definition, at the u of the sorted search."""
    w = np.asarray(w, np.longdouble)
    rows = Batch(w, batch.a, batch.d, np.zeros_like(batch.step), batch.k)
    u = sorted_search(rows, debiased=False)
    total: Array = (batch.a * w * w / np.where(w > 0, u, 1)).sum(1) / 2
    return total


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("debiased", [False, True])
def test_two_root_searches_agree(batch: Batch, debiased: bool, dtype: torch.dtype) -> None:
    batch = rounded(single_valued(batch) if debiased else batch, dtype)
    u = sorted_search(batch, debiased=debiased)
    ridge = batch.step * batch.a
    expected = u / (u + ridge * (1 - u)) if debiased else u / (u + ridge)
    assert np.abs(factors(batch, debiased=debiased, dtype=dtype) - expected).max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("debiased", [False, True])
def test_groups_beyond_the_threshold_are_exactly_zero(batch: Batch, debiased: bool) -> None:
    batch = single_valued(batch) if debiased else batch
    u, found = sorted_search(batch, debiased=debiased), factors(batch, debiased=debiased)
    assert ((found == 0) == (u == 0)).all()
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_moreau_decomposition(batch: Batch, dtype: torch.dtype) -> None:
    """x = w + step y with w = prox_{step GS}(x) and y = prox_{GS*/step}(x / step) iff step times the gap of Fenchel
    and Young, GS(w) + GS*(y) - <w, y> >= 0, is 0; its unit is that of |x|^2 / 2, the sum of both minima."""
    batch = rounded(batch, dtype)
    x = np.asarray(batch.x, np.longdouble)
    w = x * factors(batch, debiased=False, dtype=dtype)
    y = (x - w) / batch.step
    gap = primal(batch, w) + knapsack(batch, y) - (w * y).sum(1)
    assert (np.abs(gap) * batch.step[:, 0] <= TOLERANCE[dtype] * (x * x).sum(1) / 2).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fenchel_young_at_the_gradient(batch: Batch, dtype: torch.dtype) -> None:
    """GS(w) + GS*(y) = <w, y> at y = the gradient of GS in w, whose inner product with w is 2 GS(w)."""
    batch = rounded(batch, dtype)
    given = pooled(batch, dtype)
    given["norms"].requires_grad_()
    (gradient,) = torch.autograd.grad(envelope.value(**given), given["norms"])
    y = gradient.double().numpy().reshape(batch.x.shape)
    product = (np.asarray(batch.x, np.longdouble) * y).sum(1)
    scale = np.where(product > 0, product, 1)
    assert (np.abs(knapsack(batch, y) - product / 2) <= TOLERANCE[dtype] * scale).all()
    assert (np.abs(primal(batch, batch.x) - product / 2) <= TOLERANCE[dtype] * scale).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_are_those_of_the_definition(batch: Batch, dtype: torch.dtype) -> None:
    batch = rounded(batch, dtype)
    batch = Batch(batch.x / batch.x.max(1, keepdims=True).clip(1e-300), batch.a, batch.d, batch.step, batch.k)
    batch = rounded(batch, dtype)  # every problem counts in the sum
    convex = primal(batch, batch.x).sum()
    u = sorted_search(Batch(batch.x, batch.a, batch.d, 0 * batch.step, batch.k), debiased=False)
    x = np.asarray(batch.x, np.longdouble)
    debiased = (batch.a * x * x * np.where(x > 0, (1 - u) / np.where(u > 0, u, 1), 0)).sum() / 2
    given = pooled(batch, dtype)
    assert abs(envelope.value(**given).item() - convex) <= TOLERANCE[dtype] * convex
    assert abs(envelope.debiased_value(**given).item() - debiased) <= TOLERANCE[dtype] * debiased


@pytest.mark.parametrize("debiased", [False, True])
def test_the_budget_is_met_by_the_multipliers(batch: Batch, debiased: bool) -> None:
    """KKT: u, read back from the factors, costs exactly k; where rounding of 1 - factor leaves u readable."""
    batch = single_valued(batch) if debiased else batch
    ridge = np.asarray(batch.step * batch.a, np.longdouble)
    found = np.asarray(factors(batch, debiased=debiased), np.longdouble)
    u = ridge * found / (1 - found * (1 - ridge) if debiased else 1 - found)
    rounding = np.finfo(float).eps * (1 + 1 / ridge) * (1 + ridge) ** 2
    tight = (batch.d * (batch.x > 0)).sum(1) > batch.k[:, 0] * (1 + 1e-12)
    excess = np.abs((batch.d * u).sum(1) - batch.k[:, 0])
    allowed = 1e-11 * batch.k[:, 0] + 4 * (batch.d * rounding).sum(1)
    assert (excess <= allowed)[tight].all()
    assert (u >= 1 - 4 * rounding)[~tight].all()


@pytest.mark.parametrize("debiased", [False, True])
def test_the_root_search_stays_far_below_its_limit(
    batch: Batch, debiased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations = []
    original = envelope._spend

    def counted(*given: Any) -> Any:
        evaluations.append(1)
        return original(*given)

    monkeypatch.setattr(newton, "_FEW", 0)  # small problems are solved in numpy, see test_newton.py
    monkeypatch.setattr(envelope, "_spend", counted)
    factors(single_valued(batch) if debiased else batch, debiased=debiased)
    assert 0 < len(evaluations) <= 18 < envelope._EVALUATIONS


def exact_factors(x: list[int], root_a: list[int], root_d: list[int], step: Fraction, k: Fraction) -> list[Fraction]:
    """Return the factors in rational numbers, for weights and costs that are squares."""
    c = [Fraction(xj * aj, dj) for xj, aj, dj in zip(x, root_a, root_d, strict=True)]
    b, d = [step * aj**2 for aj in root_a], [dj**2 for dj in root_d]

    def usage(eta: Fraction) -> list[Fraction]:
        return [min(max(eta * cj - bj, Fraction(0)), Fraction(1)) for cj, bj in zip(c, b, strict=True)]

    def spent(eta: Fraction) -> Fraction:
        return sum((dj * uj for dj, uj in zip(d, usage(eta), strict=True)), Fraction(0))

    if sum(d) <= k:
        return [1 / (1 + bj) for bj in b]
    points = sorted(
        {
            Fraction(0),
            *(bj / cj for cj, bj in zip(c, b, strict=True)),
            *((1 + bj) / cj for cj, bj in zip(c, b, strict=True)),
        }
    )
    right = next(i for i, point in enumerate(points) if spent(point) >= k)
    low, high = points[right - 1], points[right]
    eta = low + (high - low) * (k - spent(low)) / (spent(high) - spent(low))
    return [uj / (uj + bj) for uj, bj in zip(usage(eta), b, strict=True)]


def test_factors_are_right_to_the_last_digits_of_rational_arithmetic() -> None:
    rng = np.random.default_rng(7)
    worst = 0.0
    for _ in range(300):
        groups = int(rng.integers(1, 7))
        x, root_a, root_d = (rng.integers(1, high, groups).tolist() for high in (50, 4, 6))
        step = Fraction(int(rng.integers(1, 64)), 32)
        k = Fraction(int(rng.integers(1, 4 * sum(dj**2 for dj in root_d))), 4)
        found = envelope.scale(
            torch.tensor(x, dtype=torch.float64),
            float(step),
            torch.tensor(root_a) ** 2,
            torch.tensor(root_d) ** 2,
            float(k),
        )
        exact = exact_factors(x, root_a, root_d, step, k)
        worst = max(worst, *(float(abs(Fraction(f) - e)) for f, e in zip(found.tolist(), exact, strict=True)))
    assert worst <= 32 * np.finfo(float).eps


SCALES: dict[str, Callable[[Array], Array]] = {
    "subnormal": lambda x: np.ldexp(x, -1040),
    "huge": lambda x: np.ldexp(x, 900),
    "tiny": lambda x: np.ldexp(x, -600),
}


@pytest.mark.parametrize("size", SCALES)
@pytest.mark.parametrize("debiased", [False, True])
def test_factors_do_not_depend_on_the_size_of_the_norms(size: str, debiased: bool) -> None:
    plain = single_valued(draw("plain", np.random.default_rng(3)))
    shifted = SCALES[size](np.ldexp(np.rint(np.ldexp(plain.x, 20)), -20))  # few digits: exact also as a subnormal
    batch = Batch(shifted, plain.a, plain.d, plain.step, plain.k)
    same = Batch(np.ldexp(np.rint(np.ldexp(plain.x, 20)), -20), plain.a, plain.d, plain.step, plain.k)
    assert np.abs(factors(batch, debiased=debiased) - factors(same, debiased=debiased)).max() <= 1e-14
