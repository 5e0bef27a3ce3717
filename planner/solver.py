"""Minimise a linear function over binaries and shares within linear rows, by HiGHS, to a proven gap.

Large problems go through their relaxation, whose optimum x° has the value z°: the problem on the support of x° alone is
small and gives a good solution, of value z. No solution below z has a variable whose reduced cost exceeds z - z°, so
those are 0, and what is asked of the rest is only whether anything lies below (1 - gap) z. If not, z is proven.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array, csr_array, vstack

from planner.quiet import redirected
from profiles.errors import PlanError

Terms = dict[int, float]  # variable -> coefficient
Row = tuple[Terms, float, float]  # lowest <= sum <= highest
Array = NDArray[np.float64]
TIME_LIMIT_S = 120.0  # then the best solution found is returned, with the gap to its bound
_LARGE = 300  # binaries from which on the relaxation is worth its time
_FINE = 1e3  # HiGHS stops at an absolute gap of 1e-6, which is then 1e-9 of the largest coefficient
_TIGHT = 1e-7  # the relative gap that counts as none
_NOTHING = 1e-9  # the absolute one


@dataclass(frozen=True)
class Solution:
    """Values of the variables, and how good they are proven to be."""

    x: Array
    value: float
    bound: float
    in_time: bool

    @property
    def gap(self) -> float:
        """The relative distance to the bound."""
        found = abs(self.value - self.bound)
        return found / abs(self.value) if found > max(_TIGHT * abs(self.value), _NOTHING) else 0.0


def minimise(objective: Terms, integral: Sequence[bool], rows: Sequence[Row], *, gap: float = 0.0) -> Solution | None:
    """Return the best values in [0, 1], or None if there are none; raises PlanError if HiGHS fails."""
    scale = (max(map(abs, objective.values()), default=0.0) or 1.0) / _FINE
    c = np.zeros(len(integral))
    c[list(objective)] = np.array(list(objective.values())) / scale
    task = _Task(c, np.array(integral, int), _constraint(rows, len(c)))
    with redirected(1, sys.stdout):
        found = _staged(task, gap) if sum(integral) > _LARGE else task.solve(np.ones(len(c)), gap)
    if found is None:
        return None
    return Solution(found.x, found.value * scale, found.bound * scale, found.in_time)


@dataclass(frozen=True)
class _Task:
    c: Array
    integral: NDArray[np.int_]
    within: LinearConstraint

    def solve(self, upper: Array, gap: float, *, better_than: Solution | None = None) -> Solution | None:
        """Return the best solution with variables up to `upper`, None if there is none.

        With `better_than`, only solutions below its bound count, and it is returned if time runs out before one.
        """
        within = [self.within]
        if better_than is not None:
            unit = float(np.abs(self.c).max()) or 1.0
            within.append(LinearConstraint(csr_array(self.c[None] / unit), -np.inf, better_than.bound / unit))
        options = {"mip_rel_gap": gap, "time_limit": TIME_LIMIT_S}
        result = milp(self.c, integrality=self.integral, bounds=Bounds(0, upper), constraints=within, options=options)
        if result.status == 2:
            return None
        if result.x is None and result.status == 1 and better_than is not None:
            proven = min(better_than.bound, -np.inf if result.mip_dual_bound is None else result.mip_dual_bound)
            return Solution(better_than.x, better_than.value, proven, in_time=False)
        if result.x is None or result.status not in (0, 1):  # 1: out of time, with a bound
            raise PlanError(f"the solver stopped without an optimal plan: {result.message}")
        bound = result.fun if result.mip_dual_bound is None else result.mip_dual_bound
        return Solution(result.x, float(result.fun), float(bound), result.status == 0)

    def relaxed(self) -> tuple[Array, Array, float] | None:
        """Return the optimum without integrality, the reduced costs, and the value; None if there is none."""
        matrix, low, high = self.within.A, np.asarray(self.within.lb), np.asarray(self.within.ub)
        equal = low == high
        above, least = ~equal & np.isfinite(high), ~equal & np.isfinite(low)
        result = linprog(
            self.c,
            A_ub=vstack([matrix[above], -matrix[least]]),
            b_ub=np.concatenate([high[above], -low[least]]),
            A_eq=matrix[equal],
            b_eq=high[equal],
            bounds=(0, 1),
            method="highs-ds",
        )
        return None if result.x is None else (result.x, result.lower.marginals, float(result.fun))


def _staged(task: _Task, gap: float) -> Solution | None:
    whole = np.ones(len(task.c))
    relaxed = task.relaxed()
    if relaxed is None:
        return None
    x, reduced, least = relaxed
    binary = task.integral.astype(bool)
    first = task.solve(np.where(binary & (x < _TIGHT), 0.0, whole), gap)
    if first is None:
        return task.solve(whole, gap)
    proven = Solution(first.x, first.value, least, first.in_time)
    if proven.gap <= gap:
        return proven
    below = first.value - max(gap, _TIGHT) * abs(first.value)
    upper = np.where(binary & (reduced > max(0.0, below - least) + _TIGHT * _FINE), 0.0, whole)
    better = task.solve(upper, gap, better_than=Solution(first.x, first.value, below, first.in_time))
    if better is None:
        return Solution(first.x, first.value, below if gap else first.value, in_time=True)
    return Solution(better.x, better.value, max(better.bound, least), better.in_time)


def _constraint(rows: Sequence[Row], size: int) -> LinearConstraint:
    index = [(i, j, value) for i, (terms, _, _) in enumerate(rows) for j, value in terms.items()]
    row, column, values = zip(*index, strict=True) if index else ((), (), ())
    matrix = coo_array((values, (row, column)), shape=(len(rows), size)).tocsr()
    return LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows])
