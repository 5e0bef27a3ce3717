"""The multiplier of one large pool of alike groups on the CPU, in a few passes that keep no vector.

Where all groups have the same weight, cost and step, u_j = clip(eta x_j - b, 0, 1) is 0 up to the norm b / eta and 1
from (1 + b) / eta on. Sums of norms clipped to these, in the dtype of the norms, narrow eta down. Then one pass counts
the groups whose branch of the clip is the same at both ends of a narrow interval, and sums those between: what is
affine on the interval is solved exactly, and the number of the other groups bounds the error.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from planner.newton import Problem

__all__ = ["LEAST_GROUPS", "factors_", "multiplier", "solve_"]

LEAST_GROUPS = 1 << 15  # from so many on it pays

_LONGEST = 4.0  # the b up to which the norms' own precision does for the multiplier
_PASSES = 16  # at most, before the other search is tried; 2 or 3 are usual
_CHUNK = 1 << 17  # stays in the cache
_SAMPLE = 1 << 16  # of so many groups the multiplier is within about 0.5 %
_NARROW = 2e-3  # the relative half-width from which on counting pays
_RANGE = {torch.float32: 1e30, torch.float64: 1e280}  # norms up to it have finite sums
_ERROR = {torch.float32: 1e-7, torch.float64: 1e-14}  # allowed, relative to eta
_LEAST_WIDTH = {torch.float32: 1e-6, torch.float64: 1e-13}  # well above the rounding of the thresholds


def solve_(factors: Tensor, problem: Problem) -> bool:
    """Fill the factors of the prox for one large pool of alike groups on the CPU; return False, else and in doubt."""
    alike = problem.pool is None and all(each.numel() == 1 for each in (problem.step, problem.a, problem.d))
    if not alike or not problem.norms.is_cpu or problem.norms.numel() < LEAST_GROUPS:
        return False
    ridge = float(problem.step) * float(problem.a)
    b = ridge / (1 - ridge) if problem.debiased else ridge
    eta = multiplier(problem.norms, b, float(problem.budget / problem.d))
    if eta is not None:
        factors_(factors, problem.norms, eta, ridge, debiased=problem.debiased)
    return eta is not None


def multiplier(norms: Tensor, b: float, budget: float) -> float | None:
    """Return eta with sum clip(eta x_j - b, 0, 1) = budget; inf where no more than `budget` norms are above 0.

    None where the search ends in doubt: when norms are tied at a threshold, or none lies between the two; also for
    a budget of 0 and for b above 4 or 0.
    """
    if not (0 < b <= _LONGEST and budget > 0):
        return None
    sample = norms[:: max(norms.numel() // _SAMPLE, 1)].to(_read_as(norms))
    part = budget * sample.numel() / norms.numel()
    total = float(sample.sum())
    if not total > 0:
        return None
    start = (part + b * sample.numel()) / total  # the root, were every u_j of the sample between 0 and 1
    found = _search(sample, b, part, start, spread=3.0)
    if found is None:
        return _search(norms, b, budget, start, spread=3.0)
    if found == torch.inf:
        return _search(norms, b, budget, (1 + b) / float(sample[sample > 0].min()), spread=3.0)
    return _search(norms, b, budget, found, spread=min(4 / part**0.5, 1.0))


def _search(norms: Tensor, b: float, budget: float, start: float, *, spread: float) -> float | None:
    """Begin between start / (1 + spread) and start (1 + spread)."""
    dtype = _read_as(norms)
    eta, width, alive = start, spread, -1
    for _ in range(_PASSES):
        if not 1 / _RANGE[dtype] < b / eta < (1 + b) / eta < _RANGE[dtype]:
            return None
        if width > _NARROW:
            points = (eta / (1 + width), eta, eta * (1 + width))
            spent = _spent(norms, b, points)
            if spent[2] < budget and alive < 0:
                alive = int(norms.count_nonzero())
                if alive <= budget * (1 + 16 * torch.finfo(torch.float64).eps):
                    return torch.inf
            eta, width = _narrowed(points, [each - budget for each in spent])
            width = max(width, _LEAST_WIDTH[dtype])
            continue
        found, error = _solved(norms, b, budget, eta, width)
        if not abs(found / eta - 1) < width:
            width *= 8
        elif error <= _ERROR[dtype]:
            return found
        else:
            eta, width = found, max(4 * error, _LEAST_WIDTH[dtype])
    return None


def factors_(factors: Tensor, norms: Tensor, eta: float, ridge: float, *, debiased: bool) -> Tensor:
    """Fill the factors of the prox, which may be the norms themselves: exactly 0 up to the lower threshold.

    De-biased they are exactly 1 from the upper threshold on: the slope is raised by what rounding may take.
    """
    low = ridge / ((1 - ridge) * eta) if debiased else ridge / eta
    highest = 1.0 if debiased else 1 / (1 + ridge)
    if low == 0:
        return factors.fill_(highest)
    for x, part in zip(_chunks(norms), torch.split(factors, _CHUNK), strict=True):
        slope = (1 + 2 * torch.finfo(x.dtype).eps) / (1 - ridge) if debiased else 1.0
        ratio = x.new_tensor(low) / x  # 1 exactly where x is the threshold, inf where it is 0
        torch.add(x.new_tensor(slope), ratio, alpha=-slope, out=ratio)
        part.copy_(ratio.clamp_(0, highest))
    return factors


def _read_as(norms: Tensor) -> torch.dtype:
    return torch.float64 if norms.dtype == torch.float64 else torch.float32


def _chunks(norms: Tensor) -> Iterator[Tensor]:
    for part in torch.split(norms, _CHUNK):
        yield part.to(_read_as(norms))


def _spent(norms: Tensor, b: float, points: Sequence[float]) -> list[float]:
    """Return the sums of u at several multipliers, with the rounding of the dtype of the norms."""
    sums = [0.0] * len(points)
    for x in _chunks(norms):
        for i, eta in enumerate(points):
            sums[i] += float(x.clamp(b / eta, (1 + b) / eta).sum())
    return [eta * each - b * norms.numel() for eta, each in zip(points, sums, strict=True)]


def _narrowed(points: Sequence[float], excess: Sequence[float]) -> tuple[float, float]:
    """Return eta and the half-width of where it is sure to be looked for next, from three points."""
    first, middle, last = points
    step = last / middle
    if excess[2] < 0:
        return last * step**3, step**3 - 1
    if excess[0] > 0:
        return first / step**3, step**3 - 1
    i = 0 if excess[1] > 0 else 1
    low, high, below, above = points[i], points[i + 1], excess[i], excess[i + 1]
    ratio = high / low
    if ratio < 5 and excess[0] < excess[1] < excess[2]:
        chord = (above - below) / (above / low - below / high)
        curve = _parabola(points, excess)
        if low <= curve <= high:
            return curve, max(abs(curve - chord) / curve, min((ratio - 1) ** 3, ratio**0.5 - 1))
    return low * ratio**0.5, ratio**0.5 - 1


def _parabola(points: Sequence[float], excess: Sequence[float]) -> float:
    """Return where the parabola through three points (excess, 1 / eta) has no excess; 1 / eta is a norm."""
    (x, y, z), (f, g, h) = points, excess
    inverse = g * h / ((f - g) * (f - h) * x) + f * h / ((g - f) * (g - h) * y) + f * g / ((h - f) * (h - g) * z)
    return 1 / inverse if inverse > 0 else torch.inf


def _solved(norms: Tensor, b: float, budget: float, eta: float, width: float) -> tuple[float, float]:
    """Solve the part that is affine between eta (1 - width) and eta (1 + width); return the root and its error."""
    zero, full = b / (eta * (1 - width)), (1 + b) / (eta * (1 + width))  # between them u is affine on the interval
    zero_last, full_last = b / (eta * (1 + width)), (1 + b) / (eta * (1 - width))  # beyond them u is 0 or 1 on it
    total = inside = touched = above = 0.0
    for x in _chunks(norms):
        one = x.new_ones(())
        total += float(_where_between(x, x, zero, full).sum())
        inside += float(_where_between(one, x, zero, full).sum())
        touched += float(_where_between(one, x, zero_last, full_last).sum())
        above += float(torch.ge(x, full, out=torch.empty_like(x)).sum())
    spent = budget - above + b * inside  # by eta times the total
    if not (total > 0 and spent > 0):
        return torch.nan, torch.inf
    return spent / total, (touched - inside) * (1 + b) * 2 * width / (1 - width) / spent


def _where_between(values: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Return the values where low < x < high, and 0 elsewhere: one pass, where comparisons would take four."""
    result: Tensor = torch.ops.aten.hardtanh_backward(values, x, low, high)
    return result
