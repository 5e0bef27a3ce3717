"""From a table to a plan: what cuts cost in loss, which mix of depth and width is best, if the table holds there."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from platformdirs import user_cache_path
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import planner
from planner import Graph, Importance, LatencyTable, Limits, Plan, Problem, Scope
from planner.importance import Batch, calibrated_cross_entropy, questions
from planner.latency import forecast
from planner.limits import Latency
from planner.search import Tables, devices_of
from planner.train import Batches
from profiles import Profile, atomic
from profiles.errors import PlanError
from tools.calibrate import Bench, Progress, refined
from tools.console import Stage
from tools.outcome import Try
from tools.scoping import RANKINGS
from tools.threads import fastest, one_thread

SENSITIVITY_IMAGES = 384
DEPTH_PRICES = (1.0, 0.3, 0.03, 0.0)  # factors of γ, and
POWERS = (2.0, 1.0, 0.5)  # of losses, whose plans are held against each other; squares shun what destroys most
NOISE = 0.03  # nats that a later one must gain, as a few hundred images tell no less; all may be near guessing
CLOSE = 0.02  # a plan whose network is predicted within this needs no further refinement
DRAWS = 3  # of random channels, as a control
CONTROL = "control"  # how that note begins
REPLANS = 3  # how often a plan may be made again because its network took longer, or less, than planned
SAVE_EVERY_S = 2.0
_LOSS = calibrated_cross_entropy


@dataclass
class Answers(MutableMapping[str, float]):
    """Measured losses that outlive an interruption: kept in a file, written every few seconds and at the end."""

    path: Path
    show: Callable[[int], None]
    known: dict[str, float] = field(default_factory=dict)
    written: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        try:
            self.known.update({str(k): float(v) for k, v in json.loads(self.path.read_text()).items()})
        except (OSError, ValueError, AttributeError, TypeError):
            return  # nothing usable was kept

    def __getitem__(self, question: str) -> float:
        return self.known[question]

    def __setitem__(self, question: str, answer: float) -> None:
        self.known[question] = answer
        self.show(len(self.known))
        if time.monotonic() - self.written > SAVE_EVERY_S:
            self.save()

    def __delitem__(self, question: str) -> None:
        del self.known[question]

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)

    def save(self) -> None:
        """Write what is known."""
        atomic.write_text(self.path, json.dumps(self.known, indent=1) + "\n")
        self.written = time.monotonic()


@dataclass(frozen=True)
class Brief:
    """What is to be planned."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    profile: Profile
    latency: Latency | None
    train: Batches | None
    scope: Scope = field(default_factory=Scope)
    limits: Limits = field(default_factory=Limits)

    def problem(self, tables: Tables) -> Problem:
        """Trace the model, and take costs from tables where there are some."""
        devices = devices_of(self.latency, self.profile)
        return planner.problem(self.model, self.inputs, self.profile, devices=devices, table=tables, scope=self.scope)

    @cached_property
    def batches(self) -> list[Batch]:
        """A few hundred training examples."""
        found: list[Batch] = []
        for x, y in self.train or ():
            found.append((x, y))
            if sum(len(labels) for _, labels in found) >= SENSITIVITY_IMAGES:
                break
        return found


def ranked(brief: Brief, posed: Problem, ranking: str, stage: Stage) -> Importance:
    """Return the importance that is asked for; raises PlanError if it is unknown, or needs data that are not given."""
    graph, options = posed.graph, posed.options(thrifty=True)
    if ranking not in RANKINGS:
        raise PlanError(f"--importance {ranking!r} is not known; it is one of {', '.join(RANKINGS)}")
    if ranking in ("measured", "taylor") and not brief.batches:
        raise PlanError(f"--importance {ranking} needs --data")
    match ranking:
        case "measured":
            return sensitivity(brief, posed, stage)
        case "taylor":
            return planner.taylor(brief.model, graph, options, brief.batches, loss=cross_entropy)
        case "batchnorm":
            return planner.batchnorm_scale(brief.model, graph, options)
        case "random":
            return planner.at_random(graph, options)
    return planner.magnitude(brief.model, graph, options)


def sensitivity(brief: Brief, posed: Problem, stage: Stage) -> Importance:
    """Measure what each candidate costs in loss; an interrupted measurement goes on where it was."""
    graph, options = posed.graph, posed.options(thrifty=True)  # a refined table may find others useful than this one
    batches, total = brief.batches, questions(graph, options)
    path = user_cache_path("espalier") / "sensitivity" / f"{_identity(brief.model, graph, batches)}.calibrated.json"
    with stage.phase("measure sensitivity") as phase, fastest(brief.model, batches[0][0]):
        answers = Answers(path, lambda done: phase.show(min(done, total), total))
        try:
            return planner.measured(brief.model, graph, options, batches, loss=_LOSS, answers=answers)
        finally:
            answers.save()


def _identity(model: nn.Module, graph: Graph, batches: Sequence[Batch]) -> str:
    """Return a digest of the weights and the data: what the answers depend on, beside the question."""
    digest = hashlib.sha256(graph.fingerprint.encode())
    for tensor in [*model.state_dict().values(), *(tensor for batch in batches for tensor in batch)]:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:20]


def contest(brief: Brief, posed: Problem, importance: Importance, stage: Stage) -> Importance:
    """Return the importance whose plan leaves the best network: of several prices of depth, and powers of losses.

    Losses of single cuts do not add up, and which sum tells best differs from network to network. So the plans are
    cut, and what they lose is measured.
    """
    prices = DEPTH_PRICES if importance.blocks else (1.0,)
    powers = [importance.raised(power, posed.graph) for power in POWERS]
    variants = [own.with_depth_priced(price) for own, price in product(powers, prices)]
    best, least, seen = importance, float("inf"), set[str]()
    with stage.phase("compare depth with width") as phase:
        for index, variant in enumerate(variants):
            plan = posed.solve(brief.latency, brief.limits, importance=variant)
            if _key(plan) not in seen:
                seen.add(_key(plan))
                loss = planner.loss_after(brief.model, posed.graph, plan, importance, brief.batches, loss=_LOSS)
                if loss < least - NOISE:
                    best, least = variant, loss
            phase.step(f"{len(seen)} plans, best loss {least:.3f}", index + 1, len(variants))
    return best


def control(brief: Brief, posed: Problem, plan: Plan, importance: Importance, stage: Stage) -> str:
    """Return what it gains to know which channels matter: the planned network beside random channels in their place.

    Both are cut at once and not trained; the random ones are the mean of three draws.
    """
    graph, options = posed.graph, posed.options(thrifty=True)
    drawn = [planner.at_random(graph, options, seed=seed) for seed in range(DRAWS)]
    losses = []
    with stage.phase("compare with random channels") as phase:
        for index, ranking in enumerate((importance, *drawn)):
            losses.append(planner.loss_after(brief.model, graph, plan, ranking, brief.batches, loss=_LOSS))
            phase.step(f"loss {losses[-1]:.3f}", index + 1, 1 + DRAWS)
    random = fmean(losses[1:])
    return f"{CONTROL}: cut at once and untrained, the loss is {losses[0]:.3f}, with random channels {random:.3f}"


@dataclass
class Settling:
    """Plans whose networks are built and measured before any training; the table learns from each that it was off on.

    `folder` holds the table and all tries as soon as they are known.
    """

    brief: Brief
    bench: Bench
    table: LatencyTable
    stage: Stage
    folder: Path
    tries: list[Try] = field(default_factory=list)
    _known: dict[str, float] = field(default_factory=dict)  # measured fractions, by what is kept
    _last: Plan | None = None

    def __post_init__(self) -> None:
        self.posed = self.brief.problem(self.table)
        path = self.folder / "tries.json"
        if path.exists():
            self.tries += [Try.model_validate(own) for own in json.loads(path.read_text())]

    def plan(self, importance: Importance) -> Plan:
        """Plan, measure the planned network, and plan again while the table is off there, at most three times.

        If none came close, it is the plan that exceeds its budget least, and then the one that loses least.
        """
        with self.stage.phase("plan") as phase, one_thread():
            return self._plan(importance, phase.step)

    def again(self, importance: Importance) -> Plan:
        """Do the same within another phase, whose bar stays."""
        with one_thread():
            return self._plan(importance, lambda *_: None)

    def _plan(self, importance: Importance, progress: Progress) -> Plan:
        found: list[tuple[float, float, Plan]] = []
        while True:
            plan = self.posed.solve(self.brief.latency, self.brief.limits, importance=importance)
            known = _key(plan) in self._known
            error = 0.0 if known else self._measured(plan, progress, corrects=len(found) < REPLANS)
            over = self._known[_key(plan)] / plan.target_fraction - 1
            found.append((max(0.0, over - CLOSE), plan.proof.objective, plan))
            if known or abs(error) < CLOSE or len(found) > REPLANS:
                best = min(found, key=lambda own: own[:2])[2]
                said = forecast(self.posed.costs[best.profile], self.posed.graph, best.choice)
                return best.model_copy(update={"predicted": said})

    def _measured(self, plan: Plan, progress: Progress, *, corrects: bool) -> float:
        """Measure the network of a plan, note the try, and return the error of its prediction."""
        better, error = refined(self.bench, self.table, plan.choice, progress=progress)
        measured, off = better.probes[-1].relative, abs(error) >= CLOSE
        changes = self._last.diff(plan) if self._last else ()
        self.tries.append(
            Try(
                budget=plan.target_fraction,
                predicted=plan.predicted.fraction,
                measured=measured,
                corrected=off and corrects,
                changes=list(changes),
            )
        )
        self._known[_key(plan)], self._last = measured, plan
        if off:
            self.table, self.posed = better, self.posed.with_tables([better])
            better.save(self.folder / "table.json")
        content = [own.model_dump(mode="json") for own in self.tries]
        atomic.write_text(self.folder / "tries.json", json.dumps(content, indent=1) + "\n")
        return error


def _key(plan: Plan) -> str:
    return json.dumps([dict(plan.choice.keep), sorted(plan.choice.removed)])
