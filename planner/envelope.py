"""The weighted group sparse envelope (WGSEF): its value, its prox and its de-biased form, as functions of group norms.

Source: Refael, Arbel, Huleihel, "Learning k-Level Structured Sparse Neural Networks Using Group Envelope
Regularization" (arXiv 2212.12921), after Beck and Refael, "Sparse Regularization via Bidualization" (2022). For groups
w_1..w_m with norms x_j = |w_j|, weights a_j > 0, costs d_j > 0 and a budget k, in the unit of the costs,

    GS(w) = min over u of  1/2 sum a_j x_j^2 / u_j   subject to  0 <= u_j <= 1,  sum d_j u_j <= k      (0/0 = 0)

is the convex envelope of "1/2 sum a_j x_j^2, if the groups that are not zero cost at most k". The paper has d_j = 1 and
an integer k. Derived beyond it: general costs, where GS is the LP relaxation (u_j may be fractional, also for d_j > k),
with their prox; and the de-biased form D(w) = GS(w) - 1/2 sum a_j x_j^2 >= 0 with its prox. D(w) = 0 if and only if
the groups that are not zero cost at most k.

One root search serves all of them. With c_j = x_j sqrt(a_j / d_j), the multiplier eta >= 0 of the budget solves

    h(eta) = sum d_j u_j - k = 0,   u_j = clip(eta c_j - b_j, 0, 1),

    value            b_j = 0                          GS = 1/2 sum d_j c_j max(c_j, 1/eta),  dGS/dx_j = a_j x_j / u_j
    de-biased value  b_j = 0                          D  = 1/2 sum d_j c_j max(1/eta - c_j, 0)
    prox             b_j = r_j = step a_j             w_j <- w_j u_j / (u_j + r_j)
    de-biased prox   b_j = r_j / (1 - r_j), and       w_j <- w_j u_j / (u_j + r_j (1 - u_j))
                     x_j / (1 - r_j) in place of x_j

and u = 1 where the groups that are not zero cost at most k. h is non-decreasing and piecewise linear. Newton's method
solves a piece exactly; where its step leaves the bracket, or the last one did not halve |h|, the logarithm of the
bracket is halved instead.

Many pools, each with its own budget, are solved together, in float64 and relative to the largest norm of the pool, so
that neither 1e30 nor 1e-40 is lost in float32. The groups are passed over in chunks: beside the result, a call with one
pool holds one float64 vector (m,). On the CPU `planner.newton` serves the prox of few groups and that of small pools of
equal size, `planner.threshold` that of one large pool of alike groups; they hold no vector. Off the CPU nothing is read
back to the host: the evaluations are fixed in number. A device without float64 (Apple's MPS) is not served.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from planner import newton, threshold

__all__ = ["debiased_value", "scale", "value"]

_EVALUATIONS = 64  # at most: 16 is the worst of 1e5 random problems whose norms span 1e30, 53 with steps up to 1e12
_TINY, _HUGE = 1e-150, 1e150  # stand for 0 and inf where a quotient must stay finite
_EPS = torch.finfo(torch.float64).eps
_CHUNK_CPU = 1 << 15  # stays in the cache, and on the calling thread: torch forks for longer tensors, at a loss
_SAMPLE = 1 << 14  # of so many groups the multiplier is within about 1 %
_CHUNK_DEVICE = 1 << 22  # long enough to hide the launch of a kernel


def value(
    norms: Tensor, a: Tensor | float, d: Tensor | float, k: Tensor | float, *, pool: Tensor | int | None = None
) -> Tensor:
    """Return the envelope GS of the groups with these norms, summed over pools: (), in the dtype of the norms.

    norms: (m,). a, d: (m,) or numbers. k: a number, or (p,). pool: (m,) ids 0..p-1, or None for one pool, or the one
    size of all pools, where they lie one after another as for N:M: without ids they take a fraction of the time.
    Differentiable once, in norms: a_j x_j / u_j, and 0 (the least subgradient) at x_j = 0. A pool with k = 0 and a norm
    above zero has the value inf. Raises ValueError as `scale` does; off the CPU, non-finite norms give nan or inf.
    """
    return _Value.apply(norms, _problem(norms, a, d, k, pool), False)  # type: ignore[no-any-return,no-untyped-call]


def debiased_value(
    norms: Tensor, a: Tensor | float, d: Tensor | float, k: Tensor | float, *, pool: Tensor | int | None = None
) -> Tensor:
    """Return GS - 1/2 sum a x^2, summed over pools: (), exactly 0 if and only if every pool is within its budget.

    It is summed without the cancellation of that difference. Arguments, gradient and errors are those of `value`.
    """
    return _Value.apply(norms, _problem(norms, a, d, k, pool), True)  # type: ignore[no-any-return,no-untyped-call]


@torch.no_grad()
def scale(
    norms: Tensor,
    step: Tensor | float,
    a: Tensor | float,
    d: Tensor | float,
    k: Tensor | float,
    *,
    pool: Tensor | int | None = None,
    debiased: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Return the factors (m,) in [0, 1] for which w_j <- scale_j w_j is the prox of step · GS, or of step · D.

    step: learning rate × strength, a number, () or (m,) and then constant within a pool; the rest is as in `value`.
    Groups beyond the threshold get exactly 0, as do all groups of a pool with k = 0 and, in a pool over its budget,
    those of norm 0. A pool within its budget gets 1 / (1 + step a), de-biased exactly 1. Where step = 0 the factor
    is 1, whatever k. out: where to write them, of the norms' shape and dtype; the norms themselves may be given up.

    Raises ValueError where norms are negative or not finite, a or d not positive, k or step negative, a pool id is
    outside 0..p-1, or step · a >= 1 in the de-biased form, whose prox is then not single-valued. Values are checked on
    the CPU only. Elsewhere every factor is 1 if any norm is not finite, and step · a is held below 1.
    """
    newton.check("step", step, "learning rate times strength must be finite and not negative")
    problem = replace(_problem(norms, a, d, k, pool), step=_per_group("step", step, norms), debiased=debiased)
    if debiased:
        newton.check_single_valued(problem)
    factors = torch.empty_like(problem.norms) if out is None else out
    if threshold.solve_(factors, problem) or newton.solve_(factors, problem):
        return factors
    sound = torch.isfinite(problem.norms.amax()) if not factors.is_cpu and factors.numel() > 0 else None
    root = _settled(problem, _root(problem))
    for part in problem.parts():
        r = part.ridge()
        u = torch.maximum(root.usage(part), (r == 0).double())
        factors[part.span] = u / (torch.addcmul(u, r, 1 - u) if debiased else u + r)
    return factors if sound is None else factors.masked_fill_(~sound, 1.0)


class _Problem(newton.Problem):
    """Groups in pools, passed over in chunks."""

    @cached_property
    def noise(self) -> Tensor:
        """The relative rounding error to expect of sums: pairwise over one pool, group by group over several: (p,)."""
        if self.pool is None:
            return self.per_pool(16 * _EPS)
        if isinstance(self.pool, int):
            return self.per_pool((self.pool**0.5 + 16) * _EPS)
        one = self.budget.new_ones(1).expand(self.pool.numel())
        return self.per_pool().scatter_add_(0, self.pool.long(), one).sqrt_().add_(16).mul_(_EPS)

    def parts(self) -> Iterator["_Part"]:
        """Yield the groups in chunks, so that what is computed on the way stays small."""
        length, size = _CHUNK_CPU if self.norms.is_cpu else _CHUNK_DEVICE, self.pool
        length = max(length - length % size, size) if isinstance(size, int) else length  # no pool is in two chunks
        for start in range(0, self.norms.numel(), length):
            yield _Part(self, slice(start, min(start + length, self.norms.numel())))

    def per_pool(self, fill: float = 0.0) -> Tensor:
        """Return a new (p,) float64 tensor."""
        return torch.full_like(self.budget, fill)


@dataclass(frozen=True)
class _Part:
    """A chunk of n groups, read in float64."""

    problem: _Problem
    span: slice

    def cut(self, per_group: Tensor) -> Tensor:
        """Return the chunk of a tensor (m,), and a tensor (1,) as it is."""
        return (per_group if per_group.numel() == 1 else per_group[self.span]).double()

    def ridge(self) -> Tensor:
        """Return r_j = step a_j."""
        ridge = self.cut(self.problem.step) * self.cut(self.problem.a)
        return ridge.clamp_(max=1 - _EPS if self.problem.debiased else _HUGE)

    def offset(self) -> Tensor:
        """Return b_j."""
        ridge = self.ridge()
        return ridge / (1 - ridge) if self.problem.debiased else ridge

    def spread(self, per_pool: Tensor) -> Tensor:
        """Give every group the number of its pool: (p,) -> (n,), or (1,) where there is one pool."""
        pool = self.problem.pool
        if isinstance(pool, int):
            return self._own(per_pool, pool).repeat_interleave(pool)
        return per_pool if pool is None else per_pool.index_select(0, pool[self.span])

    def _own(self, per_pool: Tensor, size: int) -> Tensor:
        """Return the entries of the pools in the chunk, which are of this size."""
        return per_pool[self.span.start // size : self.span.stop // size]

    def add_(self, per_pool: Tensor, values: Tensor) -> None:
        """Add the (n,) values to the sums of their pools."""
        pool = self.problem.pool
        if pool is None:
            per_pool.add_(values.sum())
        elif isinstance(pool, int):
            self._own(per_pool, pool).add_(values.view(-1, pool).sum(1))
        else:
            per_pool.scatter_add_(0, pool[self.span].long(), values)

    def reduce_(self, per_pool: Tensor, values: Tensor, reduce: str) -> None:
        """Lower ("amin") or raise ("amax") the extremes of the pools to the (n,) values."""
        pool = self.problem.pool
        if isinstance(pool, int):
            values = values.view(-1, pool)
            self._own(per_pool, pool).copy_(values.amin(1) if reduce == "amin" else values.amax(1))
        elif pool is not None:
            per_pool.scatter_reduce_(0, pool[self.span].long(), values, reduce)
        elif reduce == "amin":
            per_pool.clamp_(max=values.amin())
        else:
            per_pool.clamp_(min=values.amax())


@dataclass(frozen=True)
class _Root:
    """The multipliers, for norms relative to the largest of their pool."""

    reach: Tensor  # (m,) c_j
    largest: Tensor  # (p,)
    eta: Tensor  # (p,), 0 where the budget is 0
    slack: Tensor  # (p,) bool: the pool is within its budget, whatever eta says

    def usage(self, part: _Part) -> Tensor:
        """Return u_j: (n,)."""
        u = part.spread(self.eta) * part.cut(self.reach)
        u.sub_(part.offset()).clamp_(0, 1)
        return torch.maximum(u, part.spread(self.slack).double(), out=u)


def _root(problem: _Problem) -> _Root:
    """Find the multipliers."""
    largest = problem.per_pool()
    for part in problem.parts():
        part.reduce_(largest, part.cut(problem.norms), "amax")
    return _search(problem, *_bracket(problem, torch.where(largest > 0, largest, 1.0)))


def _bracket(problem: _Problem, largest: Tensor) -> tuple[_Root, Tensor, Tensor]:
    """Return where Newton's method starts, and the least and the largest that the multipliers can be: (p,), (p,)."""
    reach = torch.empty_like(problem.norms, dtype=torch.float64)
    cost, area, shift = problem.per_pool(), problem.per_pool(), problem.per_pool()
    first, last = problem.per_pool(), problem.per_pool(torch.inf)
    for part in problem.parts():
        x, d, b = part.cut(problem.norms), part.cut(problem.d), part.offset()
        c = torch.div(x, part.spread(largest), out=reach[part.span])
        c *= torch.sqrt(part.cut(problem.a) / d)
        if problem.debiased:
            c /= 1 - part.ridge()
        alive = x.sign() * d
        part.add_(cost, alive)
        part.add_(area, d * c)
        part.add_(shift, alive * b)
        part.reduce_(first, c / b.clamp(min=_TINY), "amax")
        part.reduce_(last, torch.eq(c, 0, out=alive).mul_(_HUGE).add_(c).div_(1 + b), "amin")
    k = problem.budget
    low = torch.maximum(k / area, 1 / first)  # u_j <= eta c_j gives the former, and below the latter all u_j are 0
    high = (1 / last).clamp(max=_HUGE)
    start = _guess(problem, largest, (k + shift) / area)  # the latter: the root, were every u_j between 0 and 1
    return _Root(reach, largest, start.clamp(low, high), slack=cost <= k * (1 + problem.noise)), low, high


def _guess(problem: _Problem, largest: Tensor, otherwise: Tensor) -> Tensor:
    """Return where to start: in a large pool the multiplier of a sample of its groups, which saves half the passes."""
    stride = problem.norms.numel() // _SAMPLE
    if problem.pool is not None or stride < 32:
        return otherwise
    norms, step, a, d = (
        given if given.numel() == 1 else given[::stride].contiguous()
        for given in (problem.norms, problem.step, problem.a, problem.d)
    )
    budget = problem.budget * (norms.numel() / problem.norms.numel())
    root = _root(replace(problem, norms=norms, step=step, a=a, d=d, budget=budget))
    return torch.where(root.slack | (root.eta <= 0), otherwise, root.eta * (largest / root.largest))


def _search(problem: _Problem, start: _Root, low: Tensor, high: Tensor) -> _Root:
    """Find the multipliers between `low` and `high`."""
    k = problem.budget
    done = start.slack | (k <= 0)
    eta = torch.where(done, 0.0, start.eta)
    halved, before = torch.zeros_like(done), problem.per_pool(torch.inf)
    for _ in range(_EVALUATIONS):
        spent, rate = _spend(problem, start.reach, eta)
        excess = spent - k
        newton = eta - excess / rate
        low = torch.where(excess < 0, torch.maximum(low, eta), low)
        high = torch.where(excess < 0, high, torch.minimum(high, eta))
        near = (excess.abs() <= problem.noise * k) | ((newton - eta).abs() <= 4 * _EPS * eta)
        near |= high <= low * (1 + 4 * _EPS)
        useful = (newton > low) & (newton < high) & (near | halved | (excess.abs() <= before / 2))
        halved, before = ~useful, excess.abs()
        middle = torch.where(near, eta, low.sqrt() * high.sqrt())
        eta = torch.where(done, eta, torch.where(useful, newton, middle))
        done |= near
        if problem.norms.is_cpu and bool(done.all()):
            break
    return replace(start, eta=eta)


def _settled(problem: _Problem, root: _Root) -> _Root:
    """Move eta to the middle of its interval where h = 0 on an interval, as when an integer budget is met exactly.

    At an end of that interval rounding would leave a group beyond the threshold with a tiny factor instead of 0.
    """
    cost, full, empty = problem.per_pool(), problem.per_pool(torch.inf), problem.per_pool()
    for part in problem.parts():
        c, b, d = part.cut(root.reach), part.offset(), part.cut(problem.d)
        line = c * part.spread(root.eta) - b
        kept = torch.ge(line, 0.5, out=line)
        part.add_(cost, kept * d)
        part.reduce_(full, (1 - kept).mul_(_HUGE).add_(c).div_(1 + b), "amin")
        part.reduce_(empty, (1 - kept).mul_(c).div_(b.clamp(min=_TINY)), "amax")
    met = (cost > 0) & ((cost - problem.budget).abs() <= problem.noise * problem.budget)
    even = met & (empty > 0) & (empty < full)
    return replace(root, eta=torch.where(even, (full.sqrt() * empty.sqrt()).reciprocal(), root.eta))


def _spend(problem: _Problem, reach: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum d_j u_j and its derivative in eta, for each pool: (p,), (p,)."""
    spent, rate = problem.per_pool(), problem.per_pool()
    for part in problem.parts():
        c, d = reach[part.span], part.cut(problem.d)
        line = (c * part.spread(eta)).sub_(part.offset())
        u = line.clamp(0, 1)
        torch.eq(line, u, out=line)  # 1 where the line is not clipped
        part.add_(spent, u.mul_(d))
        part.add_(rate, line.mul_(c).mul_(d))
    return spent, rate


class _Value(torch.autograd.Function):
    """GS or D: both are half the inner product of the norms and their gradient, being homogeneous of degree 2."""

    @staticmethod
    def forward(ctx: Any, norms: Tensor, problem: _Problem, debiased: bool) -> Tensor:
        root = _root(problem)
        total = norms.new_zeros((), dtype=torch.float64)
        gradient = torch.empty_like(norms) if ctx.needs_input_grad[0] else None
        floor = torch.where(root.slack, 0.0, 1 / root.eta)
        for part in problem.parts():
            x, c, level = part.cut(norms), part.cut(root.reach), part.spread(floor)
            slope = (level - c).clamp_(min=0) if debiased else torch.maximum(level, c)
            slope.mul_(torch.sqrt(part.cut(problem.a) * part.cut(problem.d))).mul_(part.spread(root.largest))
            slope.masked_fill_(x == 0, 0.0)
            total += torch.dot(x, slope) / 2
            if gradient is not None:
                gradient[part.span] = slope
        ctx.save_for_backward(gradient)
        return total.to(norms.dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None


def _problem(
    norms: Tensor, a: Tensor | float, d: Tensor | float, k: Tensor | float, pool: Tensor | int | None
) -> _Problem:
    """Bring all to shape, and check what can be checked without reading a device."""
    if norms.dim() != 1 or not norms.is_floating_point():
        raise ValueError(f"norms are {norms.dtype} of shape {tuple(norms.shape)}; give floats of shape (m,)")
    newton.check("norms", norms, "they must be finite and not negative: skip the step that made them so")
    newton.check("a", a, "weights must be finite and above 0", above=0.0)
    newton.check("d", d, "costs must be finite and above 0", above=0.0)
    budget = _budget(norms, k, pool)
    pool = None if budget.numel() == 1 else pool
    return _Problem(
        norms.detach(),
        _per_group("step", 0.0, norms),
        _per_group("a", a, norms),
        _per_group("d", d, norms),
        budget,
        pool,
    )


def _per_group(name: str, given: Tensor | float, norms: Tensor) -> Tensor:
    """Return the tensor (m,), or as a tensor (1,) the number, also of a large tensor on the CPU that holds but one."""
    if not isinstance(given, Tensor):
        return torch.full((1,), float(given), dtype=torch.float64, device=norms.device)
    if given.dim() > 0 and given.shape != norms.shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}, not {tuple(norms.shape)}; give one per group, or one")
    given = given.detach().reshape(-1)
    large = given.is_cpu and given.numel() >= threshold.LEAST_GROUPS
    return given[:1] if large and torch.equal(*given.aminmax()) else given


def _budget(norms: Tensor, k: Tensor | float, pool: Tensor | int | None) -> Tensor:
    """Return the budget of each pool: (p,) float64."""
    newton.check("k", k, "a budget is never negative", finite=False)
    given = k.detach().to(norms.device, torch.float64) if isinstance(k, Tensor) else _per_group("k", k, norms)[0]
    pools = 1 if pool is None else given.numel()
    if isinstance(pool, int):
        if pool < 1 or norms.numel() % pool:
            raise ValueError(f"{norms.numel()} groups do not make pools of {pool}; give a size that divides them")
        pools = norms.numel() // pool
    elif pool is not None and given.dim() == 0:  # the ids off the CPU cannot be read: at most as many pools as groups
        pools = int(pool.max()) + 1 if pool.is_cpu and pool.numel() > 0 else norms.numel()
    if given.dim() > 1 or given.numel() not in (1, pools):
        raise ValueError(f"k has shape {tuple(given.shape)} for {pools} pools; give one budget per pool, or one")
    if isinstance(pool, Tensor):
        newton.check_ids(norms, pool, pools)
    return given.reshape(-1).expand(pools).contiguous()
