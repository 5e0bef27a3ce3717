"""The prox of few groups, or of many small pools of equal size, on the CPU: the search of `planner.envelope` in numpy.

Short arrays take numpy a third of the time that they take torch. Pools of equal size M, one after another, are the
columns of matrices (M, n): nothing is indexed, and what is solved leaves the matrix. Other pools are the segments of a
vector. Equations and method are those of `planner.envelope`, in float64 too; only the order of sums differs. Before it
come the problem that all searches share, and its checks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Problem", "check", "check_ids", "check_single_valued", "solve_"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_FEW = 1 << 15  # groups whose vectors stay in the cache
_CHUNK = 1 << 16  # of many pools, as many as still stay there
_MANY = 512  # pools, from which on it pays to take out those that are solved
_SORTED = 1 << 12  # groups, up to which sorting them saves more evaluations than it takes
_EVALUATIONS = 64  # at most
_TINY, _HUGE = 1e-150, 1e150  # stand for 0 and inf where a quotient must stay finite
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Problem:
    """Groups in pools, each pool with its budget."""

    norms: Tensor  # (m,)
    step: Tensor  # (m,) or (1,)
    a: Tensor  # (m,) or (1,)
    d: Tensor  # (m,) or (1,)
    budget: Tensor  # (p,) float64
    pool: Tensor | int | None  # (m,) ids, or the size of every pool where they lie one after another; None for one pool
    debiased: bool = False


def check(name: str, given: Tensor | float, remedy: str, *, above: float = -1.0, finite: bool = True) -> None:
    """Raise ValueError if a number, or a tensor on the CPU, is nan, below 0 or (if `above` is 0) 0, or inf."""
    if isinstance(given, Tensor):
        if not given.is_cpu or given.numel() == 0:
            return
        low, high = (float(bound) for bound in given.detach().aminmax())
    else:
        low = high = float(given)
    valid = low > 0 if above == 0 else low >= 0
    if not valid or (finite and high == torch.inf):
        raise ValueError(f"found {name} from {low} to {high}; {remedy}")


def check_ids(norms: Tensor, pool: Tensor, pools: int) -> None:
    """Raise ValueError if a group has no pool, or (on the CPU) one out of range."""
    if pool.shape != norms.shape or pool.is_floating_point():
        raise ValueError(f"pool is {pool.dtype} of shape {tuple(pool.shape)}; give one integer per group")
    if pool.is_cpu and pool.numel() > 0:
        low, high = (int(bound) for bound in pool.aminmax())
        if low < 0 or high >= pools:
            raise ValueError(f"found pool ids from {low} to {high}; they must lie in 0..{pools - 1}")


def check_single_valued(problem: Problem) -> None:
    """Raise ValueError if step · a reaches 1 on the CPU, where the de-biased prox stops being single-valued."""
    if problem.norms.is_cpu and problem.norms.numel() > 0 and float((product := problem.step * problem.a).max()) >= 1:
        worst = int(product.argmax())
        step, a = (float(given[worst if given.numel() > 1 else 0]) for given in (problem.step, problem.a))
        raise ValueError(
            f"step {step} × a {a} must stay below 1 in the de-biased form; "  # noqa: RUF001
            "lower the learning rate or the strength"
        )


def solve_(factors: Tensor, problem: Problem) -> bool:
    """Fill the factors of the prox, (m,), where this is fastest, or return False; they may be the norms themselves."""
    size = problem.pool if isinstance(problem.pool, int) else problem.norms.numel()
    if not problem.norms.is_cpu or size > _FEW or not problem.norms.numel():
        return False
    with np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore"):
        (_any_ if isinstance(problem.pool, Tensor) else _equal_)(factors, problem)
    return True


def _equal_(factors: Tensor, problem: Problem) -> None:
    """Solve pools of equal size, so many at a time that their groups stay in the cache."""
    size = problem.pool if isinstance(problem.pool, int) else problem.norms.numel()
    budget, pools = problem.budget.numpy(), max(_CHUNK // size, 1)
    for first in range(0, len(budget), pools):
        span = slice(first * size, (first + pools) * size)

        def read(given: Tensor, span: slice = span) -> Floats:
            return np.array(_array(given[span]).reshape(-1, size).T, np.float64, order="C")

        found = _factors(problem, _Columns(size), budget[first : first + pools], read)
        factors[span].view(-1, size).copy_(torch.from_numpy(found).t())


def _any_(factors: Tensor, problem: Problem) -> None:
    """Solve pools of any size, sorted by pool and without those that have no groups."""
    assert isinstance(problem.pool, Tensor)
    ids = problem.pool.numpy()
    order = slice(None) if (ids[1:] >= ids[:-1]).all() else ids.argsort(kind="stable")
    sizes = np.bincount(ids)
    pools = np.flatnonzero(sizes)
    sizes = sizes[pools]
    result = np.empty(len(ids))
    result[order] = _factors(
        problem, _Segments(sizes), problem.budget.numpy()[pools], lambda given: _array(given).astype(np.float64)[order]
    )
    factors.copy_(torch.from_numpy(result))


def _array(given: Tensor) -> NDArray[Any]:
    """Return a tensor as an array, a copy only where numpy lacks the type."""
    array: NDArray[Any] = (given.float() if given.dtype == torch.bfloat16 else given).numpy()
    return array


@dataclass(frozen=True)
class _Columns:
    """n pools of equal size, the columns of matrices (M, n)."""

    size: int  # M

    @property
    def noise(self) -> float:
        """The relative rounding error to expect of a sum over a pool."""
        return float(self.size**0.5 + 16) * _EPS

    def gather(self, reduce: np.ufunc, values: NDArray[Any]) -> Floats:
        """Reduce the values of each pool to one: (n,)."""
        return reduce.reduce(values, 0)  # type: ignore[no-any-return]

    def count(self, chosen: Bools) -> NDArray[Any]:
        """Return how many groups of each pool are chosen: (n,)."""
        return np.add.reduce(chosen.view(np.uint8), 0, np.uint8 if self.size < 256 else np.int64)  # type: ignore[no-any-return]

    def spread(self, per_pool: NDArray[Any]) -> NDArray[Any]:
        """Give every group the number of its pool, by broadcasting."""
        return per_pool


class _Segments:
    """n pools with groups, one after another in vectors (m,)."""

    def __init__(self, sizes: NDArray[np.int64]) -> None:
        """Number the pools."""
        self._sizes, self._starts = sizes, sizes.cumsum() - sizes
        self._pool = np.arange(len(sizes)).repeat(sizes)
        self.noise: Floats = (np.sqrt(sizes) + 16) * _EPS

    def gather(self, reduce: np.ufunc, values: NDArray[Any]) -> Floats:
        """Reduce the values of each pool to one: (n,)."""
        return reduce.reduceat(values, self._starts)

    def count(self, chosen: Bools) -> NDArray[Any]:
        """Return how many groups of each pool are chosen: (n,)."""
        return np.add.reduceat(chosen.view(np.uint8), self._starts, 0, np.int64)

    def spread(self, per_pool: NDArray[Any]) -> NDArray[Any]:
        """Give every group the number of its pool: (m,)."""
        spread: NDArray[Any] = per_pool[self._pool]
        return spread

    def guess(self, c: Floats, b: float, k: Floats) -> Floats:
        """Return the multipliers, were no u_j clipped from below: (n,), up to rounding; `k` are budgets in groups."""
        top = c.max()
        keys = np.sort(self._pool - c / (2 * top))  # each pool from its largest c on
        c = (self._pool - keys) * (2 * top)
        left = self.spread(self._sizes) - np.arange(len(c)) + self.spread(self._starts)  # of the pool, from this c on
        sums = c.cumsum()
        sums = self.spread(sums[self._starts + self._sizes - 1]) - sums + c
        eta: Floats = (self.spread(k - self._sizes) + left * (1 + b)) / sums  # those before this c are full
        full = self.count(eta * c > 1 + b)
        found: Floats = eta.take(self._starts + np.minimum(full, self._sizes - 1))
        return found


@dataclass(frozen=True)
class _Pools:
    """n pools: c_j, b_j and d_j of `planner.envelope`, and the budgets (n,); a number stands for an array of it."""

    layout: _Columns | _Segments
    c: Floats
    b: Floats | float
    d: Floats | float
    k: Floats
    noise: Floats  # the rounding error to expect of a sum of d_j u_j that is k: (n,)

    def cost(self, chosen: Bools) -> Floats:
        """Return the sum of d_j over the chosen groups of each pool: (n,)."""
        if isinstance(self.d, float):
            return self.d * self.layout.count(chosen)
        return self.layout.gather(np.add, chosen * self.d)

    def total(self, values: Floats) -> Floats:
        """Return sum d_j values_j of each pool: (n,)."""
        if isinstance(self.d, float):
            return self.d * self.layout.gather(np.add, values)
        return self.layout.gather(np.add, values * self.d)

    def extreme(self, reduce: np.ufunc, values: Floats, by: Floats | float) -> Floats:
        """Return the least or the largest quotient of each pool: (n,)."""
        if isinstance(by, float):
            return self.layout.gather(reduce, values) / by
        return self.layout.gather(reduce, values / by)

    def lines(self, eta: Floats) -> Floats:
        """Return eta c_j - b_j."""
        line: Floats = self.c * self.layout.spread(eta)
        line -= self.b
        return line

    def excess(self, eta: Floats) -> tuple[Floats, Floats]:
        """Return h = sum d_j u_j - k and its derivative in eta: (n,), (n,)."""
        line = self.lines(eta)
        u = line.clip(0, 1)
        inside = np.equal(line, u)
        return self.total(u) - self.k, self.total(np.multiply(inside, self.c, out=line))

    def only(self, pools: NDArray[np.intp]) -> "_Pools":
        """Return some of the pools, of equal size."""
        b, d = (each if isinstance(each, float) else each.take(pools, 1) for each in (self.b, self.d))
        return replace(self, c=self.c.take(pools, 1), b=b, d=d, k=self.k[pools], noise=self.noise[pools])


def _factors(problem: Problem, layout: _Columns | _Segments, k: Floats, read: Callable[[Tensor], Floats]) -> Floats:
    """Return the factors, in the shape that `read` gives the norms."""
    step, a, d = (float(each) if each.numel() == 1 else read(each) for each in (problem.step, problem.a, problem.d))
    x = read(problem.norms)
    largest = layout.gather(np.maximum, x)
    c = x / layout.spread(np.where(largest > 0, largest, 1.0))
    r = np.minimum(step * a, 1 - _EPS if problem.debiased else _HUGE)
    room = 1 - r if problem.debiased else 1.0
    c *= np.sqrt(a / d) / room
    u = _usage(_Pools(layout, c, r / room, d, k, k * layout.noise), x > 0)
    if not np.all(r):
        u = np.where(r == 0, 1.0, u)
    result: Floats = u / (u + r * (1 - u) if problem.debiased else u + r)
    return result


def _usage(pools: _Pools, alive: Bools) -> Floats:
    """Return u_j; `alive` are the norms above 0."""
    cost = pools.cost(alive)
    slack = cost <= pools.k + pools.noise
    if slack.all():
        return np.ones_like(pools.c)
    u = pools.lines(_settled(pools, _newton(pools, alive, cost, slack))).clip(0, 1)
    return np.maximum(u, pools.layout.spread(slack)) if slack.any() else u


def _newton(pools: _Pools, alive: Bools, cost: Floats, slack: Bools) -> Floats:
    """Return the multipliers, and 0 where a pool needs none."""
    c, b, k = pools.c, pools.b, pools.k
    area, shift = pools.total(c), b * cost if isinstance(b, float) else pools.total(alive * b)
    low = np.maximum(k / area, 1 / pools.extreme(np.maximum, c, np.maximum(b, _TINY)))
    high = np.minimum(1 / pools.extreme(np.minimum, c if alive.all() else _HUGE * ~alive + c, 1 + b), _HUGE)
    done = slack | (pools.k <= 0)
    start = (k + shift) / area  # the root, were every u_j between 0 and 1
    if isinstance(pools.layout, _Segments) and c.size <= _SORTED and isinstance(b, float):
        start = pools.layout.guess(c, b, k / pools.d) if isinstance(pools.d, float) else start
    eta = np.where(done, 0.0, start.clip(low, high))
    found, at, halved, before = eta, np.arange(len(eta)), np.zeros_like(done), np.full_like(eta, np.inf)
    for _ in range(_EVALUATIONS):
        open_ = len(at) - np.count_nonzero(done)
        if not open_:
            break
        if len(at) >= _MANY and isinstance(pools.layout, _Columns) and 2 * open_ <= len(at):
            found[at] = eta
            rest = np.flatnonzero(~done)
            pools, at = pools.only(rest), at[rest]
            eta, low, high, done, halved, before = (each[rest] for each in (eta, low, high, done, halved, before))
        excess, rate = pools.excess(eta)
        size, under, step = np.abs(excess), excess < 0, excess / rate
        newton = eta - step
        np.putmask(low, under, eta)
        np.putmask(high, ~under, eta)
        near = (size <= pools.noise) | (np.abs(step) <= 4 * _EPS * eta) | (high <= low * (1 + 4 * _EPS))
        useful = (newton > low) & (newton < high) & (near | halved | (size <= before / 2))
        halved, before = ~useful, size
        if (rest := np.flatnonzero(halved)).size:
            newton[rest] = np.where(near[rest], eta[rest], np.sqrt(low[rest]) * np.sqrt(high[rest]))
        np.putmask(newton, done, eta)
        eta, done = newton, done | near
    found[at] = eta
    return found


def _settled(pools: _Pools, eta: Floats) -> Floats:
    """Move eta to the middle of its interval where h = 0 on an interval, lest rounding leave a factor that is tiny."""
    kept = pools.lines(eta) >= 0.5
    cost = pools.cost(kept)
    met = (cost > 0) & (np.abs(cost - pools.k) <= pools.noise)
    if not met.any():
        return eta
    full = pools.extreme(np.minimum, _HUGE * ~kept + pools.c, 1 + pools.b)
    empty = pools.extreme(np.maximum, ~kept * pools.c, np.maximum(pools.b, _TINY))
    even = met & (empty > 0) & (empty < full)
    return np.where(even, 1 / (np.sqrt(full) * np.sqrt(empty)), eta)
