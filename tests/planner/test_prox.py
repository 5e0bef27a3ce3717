"""Training ends exactly on the budget, with exact zeros, and the support then stays as it is."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import planner
from backends.rebuild import rebuild
from planner import Plan, attach, harden_
from planner.document import with_global_budget
from planner.graph import trace
from planner.groups import Groups, group
from planner.importance import Importance
from planner.pools import Pools, excess, pools
from planner.prox import Schedule
from planner.spec import Pool
from planner.structures import Filter
from profiles.errors import PlanError
from tools.examples.resnet import ResNet

from . import nets
from .nets import PIXELS, looking_trained

INPUTS = (torch.ones(PIXELS),)
Optimizers = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizers] = {
    "SGD without momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05),
}


def fresh() -> nn.Module:
    """Return a small residual net."""
    return looking_trained(ResNet(1, (8, 8, 8)))


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Two narrowed widths and a block that leaves."""
    graph = trace(fresh(), INPUTS)
    widths = {w.name: {n: (1 - n / w.size) ** 2 for n in range(1, w.size + 1)} for w in graph.cuttable}
    blocks = {block.name: 10.0 * (block.name != "layer2.0") for block in graph.blocks}
    importance = Importance("by hand", widths, blocks, {})
    scope = nets.whole_streams(fresh(), INPUTS)
    plan = planner.plan(fresh(), INPUTS, nets.anywhere(), latency=0.5, importance=importance, scope=scope)
    assert [(pool.structure, 0 < pool.budget < 8) for pool in plan.pools] == [
        ("filter", True), ("filter", True), ("depth", False),
    ]  # fmt: skip
    return plan


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, seed: int = 0) -> None:
    """Fit random targets."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(PIXELS, generator=generator), torch.randn(2, 10, generator=generator)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def alive(plan: Plan, model: nn.Module) -> tuple[Pools, Tensor]:
    """Return the pools, and which groups are not zero."""
    state = pools(plan, model, plan.graph(model))
    return state, state.groups.norms(dict(model.named_parameters())) > 0


# --- attach -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_ends_on_the_budget_with_exact_zeros(plan: Plan, name: str, debiased: bool) -> None:
    plan, model = plan.model_copy(update={"debiased": debiased}), fresh()
    optimizer = OPTIMIZERS[name](model.parameters())
    proximal = attach(plan, model, optimizer, steps=40)
    train(model, optimizer, 39)
    assert not proximal.frozen
    train(model, optimizer, 1)
    assert proximal.frozen
    state, kept = alive(plan, model)
    assert state.costs(kept).tolist() == [pool.budget for pool in plan.pools]
    assert proximal.nonzero() == proximal.budget_groups == sum(pool.budget for pool in plan.pools)
    assert excess(plan, model, plan.graph(model)) == []
    for member in state.groups.members:
        removed = ~torch.cat([kept, torch.tensor([True])])[member.ids]
        weights = dict(model.named_parameters())[member.tensor]
        assert (weights[removed.expand(weights.shape)] == 0.0).all()
    for tensor in model.state_dict().values():
        assert not ((tensor != 0) & (tensor.abs() < torch.finfo(torch.float32).tiny)).any()
    train(model, optimizer, 5)
    assert torch.equal(alive(plan, model)[1], kept)
    assert rebuild(plan, model)


def test_survivors_train_on_after_the_support_is_fixed(plan: Plan) -> None:
    model = fresh()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    proximal = attach(plan, model, optimizer, steps=5)
    train(model, optimizer, 5)
    before, zero = copy.deepcopy(model.state_dict()), {n: p == 0 for n, p in model.named_parameters()}
    train(model, optimizer, 3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter == 0, zero[name])
        assert not torch.equal(parameter, before[name]) or zero[name].all()
    assert proximal.taken == 8


def test_shrinking_does_most_of_the_work_before_the_support_is_fixed(plan: Plan) -> None:
    model = fresh()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    proximal = attach(plan, model, optimizer, steps=400)
    train(model, optimizer, 400)
    assert proximal.changed_at_freeze == 0


def test_a_budget_for_everything_changes_nothing(plan: Plan) -> None:
    own = Pool(name="all", structure="filter", members=("layer1.0.conv1",), weights=(1.0,), costs=(0.1,), budget=0.8)
    plan, model = plan.model_copy(update={"pools": (own,)}), fresh()
    before = copy.deepcopy(model.state_dict())
    proximal = attach(plan, model, OPTIMIZERS["SGD"](model.parameters()), steps=3)
    for _ in range(5):
        proximal.step()
    assert proximal.frozen
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_plan_that_keeps_everything_trains(plan: Plan) -> None:
    plan, model = plan.model_copy(update={"pools": ()}), fresh()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    proximal = attach(plan, model, optimizer, steps=2)
    train(model, optimizer, 3)
    assert (proximal.frozen, proximal.nonzero(), proximal.budget_groups) == (True, 0, 0)
    assert harden_(plan, model) == 0


def test_a_saved_state_continues_as_if_uninterrupted(plan: Plan) -> None:
    for pause in (3, 12):  # while groups shrink, and on a fixed support
        whole, model = fresh(), fresh()
        first = OPTIMIZERS["SGD"](whole.parameters())
        attach(plan, whole, first, steps=10)
        train(whole, first, 15)
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        proximal = attach(plan, model, optimizer, steps=10)
        train(model, optimizer, pause)
        resumed = OPTIMIZERS["SGD"](model.parameters())
        resumed.load_state_dict(optimizer.state_dict())
        attach(plan, model, resumed, steps=10).load_state_dict(proximal.state_dict())
        train(model, resumed, 15 - pause)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "layer2.0.bn2.bias"])
def test_an_optimizer_without_the_plans_parameters_is_refused(plan: Plan, name: str) -> None:
    model = fresh()
    some = [parameter for other, parameter in model.named_parameters() if other != name]
    with pytest.raises(PlanError, match=f"does not train {name}, which the plan cuts; give it model.parameters()"):
        attach(plan, model, torch.optim.SGD(some, lr=0.1))


def test_impossible_requests_are_refused(plan: Plan) -> None:
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PlanError, match="steps is 0; it must be at least 1"):
        attach(plan, model, optimizer, steps=0)
    with pytest.raises(PlanError, match="made for another model"):
        attach(plan, ResNet(1, (8, 8, 9)), optimizer)
    heavy = plan.pools[0].model_copy(update={"weights": (2.0,)})
    with pytest.raises(PlanError, match="a pool has weight 2; the de-biased form takes weights below 2"):
        attach(plan.model_copy(update={"pools": (heavy,)}), model, optimizer)


@pytest.mark.parametrize("steps", [24, 25, 100, 5000])
@pytest.mark.parametrize("total", [1.0, 6.0])
def test_the_step_sizes_sum_to_the_total(steps: int, total: float) -> None:
    schedule = Schedule(steps, total)
    sizes = [schedule.step_size(t) for t in range(1, steps + 1)]
    assert sum(sizes) == pytest.approx(total)
    assert sizes == sorted(sizes)
    assert max(sizes) <= 0.5


def test_few_steps_are_held_at_a_half() -> None:
    assert [Schedule(3).step_size(t) for t in (1, 2, 3)] == [0.5, 0.5, 0.5]


def test_budgets_of_zero_fade_and_others_stand() -> None:
    target, full = torch.tensor([0.0, 3.0]), torch.tensor([8.0, 8.0])
    found = [Schedule(4).budgets(t, target, full).tolist() for t in (1, 2, 4)]
    assert found == [[6.0, 3.0], [4.0, 3.0], [0.0, 3.0]]


def test_a_budget_may_fall_from_everything_to_the_target(plan: Plan) -> None:
    plan = plan.model_copy(update={"pools": plan.pools[:2]})  # without the block that fades
    steps: list[int] = []
    for anneal in (0.0, 0.5):
        model = fresh()
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        proximal = attach(plan, model, optimizer, steps=Schedule(100, anneal=anneal))
        while proximal.nonzero() == 16:
            train(model, optimizer, 1)
        steps.append(proximal.taken)
        train(model, optimizer, 100 - proximal.taken)
        assert proximal.frozen
        assert proximal.nonzero() == proximal.budget_groups
    assert steps[0] < steps[1]


# --- what is not finite -------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all tensors say that they are not on a CPU, so that nothing looks at values."""
    monkeypatch.setattr(Tensor, "is_cpu", property(lambda _: False))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_off_the_cpu_steps_at_weights_that_are_not_finite_are_skipped_and_reported(
    plan: Plan, value: float, elementwise: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = fresh()
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    proximal = attach(plan, model, optimizer, steps=8, elementwise=elementwise)
    train(model, optimizer, 3)
    weights = dict(model.named_parameters())["layer1.0.conv1.weight"]
    with torch.no_grad():
        was = weights[0, 0, 0, 0].clone()
        weights[0, 0, 0, 0] = value
        before = copy.deepcopy(model.state_dict())
        proximal.step()
        torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0, equal_nan=True)
        weights[0, 0, 0, 0] = was
    assert (proximal.taken, proximal.skipped) == (4, 1)
    assert told(caplog) == []
    train(model, optimizer, 4)
    assert proximal.frozen
    assert "1 proximal steps were left out: weights were not finite" in told(caplog)
    assert proximal.nonzero() == proximal.budget_groups


@pytest.mark.usefixtures("elsewhere")
def test_a_support_is_not_fixed_on_weights_that_are_not_finite(plan: Plan) -> None:
    model = fresh()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    proximal = attach(plan, model, optimizer, steps=4)
    with torch.no_grad():
        dict(model.named_parameters())["layer1.0.conv1.weight"].fill_(torch.nan)
    for _ in range(3):
        proximal.step()
    with pytest.raises(PlanError, match="training diverged: weights not finite at step 4; lower the learning rate"):
        proximal.step()


# --- the choice of groups -----------------------------------------------------------------------------------------


def test_hardening_is_exact_and_keeps_the_strongest(plan: Plan) -> None:
    model = fresh()
    state, _ = alive(plan, model)
    norms = state.groups.norms(dict(model.named_parameters()))
    assert harden_(plan, model) == len(norms) - sum(pool.budget for pool in plan.pools)
    kept = alive(plan, model)[1]
    assert state.costs(kept).tolist() == [pool.budget for pool in plan.pools]
    for pool in range(len(plan.pools)):
        inside = state.pool == pool
        weakest = norms[inside & kept].min() if kept[inside].any() else torch.inf
        assert norms[inside & ~kept].max() <= weakest
    assert harden_(plan, model) == 0


def test_hardening_says_what_it_changed(plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    model = fresh()
    with caplog.at_level("INFO", logger="planner.prox"):
        changed = harden_(plan, model)
    sizes = {pool.name: 8 if pool.structure == "filter" else 1 for pool in plan.pools}
    gone = {pool.name: int(sizes[pool.name] - pool.budget) for pool in plan.pools}
    assert told(caplog) == [f"{name}: {count} groups set to zero" for name, count in gone.items() if count]
    assert changed == sum(gone.values())
    caplog.clear()
    assert harden_(plan, model) == 0
    assert told(caplog) == []


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "planner.prox"]


def subnormal(model: nn.Module) -> list[str]:
    tiny = torch.finfo(torch.float32).tiny
    return [n for n, t in model.state_dict().items() if t.is_floating_point() and ((t != 0) & (t.abs() < tiny)).any()]


def test_no_statistics_of_what_left_fade_into_subnormal_numbers(plan: Plan) -> None:
    model = fresh()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    attach(plan, model, optimizer, steps=20)
    train(model, optimizer, 20)
    kept = alive(plan, model)[1]
    statistics = model.get_submodule("layer1.0.bn1").running_var
    first = kept[: len(statistics)]
    assert torch.equal(statistics == 0, ~first)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.95  # so that what fades is subnormal after 30 steps
    train(model, optimizer, 31)
    assert subnormal(model) == []


@pytest.mark.parametrize("budget_ms", [0.5, 1.0, 1.7, 2.5, 3.1])
def test_hardening_to_milliseconds_fills_the_budget(plan: Plan, budget_ms: float) -> None:
    shared = Pool(
        name="global",
        structure="filter",
        members=("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"),
        weights=(1.0, 0.3, 0.6),
        costs=(0.00021, 0.00013, 0.00007),
        budget=budget_ms * 1e-3,
    )
    plan, model = plan.model_copy(update={"pools": (shared,)}), fresh()
    harden_(plan, model)
    state, kept = alive(plan, model)
    spent = float(state.costs(kept).sum())
    assert spent <= shared.budget * (1 + 1e-9)
    assert float(state.d[~kept].min()) > shared.budget - spent  # nothing that fits was left out


@pytest.mark.parametrize("keep", range(1, 9))
def test_a_budget_that_is_a_sum_of_costs_pays_for_all_of_them(plan: Plan, keep: int) -> None:
    cost = 7e-7 / 3  # in float32, 3, 6 or 7 of them cost more than their rounded sum
    about = {"name": "w", "structure": "filter", "members": ("layer1.0.conv1",), "weights": (1.0,)}
    own = Pool(**about, costs=(cost,), budget=keep * cost)
    plan, model = plan.model_copy(update={"pools": (own,)}), fresh()
    harden_(plan, model)
    assert int(alive(plan, model)[1].sum()) == keep


def greedy(norms: list[float], a: list[float], d: list[float], pool: list[int], k: list[float]) -> list[bool]:
    """Take groups by x²/(a·d) while they fit, one by one."""
    left, kept = [budget * (1 + 1e-9) for budget in k], [False] * len(norms)
    for j in sorted(range(len(norms)), key=lambda j: (-(norms[j] ** 2) / (a[j] * d[j]), j)):
        if d[j] <= left[pool[j]]:
            kept[j], left[pool[j]] = True, left[pool[j]] - d[j]
    return kept


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_selection_is_the_greedy_one(data: st.DataObject) -> None:
    count, pools_ = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 4))
    unit = [data.draw(st.sampled_from([1.0, 1e-6, 1e-3, 250.0])) for _ in range(pools_)]  # groups, seconds, ...
    pool = [data.draw(st.integers(0, pools_ - 1)) for _ in range(count)]
    steps = st.integers(1, 8).map(float)
    norms = data.draw(st.lists(st.floats(0, 10, width=32), min_size=count, max_size=count))
    a = data.draw(st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=count, max_size=count))
    d = [data.draw(steps) * unit[p] for p in pool]
    k = [data.draw(st.integers(0, 40)) * unit[p] for p in range(pools_)]
    state = Pools(
        tuple(map(str, range(pools_))),
        torch.arange(pools_),
        Groups((), (), torch.zeros(count, dtype=torch.int64)),
        torch.tensor(a, dtype=torch.float64),
        torch.tensor(d, dtype=torch.float64),
        torch.tensor(pool),
        torch.tensor(k, dtype=torch.float64),
    )
    kept = state.select(torch.tensor(norms))
    assert kept.tolist() == greedy(norms, a, d, pool, k)
    assert (state.costs(kept) <= state.k * (1 + 1e-8)).all()


# --- one budget for all -------------------------------------------------------------------------------------------


def test_a_global_budget_works_end_to_end(plan: Plan) -> None:
    model = fresh()
    shared = with_global_budget(plan, model)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    attach(shared, model, optimizer, steps=60)
    train(model, optimizer, 65)
    state, kept = alive(shared, model)
    spent, budget = float(state.costs(kept).sum()), shared.pools[0].budget
    assert budget - float(state.d[: len(kept) - 1].max()) < spent <= budget * (1 + 1e-9)
    dense = rebuild(shared, model)
    per_width = torch.split(kept[:-1], [8] * len(shared.pools[0].members))
    assert [dense.get_submodule(name).out_channels for name in shared.pools[0].members] == [
        max(1, int(part.sum())) for part in per_width
    ]


@pytest.mark.parametrize("debiased", [True, False])
def test_no_width_loses_all_of_its_channels_to_a_global_budget(plan: Plan, *, debiased: bool) -> None:
    """Weak channels of a dear layer pay least: without any, what flows through the network would be constant."""
    names = ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1")
    about = {"name": "global", "structure": "filter", "members": names, "weights": (1.0, 1.0, 1.0)}
    shared = Pool(**about, costs=(1.0, 5.0, 1.0), budget=20.0)  # pays for all of the cheap ones
    plan, model = plan.model_copy(update={"pools": (shared,), "debiased": debiased}), fresh()
    graph, parameters = plan.graph(model), dict(model.named_parameters())
    weak = group([Filter(graph.width[names[1]])], model)
    weak.scale_(parameters, torch.full((8,), 1e-3))
    strongest = weak.norms(parameters).argsort(descending=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    proximal = attach(plan, model, optimizer, steps=20)
    for _ in range(20):
        optimizer.step()
    assert proximal.frozen
    least = {w.name: min(w.considered) for w in plan.widths}
    norms = {name: group([Filter(graph.width[name])], model).norms(parameters) for name in names}
    assert (norms[names[1]] > 0)[strongest].tolist() == [True] * least[names[1]] + [False] * (8 - least[names[1]])
    assert all(int((own > 0).sum()) >= least[name] for name, own in norms.items())
    spent = sum(int((norms[name] > 0).sum()) * cost for name, cost in zip(names, shared.costs, strict=True))
    assert shared.budget - 1 < spent <= shared.budget
    assert harden_(plan, model) == 0


def test_a_width_that_a_global_budget_empties_keeps_one_channel(plan: Plan) -> None:
    model = fresh()
    shared = with_global_budget(plan, model)
    first = shared.pools[0].members[0]
    graph = shared.graph(model)
    model = nets.masked(model, graph, {first: torch.tensor([], dtype=torch.int64)})
    harden_(shared, model)
    assert rebuild(shared, model).get_submodule(first).out_channels == 1
