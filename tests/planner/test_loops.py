"""Training loops as people write them: each ends exactly on the budget."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import planner
from backends.rebuild import rebuild
from planner import Plan, Proximal, attach, harden_
from planner.pools import excess, pools
from tools.examples.resnet import ResNet

from . import nets
from .nets import PIXELS, looking_trained

SHRINKING, STEPS = 12, 16
INPUTS = (torch.ones(PIXELS),)


def fresh() -> nn.Module:
    """Return a small residual net that trains."""
    return looking_trained(ResNet(1, (8, 8, 8))).train()


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Narrower widths."""
    plan = planner.plan(fresh(), INPUTS, nets.anywhere(), latency=0.5)
    assert any(0 < pool.budget < 8 for pool in plan.pools)
    return plan


def loss(model: nn.Module, step: int) -> Tensor:
    """Return the loss on one of many batches."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(PIXELS, generator=generator), torch.randint(10, PIXELS[:1], generator=generator)
    value: Tensor = nn.functional.cross_entropy(model(x).float(), y)
    return value


def sgd(model: nn.Module, **options: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, **options)


def support(plan: Plan, model: nn.Module) -> Tensor:
    """Return which groups are not zero."""
    return pools(plan, model, plan.graph(model)).groups.norms(dict(model.named_parameters())) > 0


# --- the loops ----------------------------------------------------------------------------------------------------


def plain(plan: Plan, model: nn.Module) -> Proximal:
    """Call backward and step."""
    optimizer = sgd(model)
    proximal = attach(plan, model, optimizer, steps=SHRINKING)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    return proximal


def accumulated(plan: Plan, model: nn.Module) -> Proximal:
    """Step after every third backward."""
    optimizer = sgd(model)
    proximal = attach(plan, model, optimizer, steps=SHRINKING)
    for step in range(3 * STEPS):
        (loss(model, step) / 3).backward()
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    return proximal


def clipped(plan: Plan, model: nn.Module) -> Proximal:
    """Clip gradients by their norm."""
    optimizer = sgd(model)
    proximal = attach(plan, model, optimizer, steps=SHRINKING)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return proximal


def autocast(plan: Plan, model: nn.Module) -> Proximal:
    """Compute in bfloat16, keep float32 weights."""
    optimizer = sgd(model)
    proximal = attach(plan, model, optimizer, steps=SHRINKING)
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, step)
        value.backward()
        optimizer.step()
    return proximal


def bfloat16(plan: Plan, model: nn.Module) -> Proximal:
    """Keep weights and momentum in bfloat16; the plan's inputs are float32, so the graph is made before."""
    graph = plan.graph(model)
    model.to(torch.bfloat16)
    optimizer = sgd(model)
    proximal = attach(plan, model, optimizer, steps=SHRINKING, graph=graph)
    for step in range(STEPS):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(PIXELS, generator=generator).bfloat16()).float().square().mean().backward()
        optimizer.step()
    model.float()
    return proximal


def two_rates(plan: Plan, model: nn.Module) -> Proximal:
    """Train normalisations and biases at another rate, without decay."""
    flat = [p for p in model.parameters() if p.dim() < 2]
    deep = [p for p in model.parameters() if p.dim() >= 2]
    groups = [{"params": deep, "lr": 0.01, "weight_decay": 5e-4}, {"params": flat, "lr": 0.002}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    proximal = attach(plan, model, optimizer, steps=SHRINKING)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        scheduler.step()
    return proximal


def compiled(plan: Plan, model: nn.Module) -> Proximal:
    """Train the compiled model and attach to it."""
    wrapped = torch.compile(model, backend="eager")
    optimizer = sgd(wrapped)
    proximal = attach(plan, wrapped, optimizer, steps=SHRINKING)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(wrapped, step).backward()
        optimizer.step()
    return proximal


def compiled_after(plan: Plan, model: nn.Module) -> Proximal:
    """Attach to the model, then compile it in place."""
    optimizer = sgd(model)
    proximal = attach(plan, model, optimizer, steps=SHRINKING)
    model.compile(backend="eager")
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    return proximal


def closure(plan: Plan, model: nn.Module) -> Proximal:
    """Let the optimizer call the loss."""
    optimizer = sgd(model)
    proximal = attach(plan, model, optimizer, steps=SHRINKING)
    for step in range(STEPS):

        def evaluate(step: int = step) -> float:
            optimizer.zero_grad()
            value = loss(model, step)
            value.backward()
            return value.item()

        optimizer.step(evaluate)
    return proximal


LOOPS: list[Callable[[Plan, nn.Module], Proximal]] = [
    plain, accumulated, clipped, autocast, bfloat16, two_rates, compiled, compiled_after, closure,
]  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_every_loop_ends_exactly_on_its_budget(plan: Plan, loop: Callable[[Plan, nn.Module], Proximal]) -> None:
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    proximal = loop(plan, model)
    assert (proximal.taken, proximal.frozen) == (STEPS, True)
    state = pools(plan, model, plan.graph(model))
    assert state.costs(support(plan, model)).tolist() == [pool.budget for pool in plan.pools]
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.dim() > 1)
    assert rebuild(plan, model.eval())


@pytest.mark.parametrize("loop", [compiled, compiled_after])
def test_a_compiled_model_trains_to_the_same_bits(plan: Plan, loop: Callable[[Plan, nn.Module], Proximal]) -> None:
    first, second = fresh(), fresh()
    plain(plan, first)
    loop(plan, second)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


# --- skipped steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["called", "fused"])
def test_a_step_that_the_scaler_skips_does_not_advance_the_schedule(plan: Plan, fused: bool) -> None:
    model = fresh()
    optimizer = sgd(model, fused=fused)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == fused
    proximal = attach(plan, model, optimizer, steps=SHRINKING)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        value = loss(model, step) * (torch.inf if step == 3 else 1.0)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert (proximal.taken, scaler.get_scale()) == (3, 8.0)
    assert (proximal.taken, proximal.frozen) == (STEPS, True)
    assert excess(plan, model, plan.graph(model)) == []


# --- averages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unwrap", [False, True], ids=["as it is", "the model within"])
def test_an_average_of_the_weights_is_hardened_on_its_own(plan: Plan, unwrap: bool) -> None:
    model = fresh()
    optimizer = sgd(model)
    proximal = attach(plan, model, optimizer, steps=SHRINKING)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        average.update_parameters(model)
    assert proximal.frozen
    own: nn.Module = average.module
    assert excess(plan, own, plan.graph(own)) != []  # groups that left the model fade in the average, but never vanish
    assert harden_(plan, own if unwrap else average) > 0
    assert excess(plan, own, plan.graph(own)) == []
    assert torch.equal(support(plan, own), support(plan, model))
    assert rebuild(plan, own.eval())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to see host synchronisation")
def test_a_step_does_not_wait_for_the_device(plan: Plan) -> None:
    model = fresh().cuda()
    proximal = attach(plan, model, sgd(model), steps=SHRINKING)
    proximal.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(SHRINKING - 2):
            proximal.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    proximal.step()
    assert proximal.frozen
