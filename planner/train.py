"""`fit()`: a short reference loop with resume; users keep their own and call planner.attach in it."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from planner.agreement import Agreement
from planner.evaluation import evaluating
from planner.importance import Loss
from planner.parallel import unwrapped
from planner.prox import Proximal, attach
from planner.spec import Plan
from profiles import atomic
from profiles.errors import PlanError

log = logging.getLogger(__name__)
Phase = Literal["dense", "sparse", "finetune"]


class Batches(Protocol):
    """What is trained on: a sized iterable of (inputs, targets), iterated once an epoch.

    If it has `set_epoch(epoch)` that is called first, so that order and augmentation can follow from the epoch alone
    and an interrupted run continues as if it had not been.
    """

    def __len__(self) -> int:
        """Return the number of batches."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (inputs, targets)."""


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum and a cosine learning rate after a linear warm-up of 5 % of the steps."""

    epochs: int
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    sparse_fraction: float = 0.5  # of the steps shrink groups, the others train what is left
    bfloat16: bool = False  # autocast the forward pass

    def __post_init__(self) -> None:
        if not 0 < self.sparse_fraction <= 1:
            raise PlanError(f"sparse_fraction is {self.sparse_fraction}; it must be above 0 and at most 1")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, 0-based."""
        warm = max(1, steps // 20)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@dataclass(frozen=True)
class Moment:
    """The state of a training run, as progress and history show it."""

    step: int
    steps: int
    epoch: float
    loss: float
    nonzero_groups: int
    budget_groups: int
    phase: Phase  # "dense" without a plan; "sparse" while groups shrink; "finetune" on a fixed support


@dataclass
class _Run:
    model: nn.Module
    forward: nn.Module  # the model, or what wraps it
    optimizer: SGD
    proximal: Proximal | None
    agreement: Agreement | None
    steps: int
    history: list[Moment]
    epoch: int = 0


def fit(
    model: nn.Module,
    train: Batches,
    recipe: Recipe,
    *,
    plan: Plan | Agreement | None = None,
    checkpoint: Path | None = None,
    watch: Callable[[Moment], None] | None = None,
    loss: Loss = cross_entropy,
) -> list[Moment]:
    """Train `model` in place, with the proximal steps of `plan` if given, and return the history.

    With an Agreement, its plan is made again on the way, and is its `plan` at the end.

    With `checkpoint`, the state is saved after every epoch; the same call with the same recipe and plan continues it,
    to the same bits on a CPU. It holds torch's random state, for dropout, but not that of numpy or of Python's random.
    For one process: with several, write the loop and call `attach` in it.
    """
    steps = recipe.epochs * len(train)
    optimizer = SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )
    shrinking = max(1, round(steps * recipe.sparse_fraction))
    agreement = plan if isinstance(plan, Agreement) else None
    identity = _identity(recipe, plan, len(train))
    proximal = attach(plan, model, optimizer, steps=shrinking) if isinstance(plan, Plan) else None
    if agreement is not None:
        proximal = agreement.attach(model, optimizer, steps=shrinking)
    run = _Run(unwrapped(model), model, optimizer, proximal, agreement, steps, [])
    if checkpoint is not None and checkpoint.exists():
        _restore(run, checkpoint, identity)
    while run.epoch < recipe.epochs:
        for moment in _epoch(run, train, recipe, loss):
            run.history.append(moment)
            if watch:
                watch(moment)
        run.epoch += 1
        if agreement is not None:
            agreement.after_epoch()
        if checkpoint is not None:
            _save(run, checkpoint, identity)
    return run.history


def _epoch(run: _Run, train: Batches, recipe: Recipe, loss: Loss) -> Iterator[Moment]:
    """Train for one epoch, reporting about eight times; raises PlanError if the loss is not finite."""
    if (set_epoch := getattr(train, "set_epoch", None)) is not None:
        set_epoch(run.epoch)
    run.forward.train()
    device = next(run.model.parameters()).device
    every, total, since = max(1, len(train) // 8), torch.zeros((), device=device), 0
    for index, (x, y) in enumerate(train):
        step = run.epoch * len(train) + index
        for parameters in run.optimizer.param_groups:
            parameters["lr"] = recipe.rate(step, run.steps)
        run.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
            value = loss(run.forward(x.to(device)), y.to(device))
        value.backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()
        total, since = total + value.detach(), since + 1
        if (index + 1) % every == 0 or index + 1 == len(train):
            mean = float(total) / since
            if not math.isfinite(mean):
                raise PlanError(f"training diverged: the loss is {mean} at step {step + 1}; lower the learning rate")
            yield _moment(run, step + 1, len(train), mean)
            total, since = torch.zeros((), device=device), 0


def _moment(run: _Run, step: int, per_epoch: int, loss: float) -> Moment:
    proximal = run.proximal
    if proximal is None:
        return Moment(step, run.steps, step / per_epoch, loss, 0, 0, "dense")
    phase: Phase = "finetune" if proximal.frozen else "sparse"
    return Moment(step, run.steps, step / per_epoch, loss, proximal.nonzero(), proximal.budget_groups, phase)


def _identity(recipe: Recipe, plan: Plan | Agreement | None, batches: int) -> str:
    """Return a digest of what must agree for a checkpoint to be continued."""
    made = f"{plan.first.sha256} {plan.every}" if isinstance(plan, Agreement) else plan.sha256 if plan else None
    content = json.dumps([asdict(recipe), made, batches])
    return hashlib.sha256(content.encode()).hexdigest()


def _save(run: _Run, path: Path, identity: str) -> None:
    tensors = {f"model.{name}": tensor.contiguous().clone() for name, tensor in run.model.state_dict().items()}
    for name, parameter in run.model.named_parameters():
        buffer = run.optimizer.state[parameter].get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum.{name}"] = buffer.contiguous()
    if run.proximal is not None:
        tensors |= {f"proximal.{name}": tensor for name, tensor in run.proximal.state_dict().items()}
    tensors |= {f"random.{device}": state for device, state in _random_states().items()}
    about = {"identity": identity, "epoch": str(run.epoch), "history": json.dumps([asdict(m) for m in run.history])}
    about["agreement"] = run.agreement.state() if run.agreement else ""
    with atomic.replacing(path) as temporary:
        save_file(tensors, temporary, about)


def history(checkpoint: Path) -> list[Moment]:
    """Return the history kept in a checkpoint, empty if there is none."""
    if not checkpoint.exists():
        return []
    return [Moment(**moment) for moment in json.loads(_read(checkpoint)[0]["history"])]


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a mapping
            about = file.metadata() or {}
            return {
                **{name: about[name] for name in ("identity", "epoch", "history")},
                "agreement": about.get("agreement", ""),
            }, tensors
    except Exception as error:
        raise PlanError(f"{path} is not a whole checkpoint ({error!r}); remove it to train from the start") from error


def _restore(run: _Run, path: Path, identity: str) -> None:
    about, tensors = _read(path)
    if about["identity"] != identity:
        raise PlanError(f"{path} belongs to another training (recipe or plan differ); remove it to start")
    weights, own = _part(tensors, "model."), run.model.state_dict()
    wrong = [name for name in own.keys() | weights.keys() if _size(own, name) != _size(weights, name)]
    if wrong:
        raise PlanError(f"{path} belongs to another model ({min(wrong)} differs); remove it to start")
    run.model.load_state_dict(weights)
    momentum = _part(tensors, "momentum.")
    for name, parameter in run.model.named_parameters():
        if name in momentum:
            buffer = torch.empty_like(parameter).copy_(momentum[name])
            run.optimizer.state[parameter]["momentum_buffer"] = buffer
    if run.agreement is not None:
        run.agreement.restore(about["agreement"])
    if run.proximal is not None:
        run.proximal.load_state_dict(_part(tensors, "proximal."))
    _set_random_states(_part(tensors, "random."))
    run.epoch = int(about["epoch"])
    run.history.extend(Moment(**moment) for moment in json.loads(about["history"]))
    log.info("continuing %s after epoch %d", path, run.epoch)


def _random_states() -> dict[str, Tensor]:
    """Return the state of torch's default generator of each device, which dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_states(states: Mapping[str, Tensor]) -> None:
    """Restore the generators of the devices that are present."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and torch.device(device).index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


def _size(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the share of `batches` that `model` classifies as they are labelled, in evaluation mode."""
    device = next(model.parameters()).device
    right = total = 0
    with evaluating(model):
        for x, y in batches:
            right += int((model(x.to(device)).argmax(1).cpu() == y.cpu()).sum())
            total += len(y)
    return right / total


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace every BatchNorm's running statistics by the average over `batches`, as is needed after a cut."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    device = next(model.parameters()).device
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.train().momentum = None  # the cumulative average
        try:
            for x, _ in batches:
                model(x.to(device))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
