"""The integer program: one binary per (width, candidate) and per removed block, solved by HiGHS to proven optimality.

    minimise    Σ loss[w,c] y[w,c] + Σ loss[b] r[b] + Σ_stages γ n²,     n = blocks of the stage that leave
    subject to  Σ_c y[w,c] = 1,  or 1 - r[b] for a width inside block b
                Σ_terms cost(lengths) <= budget,                         for every limited resource

Trims (what a layer can lose beside its widths) are variables like widths. One that needs a width at one of some
candidates C adds Σ_{c < all} y[t,c] <= Σ_{c in C} y[w,c].

A term that two widths decide has one variable per pair of candidates, whose margins are the widths' binaries, so its
cost is exact at every integer point; terms of all resources share these variables. n² is the maximum of the chords
through its integer points. The length of an axis that many widths make up, as in a densely connected network, is a
mixture of neighbouring lengths on a grid: between them costs are straight lines, and search.py holds the plan to its
exact cost afterwards.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

from planner.graph import Graph
from planner.importance import Importance
from planner.operations import Choice, Extent
from planner.resources import Product, Resource, Term, widths_of
from planner.solver import Row, Terms, minimise
from planner.spec import Proof
from planner.trims import Trim

Point = tuple[int, int]  # (variable, what it stands for)
_INFINITY = float("inf")
_MANY = 600  # combinations of candidates from which on an axis of several widths is taken by its length
_GRID = 17  # lengths of such an axis
_STRAIGHT = 1e-6  # relative bend of a cost over such an axis that counts as none


@dataclass(frozen=True)
class Budget:
    """A sum of costs, and the most that it may come to."""

    cost: Terms
    most: float


@dataclass
class Program:
    """Variables and rows of one planning problem."""

    graph: Graph
    candidates: Mapping[str, Sequence[int]]
    integral: list[bool] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    keeps: dict[tuple[str, int], int] = field(default_factory=dict)
    leaves: dict[str, int] = field(default_factory=dict)
    _joint: dict[object, list[int]] = field(default_factory=dict)
    _mixtures: dict[object, list[Point]] = field(default_factory=dict)
    _squares: dict[str, int] = field(default_factory=dict)
    _gone: dict[tuple[str, ...], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Add the binaries of widths and blocks; exactly one candidate holds unless the block around it leaves."""
        self.leaves = {b.name: self.variable(integral=True) for b in self.graph.blocks if not b.frozen}
        for name, counts in self.candidates.items():
            terms = {}
            for count in counts:
                self.keeps[name, count] = self.variable(integral=True)
                terms[self.keeps[name, count]] = 1.0
            if (leave := self.leaves.get(self.graph.part[name].block or "")) is not None:
                terms[leave] = 1.0
            self.rows.append((terms, 1.0, 1.0))
        for trim in self.graph.trims:
            for needed, allowed in trim.needs.items() if trim.name in self.candidates else ():
                self._need(trim, needed, allowed)

    def _need(self, trim: Trim, name: str, counts: frozenset[int]) -> None:
        """Let a trim keep fewer than all only where a width or another trim keeps one of `counts`, or left."""
        terms = {self.keeps[trim.name, count]: 1.0 for count in self.candidates[trim.name] if count < trim.size}
        leave = self.leaves.get(self.graph.part[name].block or "")
        allowed = [self.keeps[name, count] for count in self.candidates.get(name, ()) if count in counts]
        fixed = name not in self.candidates and self.graph.part[name].size in counts
        free = [*allowed, *([] if leave is None else [leave])]
        self.rows.append(({**terms, **dict.fromkeys(free, -1.0)}, -_INFINITY, float(fixed)))

    def variable(self, *, integral: bool) -> int:
        """Return a new variable in [0, 1]."""
        self.integral.append(integral)
        return len(self.integral) - 1

    def tie(self, one: str, other: str) -> None:
        """Let two widths keep the same share of their channels, as long as the blocks around them stay."""
        terms: Terms = {}
        for name, sign in ((one, 1.0), (other, -1.0)):
            size = self.graph.part[name].size
            terms |= {self.keeps[name, count]: sign * count / size for count in self.candidates[name]}
        around = {self.graph.part[name].block or "" for name in (one, other)}
        free = [self.leaves[block] for block in around if block in self.leaves] if len(around) > 1 else []
        self.rows.append(({**terms, **dict.fromkeys(free, -1.0)}, -_INFINITY, 1e-9))
        self.rows.append(({**terms, **dict.fromkeys(free, 1.0)}, -1e-9, _INFINITY))

    def costs(self, resource: Resource) -> list[tuple[Terms, float]]:
        """Return each sum of a resource as an expression in the variables, and its constant."""
        return [self._sum(terms, resource.constant) for terms in resource.sums]

    def _sum(self, terms: Sequence[Term], constant: float) -> tuple[Terms, float]:
        cost: Terms = {}
        for term in terms:
            for variable, price in self._term(term):
                if variable is None:
                    constant += price
                else:
                    cost[variable] = cost.get(variable, 0.0) + price
        return cost, constant

    def _term(self, term: Term) -> list[tuple[int | None, float]]:
        """Return the variables of a term with their prices; None stands for what is always paid."""
        names = tuple(name for name in widths_of(term.extents) if name in self.candidates)
        if not term.after <= self.leaves.keys():
            return []
        blocks, after = (tuple(sorted(own & self.leaves.keys())) for own in (term.blocks, term.after))
        if not blocks and not after and not names:
            return [(None, term.price(*self._at(term, {})))]
        if isinstance(term.price, Product) and len(term.extents) == 1 and not blocks and not after:
            return self._linear(term.extents[0], term.price.factor)
        if math.prod(len(self.candidates[name]) for name in names) > _MANY and len(names) > 2:
            return self._by_length(term, blocks, after)
        points = [[(self.keeps[name, count], count) for count in self.candidates[name]] for name in names]
        options = [dict(zip(names, option, strict=True)) for option in product(*(self.candidates[n] for n in names))]
        prices = [term.price(*self._at(term, keep)) for keep in options]
        if len(names) == 1 and not after and blocks in ((), (self.graph.part[names[0]].block,)):
            return [(variable, price) for (variable, _), price in zip(points[0], prices, strict=True)]
        return list(zip(self._together(points, blocks, after), prices, strict=True))

    def _at(self, term: Term, keep: Mapping[str, int]) -> tuple[int, ...]:
        sizes = {name: self.graph.part[name].size for name in widths_of(term.extents)}
        choice = Choice({**sizes, **keep}, frozenset())
        return tuple(extent.under(choice) for extent in term.extents)

    def _linear(self, extent: Extent, factor: float) -> list[tuple[int | None, float]]:
        fixed = extent.under(self.graph.choice(dict.fromkeys(self.candidates, 0)))
        prices: list[tuple[int | None, float]] = [(None, factor * fixed)]
        for name, times in extent.parts:
            for count in self.candidates.get(name, ()):
                prices.append((self.keeps[name, count], factor * times * count))
        return prices

    def _together(self, points: Sequence[Sequence[Point]], blocks: Sequence[str], after: Sequence[str]) -> list[int]:
        """Return one variable per combination of points of different axes.

        It is 1 where all hold, none of `blocks` leaves, and all of `after` do. What is there after blocks have left may
        have a price below 0, so that it must be kept from being 1 elsewhere too.
        """
        key = (tuple(tuple(own) for own in points), tuple(blocks), tuple(after))
        if key not in self._joint:
            options = list(product(*([variable for variable, _ in own] for own in points)))
            chosen = [self.variable(integral=False) for _ in options]
            leave, total = {self.leaves[name]: 1.0 for name in blocks}, dict.fromkeys(chosen, 1.0)
            if after:
                left = self._all_left(after)
                self.rows.append(({**total, **leave, left: -1.0}, 0.0, _INFINITY))
                self.rows += [
                    ({**total, own: sign}, -_INFINITY, max(0.0, sign)) for own, sign in {**leave, left: -1.0}.items()
                ]
            else:
                self.rows.append(({**total, **leave}, 1.0, _INFINITY))
            for position, own in enumerate(points):
                for variable, _ in own:
                    margin = {z: 1.0 for z, option in zip(chosen, options, strict=True) if option[position] == variable}
                    self.rows.append(({**margin, variable: -1.0}, -_INFINITY, 0.0))
            self._joint[key] = chosen
        return self._joint[key]

    def _all_left(self, blocks: Sequence[str]) -> int:
        """Return a variable that is 1 where all of these blocks leave, and else 0."""
        if len(blocks) == 1:
            return self.leaves[blocks[0]]
        if tuple(blocks) not in self._gone:
            both, leaves = self.variable(integral=False), [self.leaves[name] for name in blocks]
            self.rows += [({both: 1.0, leave: -1.0}, -_INFINITY, 0.0) for leave in leaves]
            self.rows.append(({**dict.fromkeys(leaves, -1.0), both: 1.0}, 1.0 - len(blocks), _INFINITY))
            self._gone[tuple(blocks)] = both
        return self._gone[tuple(blocks)]

    def _by_length(self, term: Term, blocks: Sequence[str], after: Sequence[str]) -> list[tuple[int | None, float]]:
        """Price a term by the lengths of its axes, each a mixture of lengths on a grid or of one width's candidates."""
        alone = [self._alone(extent, blocks) for extent in term.extents]
        lengths = [
            [n for _, n in own] if own else self._grid(extent) for own, extent in zip(alone, term.extents, strict=True)
        ]
        prices = np.array([term.price(*each) for each in product(*lengths)]).reshape([len(own) for own in lengths])
        points = []
        for axis, (own, extent) in enumerate(zip(alone, term.extents, strict=True)):
            if own is None:
                corners, bent = _corners(prices, lengths[axis], axis)
                prices = prices.take(corners, axis)
                own = self._mixture(extent, tuple(lengths[axis][i] for i in corners), bent=bent)
            points.append(own)
        if len(points) == 1 and not blocks and not after:
            return [(variable, price) for (variable, _), price in zip(points[0], prices.tolist(), strict=True)]
        return list(zip(self._together(points, blocks, after), prices.reshape(-1).tolist(), strict=True))

    def _alone(self, extent: Extent, blocks: Sequence[str]) -> list[Point] | None:
        """Return the binaries of the one width or trim that decides an axis, with its lengths; None if there are more.

        Where it leaves with its block, so must the term.
        """
        names = [name for name, _ in extent.parts if name in self.candidates]
        if len(names) != 1 or self.graph.part[names[0]].block in self.leaves.keys() - set(blocks):
            return None
        options = [(self.keeps[names[0], count], {names[0]: count}) for count in self.candidates[names[0]]]
        return [(variable, extent.under(self.graph.choice(keep))) for variable, keep in options]

    def _mixture(self, extent: Extent, lengths: tuple[int, ...], *, bent: bool) -> list[Point]:
        """Return variables whose mixture is the length of an axis, with the length that each stands for.

        Only two that follow each other are above 0 if the cost is `bent` so that others would be too cheap.
        """
        key = (extent, lengths, bent)
        if key not in self._mixtures:
            points = [(self.variable(integral=False), n) for n in lengths]
            self.rows.append(({variable: 1.0 for variable, _ in points}, 1.0, 1.0))
            scale = float(max(lengths))
            total, fixed = {variable: n / scale for variable, n in points}, 0.0
            for variable, price in self._linear(extent, 1 / scale):
                if variable is None:
                    fixed += price
                else:
                    total[variable] = total.get(variable, 0.0) - price
            self.rows.append((total, fixed, fixed))
            if bent:
                self._neighbours([variable for variable, _ in points])
            self._mixtures[key] = points
        return self._mixtures[key]

    def _grid(self, extent: Extent) -> list[int]:
        """Return lengths from the shortest to the longest that the candidates allow, evenly in steps that they take."""
        low = high = extent.under(self.graph.choice(dict.fromkeys(self.candidates, 0)))
        step = 0
        for name, times in extent.parts:
            counts = self.candidates.get(name, ())
            inside = self.graph.part[name].block in self.leaves
            low += times * (0 if inside else min(counts, default=0))
            high += times * max(counts, default=0)
            step = math.gcd(step, *(times * count for count in counts))
        stride = max(1, step) * max(1, math.ceil((high - low) / max(1, step) / (_GRID - 1)))
        return sorted({*range(low, high, stride), high})

    def _neighbours(self, variables: Sequence[int]) -> None:
        """Let only two variables that follow each other be above 0."""
        pieces = [self.variable(integral=True) for _ in variables[1:]]
        if pieces:
            self.rows.append((dict.fromkeys(pieces, 1.0), 1.0, 1.0))
        for index, variable in enumerate(variables):
            beside = pieces[max(0, index - 1) : index + 1]
            self.rows.append(({variable: 1.0, **dict.fromkeys(beside, -1.0)}, -_INFINITY, 0.0))

    def losses(self, importance: Importance) -> Terms:
        """Return the loss as an expression, with the super-additive terms as chords of γ n²."""
        loss = {variable: importance.widths[name][count] for (name, count), variable in self.keeps.items()}
        for name, variable in self.leaves.items():
            loss[variable] = importance.blocks[name]
        for stage, gamma in importance.stages.items():
            members = [self.leaves[block.name] for block in self.graph.stages.get(stage, ())]
            if gamma <= 0 or not members:
                continue
            loss[self._square(stage, members)] = gamma * len(members) ** 2
        return loss

    def _square(self, stage: str, members: Sequence[int]) -> int:
        """Return the variable of a stage that is n² / most² where n of its most blocks leave, or above."""
        if stage not in self._squares:
            most, share = len(members), self.variable(integral=False)
            for n in range(most):
                chord = dict.fromkeys(members, -(2 * n + 1.0))
                self.rows.append(({**chord, share: float(most**2)}, -n * (n + 1.0), _INFINITY))
            self._squares[stage] = share
        return self._squares[stage]

    def solve(
        self, objective: Terms, budgets: Sequence[Budget] = (), *, gap: float = 0.0
    ) -> tuple[Choice, Proof] | None:
        """Return the best choice within the budgets, to a relative `gap`, and its proof; None if nothing fits."""
        if not self.integral:
            self.variable(integral=False)  # nothing can be chosen, but HiGHS wants a variable
        start, rows = time.monotonic(), list(self.rows)
        for budget in budgets:  # HiGHS's tolerances are absolute: rows are scaled to about 1
            unit = max(map(abs, budget.cost.values()), default=0.0) or abs(budget.most) or 1.0
            rows.append(({j: v / unit for j, v in budget.cost.items()}, -_INFINITY, budget.most / unit))
        found = minimise(objective, self.integral, rows, gap=gap)
        if found is None:
            return None
        status = "out of time" if not found.in_time else "within the gap" if found.gap else "optimal"
        seconds = round(time.monotonic() - start, 3)
        return self._choice(found.x), Proof(
            status=status, objective=found.value, bound=found.bound, gap=found.gap, solved_s=seconds
        )

    def _choice(self, x: NDArray[np.float64]) -> Choice:
        removed = frozenset(name for name, variable in self.leaves.items() if x[variable] > 0.5)
        keep = dict.fromkeys(self.candidates, 0)
        keep.update({name: count for (name, count), variable in self.keeps.items() if x[variable] > 0.5})
        return Choice(keep, removed)


def _corners(prices: NDArray[np.float64], lengths: Sequence[int], axis: int) -> tuple[list[int], bool]:
    """Return where a price is no straight line along an axis, both ends included, and if it turns down anywhere."""
    rows = np.moveaxis(prices, axis, 0).reshape(len(lengths), -1)
    slopes = np.diff(rows, axis=0) / np.diff(lengths)[:, None]
    turns = np.diff(slopes, axis=0)
    scale = _STRAIGHT * np.abs(rows).max() / max(1, lengths[-1] - lengths[0])
    inner = 1 + np.flatnonzero((np.abs(turns) > scale).any(axis=1))
    ends = {0, len(lengths) - 1}
    return sorted({*ends, *inner.tolist()}), bool((turns < -scale).any())
