"""The prox in the optimizer's metric is the one that nested bisections find, and learning rates are part of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import planner
from planner import Plan, attach, envelope
from planner.groups import group
from planner.metric import Metric, Problem, Weights
from planner.pools import Pools, pools
from planner.prox import Schedule
from planner.structures import NM, Channel, FilterShape, Rows, Structure, Weight
from profiles.errors import PlanError
from tools.examples.resnet import ResNet

from . import nets
from .nets import PIXELS, looking_trained


@dataclass(frozen=True)
class Case:
    """Weights x with a metric h, in groups ids; r, a, d of groups; the budget k."""

    x: np.ndarray
    h: np.ndarray
    ids: np.ndarray
    r: np.ndarray
    a: np.ndarray
    d: np.ndarray
    k: float
    debiased: bool

    @property
    def s(self) -> np.ndarray:
        return self.h - self.r[self.ids] if self.debiased else self.h

    def sums(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.ids, values, minlength=len(self.a))

    def prox(self, u: np.ndarray) -> np.ndarray:
        return self.x * self.h * u[self.ids] / (self.s * u[self.ids] + self.r[self.ids])

    def objective(self, w: np.ndarray, step: float) -> float:
        norms, a, d = (torch.tensor(each) for each in (np.sqrt(self.sums(w**2)), self.a, self.d))
        of = envelope.debiased_value if self.debiased else envelope.value
        return float(0.5 * (self.h * (w - self.x) ** 2).sum() + step * of(norms, a, d, self.k))


def random_case(seed: int, *, debiased: bool, step: float, span: float, share: float | None = None) -> Case:
    """Draw weights whose metric spans 10^-span to 10^span within groups."""
    rng = np.random.default_rng(seed)
    m, n = rng.integers(2, 10), rng.integers(12, 60)
    ids = np.concatenate([np.arange(m), rng.integers(0, m, n)])
    x = rng.normal(size=m + n) * np.exp(rng.normal(size=m))[ids]
    a, d = (rng.uniform(0.3, 1, m), rng.uniform(0.3, 2, m)) if seed % 2 else (np.ones(m), np.ones(m))
    h = 10 ** rng.uniform(-span, span, m + n)
    h = np.maximum(h, 2 * step * a[ids]) if debiased else h
    return Case(x, h, ids, step * a, a, d, d.sum() * (share or rng.uniform(0.05, 0.95)), debiased)


def bisected(case: Case) -> np.ndarray:
    """Return the usage of each group by a bisection in the multiplier around one in u."""

    def inverse_square(u: np.ndarray) -> np.ndarray:
        return case.sums((case.h * case.x / (case.s * u[case.ids] + case.r[case.ids])) ** 2)

    def usage(multiplier: float) -> np.ndarray:
        wanted, low, high = multiplier * case.d / case.a, np.zeros(len(case.a)), np.ones(len(case.a))
        for _ in range(55):
            middle = (low + high) / 2
            below = inverse_square(middle) > wanted
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return np.where(high == 1, 1.0, np.where(low == 0, 0.0, (low + high) / 2))

    if case.d[case.sums(case.x**2) > 0].sum() <= case.k:
        return np.ones(len(case.a))
    low, high = -60.0, 60.0
    for _ in range(65):
        middle = (low + high) / 2
        low, high = (middle, high) if (usage(np.exp(middle)) * case.d).sum() > case.k else (low, middle)
    return usage(np.exp((low + high) / 2))


def found(case: Case) -> np.ndarray:
    """Return the usage that the iteration finds, in float64."""
    x, h, s, ids, r, a, d = map(torch.tensor, (case.x, case.h, case.s, case.ids, case.r, case.a, case.d))

    def sums(u: Tensor) -> tuple[Tensor, Tensor]:
        t = s * u[ids] + r[ids]
        values = (h * x / t) ** 2 / t
        return torch.zeros_like(u).index_add(0, ids, values), torch.zeros_like(u).index_add(0, ids, values * s)

    return Problem(r, a, d, torch.tensor([case.k], dtype=torch.float64), None).usage(sums).numpy()


# --- the prox -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("step", [1e-4, 1e-2, 0.4])
@pytest.mark.parametrize("span", [0.5, 3.0])
def test_it_is_what_nested_bisections_find(debiased: bool, step: float, span: float) -> None:
    for seed in range(4):
        case = random_case(seed, debiased=debiased, step=step, span=span)
        np.testing.assert_allclose(found(case), bisected(case), rtol=0, atol=2e-6)


@pytest.mark.parametrize("debiased", [False, True])
def test_it_beats_points_around_it_and_spends_the_budget(debiased: bool) -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        case = random_case(seed, debiased=debiased, step=0.3, span=1.0)
        u = found(case)
        assert (u * case.d).sum() == pytest.approx(case.k)
        w = case.prox(u)
        least = case.objective(w, 0.3)
        for size in (1e-3, 1e-2, 0.3):
            for _ in range(5):
                assert case.objective(w + size * rng.normal(size=len(w)) * (w != 0), 0.3) > least
                assert case.objective(w * np.exp(size * rng.normal(size=len(u)))[case.ids], 0.3) > least - 1e-12


def test_within_the_budget_only_the_convex_form_shrinks() -> None:
    for debiased in (False, True):
        case = random_case(3, debiased=debiased, step=0.1, span=1.0, share=1.0)
        assert found(case).tolist() == [1.0] * len(case.a)
        expected = case.x if debiased else case.x * case.h / (case.h + case.r[case.ids])
        np.testing.assert_allclose(case.prox(found(case)), expected)


STRUCTURES: list[Structure] = [
    Channel("two", 4), FilterShape("seven", (1, 3, 3)), Weight("five", 20), Rows(("six",), 3, 2), NM("eight", 64, 2, 4),
]  # fmt: skip
SHAPES = {"two": (2, 4, 3, 3), "five": (5, 4), "six": (6, 5), "seven": (7, 1, 3, 3), "eight": (8, 8), "none": (3,)}


class Odd(nn.Module):
    """Parameters of many shapes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("debiased", [False, True])
def test_weights_of_every_structure_get_it(structure: Structure, debiased: bool) -> None:
    model = Odd()
    groups, parameters = group([structure], model), dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    h = [torch.rand(parameters[member.tensor].shape, generator=generator) * 3 + 0.3 for member in groups.members]
    r = torch.full((groups.count,), 0.1, dtype=torch.float64)
    weights = Weights(groups, parameters, h, r, debiased)
    budget = torch.tensor([groups.count * 0.4], dtype=torch.float64)
    usage = Problem(r, torch.ones_like(r), 1.0, budget, None).usage(weights.sums)
    (member,) = groups.members
    x = parameters[member.tensor].detach().double().numpy()
    ids, one = member.ids.expand(x.shape).numpy().ravel(), np.ones(groups.count)
    case = Case(x.ravel(), h[0].double().numpy().ravel(), ids, 0.1 * one, one, one, float(budget), debiased)
    np.testing.assert_allclose(usage, bisected(case), atol=1e-5)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    weights.scale_(usage)
    np.testing.assert_allclose(parameters[member.tensor].detach().numpy().ravel(), case.prox(bisected(case)), atol=1e-5)
    assert all(torch.equal(before[name], parameters[name]) for name in before if name != member.tensor)
    if debiased:
        kept = (usage == 1)[member.ids].expand(x.shape)
        assert torch.equal(parameters[member.tensor][kept], before[member.tensor][kept])


def test_what_is_not_finite_leaves_all_weights_as_they_are() -> None:
    model = Odd()
    groups, parameters = group([Weight("five", 20)], model), dict(model.named_parameters())
    weights = Weights(groups, parameters, [torch.ones(5, 4)], torch.full((20,), 0.1, dtype=torch.float64), True)
    before = model.five.detach().clone()
    weights.scale_(torch.full((20,), 0.5, dtype=torch.float64).index_fill(0, torch.tensor([3]), torch.nan))
    assert torch.equal(model.five, before)
    weights.scale_(torch.full((20,), 0.5, dtype=torch.float64))
    assert not torch.equal(model.five, before)


# --- after an optimizer's step ------------------------------------------------------------------------------------

Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizers] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "AMSGrad": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, amsgrad=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.02),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "Nesterov": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True),
}


def fresh() -> nn.Module:
    """Return a small residual net that trains."""
    return looking_trained(ResNet(1, (8, 8, 8))).train()


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Narrower widths."""
    inputs = (torch.ones(PIXELS),)
    return planner.plan(fresh(), inputs, nets.anywhere(), latency=0.5, scope=nets.whole_streams(fresh(), inputs))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(PIXELS, generator=generator), torch.randn(2, 10, generator=generator)
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


def halves(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "bn" not in name]


def rated(model: nn.Module, first: float, second: float) -> torch.optim.Optimizer:
    """Return SGD with a learning rate for the normalisations."""
    own = {id(p) for p in halves(model)}
    rest = [p for p in model.parameters() if id(p) not in own]
    return torch.optim.SGD([{"params": halves(model), "lr": first}, {"params": rest, "lr": second}], momentum=0.9)


def left_by(optimizers: Optimizers, model: nn.Module, plan: Plan, steps: int) -> dict[str, Tensor]:
    """Return the weights that the optimizer alone leaves after the last step, the others being proximal."""
    optimizer = optimizers(model.parameters())
    proximal = attach(plan, model, optimizer, steps=20)
    for number in range(steps - 1):
        step(model, optimizer, number)
    proximal.step = lambda: None  # type: ignore[method-assign]
    step(model, optimizer, steps - 1)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("name", ["SGD", "momentum", "Nesterov"])
def test_after_sgd_it_is_the_prox_at_the_weights_that_are_left(plan: Plan, name: str, debiased: bool) -> None:
    plan = plan.model_copy(update={"debiased": debiased})
    alone, model = left_by(OPTIMIZERS[name], fresh(), plan, 3), fresh()
    optimizer = OPTIMIZERS[name](model.parameters())
    attach(plan, model, optimizer, steps=20)
    for number in range(3):
        step(model, optimizer, number)
    state = pools(plan, model, plan.graph(model))
    factors = envelope.scale(
        state.groups.norms(alone), Schedule(20).step_size(3), state.a, state.d, state.k, pool=state.pool,
        debiased=debiased,
    )  # fmt: skip
    assert factors.min() < 1
    state.groups.scale_(alone, factors)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), alone[key], rtol=1e-6, atol=0)


def reference(state: Pools, pool: int, weights: dict[str, Tensor], h: dict[str, Tensor], about: tuple) -> Case:
    """Return the problem of one pool; `about` is the step size and the form."""
    chosen = (state.pool == pool).nonzero().flatten()
    x, metric, ids = [], [], []
    for member in state.groups.members:
        inside = torch.isin(member.ids, chosen).expand(weights[member.tensor].shape)
        x.append(weights[member.tensor][inside])
        metric.append(h[member.tensor][inside])
        ids.append(member.ids.expand(inside.shape)[inside])
    of = torch.cat(ids) - chosen[0]
    a, d = state.a[chosen].numpy(), state.d[chosen].numpy()
    size, debiased = about
    lowest = torch.tensor(2 * size * a)[of] if debiased else torch.zeros(len(of))
    raised = torch.maximum(torch.cat(metric).double(), lowest)
    return Case(
        torch.cat(x).double().numpy(), raised.numpy(), of.numpy(), size * a, a, d, float(state.k[pool]), debiased
    )


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("name", ["Adam", "AMSGrad", "AdamW", "SGD"])
def test_elementwise_it_is_the_prox_in_the_metric_of_the_optimizer(plan: Plan, name: str, debiased: bool) -> None:
    plan, model = plan.model_copy(update={"debiased": debiased}), fresh()
    optimizer = OPTIMIZERS[name](model.parameters())
    proximal = attach(plan, model, optimizer, steps=20, elementwise=True)
    for number in range(9):
        step(model, optimizer, number)
    left: dict[str, Tensor] = {}
    whole, taken = proximal.step, dict(model.named_parameters())

    def looked() -> None:
        left.update({n: p.detach().clone() for n, p in taken.items()})
        whole()

    proximal.step = looked  # type: ignore[method-assign]
    step(model, optimizer, 9)
    state = pools(plan, model, plan.graph(model))
    h = {n: torch.ones_like(p) for n, p in taken.items()}
    if name != "SGD":
        for key, parameter in taken.items():
            kept = optimizer.state[parameter]
            v = kept["max_exp_avg_sq" if name == "AMSGrad" else "exp_avg_sq"]
            h[key] = (v / (1 - 0.999**10)).sqrt() + 1e-8
    means, shrunk = state.groups.sums(h) / state.groups.sizes(h), False
    for pool in range(len(state.k)):
        unit = float((1 / means)[state.pool == pool].mean())
        about = (Schedule(20).step_size(10), debiased)
        case = reference(state, pool, left, {key: each * unit for key, each in h.items()}, about)
        after = reference(state, pool, {n: p.detach() for n, p in taken.items()}, h, about)
        budget = proximal.schedule.budgets(10, state.k, state.costs(torch.ones_like(state.pool, dtype=torch.bool)))
        case = Case(**{**vars(case), "k": float(budget[pool])})
        np.testing.assert_allclose(after.x, case.prox(bisected(case)), rtol=1e-3, atol=1e-6)
        shrunk |= bool((after.x != case.x).any())
    assert shrunk


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_elementwise_training_ends_on_the_budget(plan: Plan, name: str, debiased: bool) -> None:
    plan, model = plan.model_copy(update={"debiased": debiased}), fresh()
    optimizer = OPTIMIZERS[name](model.parameters())
    proximal = attach(plan, model, optimizer, steps=150, elementwise=True)
    for number in range(153):
        step(model, optimizer, number)
    state = pools(plan, model, plan.graph(model))
    kept = state.groups.norms(dict(model.named_parameters())) > 0
    assert state.costs(kept).tolist() == state.k.tolist()
    assert proximal.changed_at_freeze <= 2  # shrinking has done the work


# --- learning rates -----------------------------------------------------------------------------------------------


def test_a_groups_step_follows_the_learning_rates_of_its_weights(plan: Plan) -> None:
    model = fresh()
    state, optimizer = pools(plan, model, plan.graph(model)), rated(model, 0.03, 0.01)
    sizes = Metric(optimizer, state, dict(model.named_parameters())).sizes(0.1)
    counts = torch.tensor([
        [sum(int((member.ids == j).expand(p.shape).sum()) for member in state.groups.members
             for p in [dict(model.named_parameters())[member.tensor]] if ("bn" in member.tensor) == norm)
         for norm in (False, True)] for j in range(len(state.pool))
    ]).double()  # fmt: skip
    rates = counts.sum(1) / (counts[:, 0] / 0.03 + counts[:, 1] / 0.01)
    torch.testing.assert_close(sizes, 0.1 * rates / rates.mean())
    for options in optimizer.param_groups:
        options["lr"] = 0.5
    assert Metric(optimizer, state, dict(model.named_parameters())).sizes(0.1) == 0.1


def test_rates_may_be_tensors(plan: Plan) -> None:
    model = fresh()
    state, parameters = pools(plan, model, plan.graph(model)), dict(model.named_parameters())
    metric = [Metric(rated(model, *rates), state, parameters) for rates in ((0.03, 0.01),) * 2]
    for options in metric[1]._optimizer.param_groups:
        options["lr"] = torch.tensor(options["lr"])
    torch.testing.assert_close(metric[0].sizes(0.1), metric[1].sizes(0.1))


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("kind", ["layer", "normalisations", "all"])
def test_weights_that_do_not_train_are_not_shrunk_but_cut(plan: Plan, kind: str, elementwise: bool) -> None:
    model = fresh()
    named = dict(model.named_parameters())
    still = {n for n in named if kind == "all" or (n.startswith("layer1") if kind == "layer" else "bn" in n)}
    groups = [{"params": [p for n, p in named.items() if (n in still) == frozen], "lr": 0.01 * (not frozen)}
              for frozen in (False, True)]  # fmt: skip
    optimizer = torch.optim.SGD([each for each in groups if each["params"]], momentum=0.9)
    proximal = attach(plan, model, optimizer, steps=30, elementwise=elementwise)
    before = {n: p.detach().clone() for n, p in named.items()}
    for number in range(29):
        step(model, optimizer, number)
    assert all(torch.equal(named[n], before[n]) for n in still)
    state = pools(plan, model, plan.graph(model))
    assert (proximal.nonzero() < len(state.pool)) == (kind == "layer")  # others shrink
    step(model, optimizer, 29)
    assert proximal.frozen
    kept = state.groups.norms(named) > 0
    assert state.costs(kept).tolist() == state.k.tolist()
    for n in still:
        assert ((named[n] == before[n]) | (named[n] == 0)).all()


@pytest.mark.parametrize(("about", "said"), [
    ({"steps": 0}, "steps is 0; it must be at least 1"),
    ({"total": 0.0}, "total is 0.0; it must be above 0"),
    ({"anneal": 1.5}, "anneal is 1.5; it is a share of the steps"),
])  # fmt: skip
def test_impossible_schedules_are_refused(about: dict[str, float], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        Schedule(**{"steps": 5, **about})
