"""The integer program: one binary per (width, candidate) and per removed block, solved by HiGHS to proven optimality.

    minimise    Σ loss[w,c] y[w,c] + Σ loss[b] r[b] + Σ_stages γ n²,     n = blocks of the stage that leave
    subject to  Σ_c y[w,c] = 1,  or 1 - r[b] for a width inside block b
                Σ_operations cost(inputs, outputs) <= budget

An operation that two widths decide has one variable per pair of candidates, whose margins are the widths' binaries, so
its cost is exact at every integer point; n² is the maximum of the chords through its integer points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from planner.graph import Graph
from planner.importance import Importance
from planner.latency import Costs
from planner.operations import Choice, Operation
from planner.spec import Proof
from profiles.errors import PlanError

Terms = dict[int, float]  # variable -> coefficient
_INFINITY = float("inf")
TIME_LIMIT_S = 60.0  # then the best plan found is returned, with the gap to its bound


@dataclass
class Program:
    """Variables, rows and the cost expression of one planning problem."""

    graph: Graph
    candidates: Mapping[str, Sequence[int]]
    costs: Costs
    integral: list[bool] = field(default_factory=list)
    rows: list[tuple[Terms, float, float]] = field(default_factory=list)
    cost: Terms = field(default_factory=dict)
    constant_s: float = 0.0
    keeps: dict[tuple[str, int], int] = field(default_factory=dict)
    leaves: dict[str, int] = field(default_factory=dict)

    def variable(self, *, integral: bool) -> int:
        """Return a new variable in [0, 1]."""
        self.integral.append(integral)
        return len(self.integral) - 1

    def add_choices(self) -> None:
        """Add the binaries of widths and blocks; exactly one candidate holds unless the block around it leaves."""
        self.leaves = {b.name: self.variable(integral=True) for b in self.graph.blocks if not b.frozen}
        for name, counts in self.candidates.items():
            terms = {}
            for count in counts:
                self.keeps[name, count] = self.variable(integral=True)
                terms[self.keeps[name, count]] = 1.0
            if (leave := self.leaves.get(self.graph.width[name].block or "")) is not None:
                terms[leave] = 1.0
            self.rows.append((terms, 1.0, 1.0))

    def add_costs(self) -> None:
        """Add every operation's cost as an expression in the variables."""
        self.constant_s = self.costs.overhead_s
        for operation in self.graph.operations:
            self._add_operation(operation)

    def _add_operation(self, operation: Operation) -> None:
        parts = dict(operation.inputs.parts + operation.outputs.parts)
        names = [name for name in parts if name in self.candidates]
        blocks = [variable for name, variable in self.leaves.items() if name in operation.blocks]
        options = list(product(*(self.candidates[name] for name in names)))
        prices = [self._price(operation, dict(zip(names, option, strict=True))) for option in options]
        if not blocks and not names:
            self.constant_s += prices[0]
            return
        if len(names) == 1 and (not blocks or [self.leaves.get(self.graph.width[names[0]].block or "")] == blocks):
            for (count,), price in zip(options, prices, strict=True):
                self._charge(self.keeps[names[0], count], price)
            return
        chosen = [self.variable(integral=False) for _ in options]
        self.rows.append(({**dict.fromkeys(chosen, 1.0), **dict.fromkeys(blocks, 1.0)}, 1.0, _INFINITY))
        for position, name in enumerate(names):
            for count in self.candidates[name]:
                margin = {z: 1.0 for z, option in zip(chosen, options, strict=True) if option[position] == count}
                self.rows.append(({**margin, self.keeps[name, count]: -1.0}, -_INFINITY, 0.0))
        for variable, price in zip(chosen, prices, strict=True):
            self._charge(variable, price)

    def _price(self, operation: Operation, keep: Mapping[str, int]) -> float:
        return self.costs.cost(operation, *operation.widths(self.graph.choice(keep)))

    def _charge(self, variable: int, price: float) -> None:
        self.cost[variable] = self.cost.get(variable, 0.0) + price

    def losses(self, importance: Importance) -> Terms:
        """Return the loss as an expression, with the super-additive terms as chords of γ n²."""
        loss = {variable: importance.widths[name][count] for (name, count), variable in self.keeps.items()}
        for name, variable in self.leaves.items():
            loss[variable] = importance.blocks[name]
        for stage, gamma in importance.stages.items():
            members = [self.leaves[b.name] for b in self.graph.blocks if b.stage == stage and b.name in self.leaves]
            if gamma <= 0 or not members:
                continue
            most = len(members)
            share = self.variable(integral=False)  # n² / most²
            loss[share] = gamma * most**2
            for n in range(most):
                chord = dict.fromkeys(members, -(2 * n + 1.0))
                self.rows.append(({**chord, share: float(most**2)}, -n * (n + 1.0), _INFINITY))
        return loss

    def solve(self, objective: Terms, *, budget: float | None) -> tuple[Choice, Proof] | None:
        """Return the best choice within `budget` and its proof, or None if nothing fits."""
        unit = max(self.cost.values(), default=1.0)  # HiGHS's tolerances are absolute: rows are scaled to about 1
        if not self.integral:
            self.variable(integral=False)  # nothing can be chosen, but HiGHS wants a variable
        rows = list(self.rows)
        if budget is not None:
            rows.append(({j: v / unit for j, v in self.cost.items()}, -_INFINITY, (budget - self.constant_s) / unit))
        scale = max(map(abs, objective.values()), default=0.0) or 1.0
        c = np.zeros(len(self.integral))
        c[list(objective)] = np.array(list(objective.values())) / scale
        result = milp(
            c,
            integrality=np.array(self.integral, int),
            bounds=Bounds(0, 1),
            constraints=_constraint(rows, len(c)),
            options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT_S},
        )
        if result.status == 2:
            return None
        if result.x is None or result.status not in (0, 1):  # 1: out of time, with a bound
            raise PlanError(f"the solver stopped without an optimal plan: {result.message}")
        value = float(result.fun) * scale
        bound = value if result.mip_dual_bound is None else float(result.mip_dual_bound) * scale
        status = "optimal" if result.status == 0 else "out of time"
        proof = Proof(status=status, objective=value, bound=bound, gap=float(result.mip_gap or 0.0))
        return self._choice(result.x), proof

    def _choice(self, x: NDArray[np.float64]) -> Choice:
        removed = frozenset(name for name, variable in self.leaves.items() if x[variable] > 0.5)
        keep = dict.fromkeys(self.candidates, 0)
        keep.update({name: count for (name, count), variable in self.keeps.items() if x[variable] > 0.5})
        return Choice(keep, removed)


def _constraint(rows: Sequence[tuple[Terms, float, float]], size: int) -> LinearConstraint:
    index = [(i, j, value) for i, (terms, _, _) in enumerate(rows) for j, value in terms.items()]
    row, column, values = zip(*index, strict=True) if index else ((), (), ())
    matrix = coo_array((values, (row, column)), shape=(len(rows), size)).tocsr()
    return LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows])
