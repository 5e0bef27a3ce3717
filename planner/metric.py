"""The metric of an optimizer's steps, and the prox of WGSEF in a metric that has one number per weight, as Adam's has.

For weights x_i of group j and a metric h_i > 0, with r_j = step a_j, the prox minimises sum 1/2 h_i (w_i - x_i)^2 plus
step · GS(w), or step · D(w). With s_i = h_i, de-biased s_i = h_i - r_j > 0, and u_j as in planner.envelope, it is

    w_i <- x_i h_i u_j / (s_i u_j + r_j),    psi_j(u_j) = eta sqrt(a_j / d_j), u_j clipped to [0, 1],   sum d_j u_j = k,
    psi_j(u) = (sum_i (h_i x_i / (s_i u + r_j))^2)^(-1/2).

psi_j is increasing and concave, and affine where a group has one h: then this is the problem of planner.envelope. The
tangents of all psi_j, taken at some u, make such a problem too. Its solution spends exactly the budget, and there the
next tangents are taken. They lie above psi_j, so that from the second iterate on eta falls towards its root: Newton's
method, convergent from anywhere, and quadratically in the end.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import all_reduce
from torch.nn.functional import pad
from torch.optim import Optimizer

from planner import envelope
from planner.groups import Groups, Member
from planner.parallel import local
from planner.pools import Pools

_ITERATIONS = 10  # at most; 8 is the worst of 400 random problems whose metrics span up to 1e18
_SETTLED = 1e-5  # a change of u after which the next iterate, the error being squared, is exact in float32
_LEAST = 1e-9  # times r: a lower metric is raised to it, de-biased to 2 r

Sums = Callable[[Tensor], tuple[Tensor, Tensor]]  # u (m,) -> sum y^2 / t, sum y^2 s / t with t = s u + r, y = h x / t


@dataclass(frozen=True)
class Problem:
    """m groups with r_j and a_j, (m,), costs d_j, (m,) or a number, and pool ids, (m,), with their budgets, (p,)."""

    r: Tensor
    a: Tensor
    d: Tensor | float
    k: Tensor
    pool: Tensor | None

    @torch.no_grad()
    def usage(self, sums: Sums) -> Tensor:
        """Return u_j, (m,) float64: 0 for groups without a weight above 0, and 1 where r_j = 0, where nothing shrinks.

        Off the CPU the iterations are fixed in number, and what is not finite gives nan.
        """
        u = torch.ones_like(self.r)
        for _ in range(_ITERATIONS):
            first, second = sums(u)
            found = torch.where(self.r > 0, self._of_tangents(u, first, second), 1.0)
            moved = (found - u).abs().masked_fill_(second == 0, 0.0)
            u = found
            if u.is_cpu and (not len(u) or moved.max() < _SETTLED):
                break
        return u

    def _of_tangents(self, u: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Solve the problem of the tangents at u, which reads v_j = clip(eta c_j - b_j, 0, 1)."""
        dead = second == 0
        b = torch.where(dead, 1.0, self.r * first / second)  # a mean of r_j / s_i
        c = torch.where(dead, 0.0, (u * second + self.r * first) ** 1.5 / second) * self.a.sqrt()  # by sqrt(d_j)
        share = b / (1 + b)  # what the de-biased prox makes b of; from its factors v follows with little cancellation
        f = envelope.scale(c * (1 - share), share, 1.0, self.d, self.k, pool=self.pool, debiased=True)
        return torch.where(dead, 0.0, f * share / (1 - f + f * share))


@dataclass(frozen=True)
class Weights:
    """The weights and the metric h of the members of `groups`, in the part that this process holds; r is (m,)."""

    groups: Groups
    parameters: Mapping[str, Tensor]
    metric: Sequence[Tensor]  # of each member, shaped like its parameter
    r: Tensor
    debiased: bool

    @torch.no_grad()
    def sums(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the tangents at u follow from, (m,) and (m,) in float64, summed over processes in float32."""
        sums, given = torch.zeros(2, self.groups.count + 1, device=u.device), self._given(u)
        for split in (True, False):  # what every process holds whole is added once the parts are
            for member, metric in zip(self.groups.members, self.metric, strict=True):
                for part, x, h in self._parts(member, metric) if member.split == split else ():
                    h, s, _, t = self._terms(part, h, given)
                    values = (h * x.float() / t).square_() / t
                    for row, each in zip(sums, (values, values * s), strict=True):
                        part.add_(row, each.sum(part.reduced, True) if part.reduced else each)
            for shards in self.groups.shards if split else ():
                all_reduce(sums, group=shards)
        first, second = sums[:, :-1].double()
        return first, second

    @torch.no_grad()
    def scale_(self, u: Tensor) -> None:
        """Multiply the weights by their factors, or none of them if a u_j is not finite."""
        sound, given = u.isfinite().all(), self._given(u)
        for member, metric in zip(self.groups.members, self.metric, strict=True):
            for part, x, h in self._parts(member, metric):
                h, _, usage, t = self._terms(part, h, given)
                x.mul_(torch.where(sound, h * usage / t, 1.0).to(x.dtype))

    def _given(self, u: Tensor) -> Tensor:
        """Return u and r in float32, with u = 1 and r = 0 for the weights of no group: (2, m + 1)."""
        return torch.stack([pad(u, (0, 1), value=1.0), pad(self.r, (0, 1))]).float()

    def _parts(self, member: Member, metric: Tensor) -> Iterator[tuple[Member, Tensor, Tensor]]:
        weights = local(self.parameters[member.tensor])
        for (part, x), (_, h) in zip(member.parts(weights), member.parts(metric), strict=True):
            yield part, x, h

    def _terms(self, part: Member, h: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return h, s, u and t = s u + r of the weights."""
        usage, r = (part.spread(row) for row in given)
        if not self.debiased:
            h = torch.maximum(h, _LEAST * r)
            return h, h, usage, h * usage + r
        h = torch.maximum(h, 2 * r)
        return h, h - r, usage, h * usage + r * (1 - usage)  # so rounded, the factor is 1 where u = 1


class Metric:
    """How far an optimizer moves some weights for a gradient, against others: 1 / h, by learning rate and by √v̂ + ε."""

    def __init__(self, optimizer: Optimizer, state: Pools, parameters: Mapping[str, Tensor]) -> None:
        """Prepare for the groups of `state`, all of whose parameters the optimizer has."""
        self._optimizer = optimizer
        self._groups, self._pool, self._pools = state.groups, state.pool, len(state.k)
        self._parameters = {member.tensor: parameters[member.tensor] for member in state.groups.members}
        position = {id(p): i for i, own in enumerate(optimizer.param_groups) for p in own["params"]}
        self._owner = {name: position[id(parameter)] for name, parameter in self._parameters.items()}
        self._sizes = state.groups.sizes(parameters).double()
        self._counts: dict[int, Tensor] = {}  # how many weights of each group are in a parameter group, (m,)
        for i in set(self._owner.values()):
            ones = {n: local(p).new_full((), self._owner[n] == i).expand(local(p).shape)
                    for n, p in self._parameters.items()}  # fmt: skip
            self._counts[i] = state.groups.sums(ones).double()

    def sizes(self, size: float) -> Tensor | float:
        """Return the step size of each group, (m,), at most 1/2, or one for all."""
        curvature, (rate, _) = self._curvature(), self._relative()
        if curvature is None:
            return size * rate if isinstance(rate, float) else (size * rate).clamp_max(0.5)
        inverse = self._inverse(curvature)
        return (size * rate * inverse / self._mean(inverse)).clamp_max(0.5)

    def of_weights(self) -> list[Tensor] | None:
        """Return h of the weights of each member that are held here, about 1 in each pool; None where all are 1."""
        curvature, (rate, rates) = self._curvature(), self._relative()
        if curvature is None and isinstance(rate, float):
            return None
        unit = torch.ones_like(self._sizes) if curvature is None else self._mean(self._inverse(curvature))
        unit, found = pad(unit, (0, 1), value=1.0).float(), []
        for member in self._groups.members:
            weights = local(self._parameters[member.tensor])
            h = torch.ones((), device=weights.device) if curvature is None else local(curvature[member.tensor]).float()
            h = h * member.spread(unit) / torch.as_tensor(rates[self._owner[member.tensor]]).clamp_min(1e-6)
            found.append(h.clamp_min(1e-30).expand(weights.shape))
        return found

    def trains(self) -> Tensor:
        """Return which groups have learning rates above 0 only, (m,) bool."""
        rate = self._relative()[0]
        return rate > 0 if isinstance(rate, Tensor) else torch.full_like(self._pool, rate > 0, dtype=torch.bool)

    def _inverse(self, curvature: Mapping[str, Tensor]) -> Tensor:
        """Return 1 / h_j, the inverse of the mean over each group, (m,) float64."""
        return self._sizes / self._groups.sums(curvature).clamp_min(1e-30)

    def _mean(self, values: Tensor) -> Tensor:
        """Return the mean of the pool of each group, (m,)."""
        mean = torch.zeros(self._pools, dtype=values.dtype, device=values.device)
        return mean.scatter_reduce_(0, self._pool, values, "mean", include_self=False)[self._pool]

    def _relative(self) -> tuple[Tensor | float, dict[int, Tensor | float]]:
        """Return the learning rates relative to their mean over groups: of each group, and of each parameter group.

        That of a group, (m,) float64, is the harmonic mean over its weights. Groups of rate 0 are not in the mean.
        Where all rates are alike there is one for all groups: 1.0, or 0.0 if nothing trains.
        """
        rates: dict[int, Tensor | float] = {i: self._optimizer.param_groups[i]["lr"] for i in self._counts}
        if not any(isinstance(rate, Tensor) for rate in rates.values()) and len(set(rates.values())) <= 1:
            return float(all(rate > 0 for rate in rates.values())), dict.fromkeys(rates, 1.0)
        inverse = torch.zeros_like(self._sizes)
        for i, count in self._counts.items():
            inverse += torch.where(count > 0, count / rates[i], 0.0)
        of_groups = self._sizes / inverse
        mean = (of_groups.sum() / (of_groups > 0).sum()).nan_to_num(1.0)
        return of_groups / mean, {i: rate / mean for i, rate in rates.items()}

    def _curvature(self) -> dict[str, Tensor] | None:
        """Return √v̂ + ε of each parameter, or None if the optimizer does not keep v for all of them."""
        found = {}
        for name, parameter in self._parameters.items():
            kept = self._optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in kept:
                return None
            own, step = self._optimizer.param_groups[self._owner[name]], kept["step"]
            correction = 1 - own["betas"][1] ** (step if isinstance(step, Tensor) and not step.is_cpu else float(step))
            found[name] = (kept.get("max_exp_avg_sq", kept["exp_avg_sq"]) / correction).sqrt() + own["eps"]
        return found
