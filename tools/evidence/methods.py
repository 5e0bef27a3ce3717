"""Ways from a dense network to a trained small one, at equal steps, batches, learning rates and recalibration.

Most methods are told the widths of their network. Two find them in training, within the latency that the table says:
WGSEF with one budget in seconds over all widths, and torch-pruning's sparse training (Fang et al. 2023), which draws
weak groups to zero by a decay of its own before they are ranked and cut.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import nn
from torch.optim import SGD

import planner
from backends import rebuild
from planner import Importance, Plan, Problem, Recipe
from planner.importance import Loss
from planner.operations import Choice
from planner.pools import pools
from planner.prox import Schedule
from planner.tournament import masked
from planner.train import Batches
from tools.batches import Data
from tools.bench_training import lasso
from tools.evidence.nets import RIVALS, SIBLING, STEPS, Net
from tools.rivals import kept_of, sparse_pruner, torch_pruned

RECALIBRATED = 40  # batches that BatchNorm statistics are taken from after every cut
ONE_BUDGET = "WGSEF, one budget"
OURS = (
    "WGSEF de-biased",
    "WGSEF convex",
    ONE_BUDGET,
    "one cut",
    "group lasso, then cut",
    "random channels of our plan",
)
DECAYED = "GroupNorm, sparse training"
RANKED = "GroupNorm"  # what its groups are ranked by
Prepare = Callable[[SGD], object]


@dataclass(frozen=True)
class Course:
    """What is equal for all methods."""

    data: Data
    train: Batches  # of the data, perhaps with what a teacher says
    recipe: Recipe
    loss: Loss

    @property
    def steps(self) -> int:
        """All steps."""
        return self.recipe.epochs * len(self.train)

    def train_(self, model: nn.Module, first: int, last: int, prepare: Prepare = lambda _: None) -> None:
        """Take the steps from `first` up to `last` of the course."""
        recipe, per_epoch = self.recipe, len(self.train)
        parameters = model.parameters()
        optimizer = SGD(
            parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
        )
        prepare(optimizer)
        model.train()
        step = first
        while step < last:
            self.train.set_epoch(step // per_epoch)  # type: ignore[attr-defined]
            for x, y in islice(self.train, step % per_epoch, min(per_epoch, step % per_epoch + last - step)):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate(step, self.steps)
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                    value = self.loss(model(x), y)
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1

    def finished(self, small: nn.Module, before: float | None, first: int, zeroed: int | None = None) -> "Trained":
        """Train what is left for the steps that are left, and return what became of it."""
        small.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
        at_cut = planner.accuracy(small, self.data.test)
        planner.recalibrate_(small, islice(self.data.train, RECALIBRATED))
        recalibrated = planner.accuracy(small, self.data.test)
        self.train_(small, first, self.steps)
        after = planner.accuracy(small, self.data.test)
        return Trained(before, at_cut, recalibrated, after, zeroed, sum(p.numel() for p in small.parameters()))


@dataclass(frozen=True)
class Trained:
    """What became of one network: accuracies before the cut, right after it, with new statistics, and in the end."""

    before: float | None
    at_cut: float
    recalibrated: float
    after: float
    zeroed: int | None  # groups that were not zero when the support was fixed; None where nothing was trained before
    params: int
    keep: Mapping[str, int] | None = None  # widths, where training found them
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contest:
    """What the methods start from: the dense network, our plan, and the other methods' networks."""

    dense: nn.Module
    posed: Problem
    plan: Plan
    importance: Importance
    draw: Callable[[int], nn.Module]  # a dense network with weights drawn by a seed
    fraction: float  # of the dense latency that our plan was measured at

    def run(self, method: str, net: Net, course: Course, seed: int) -> Trained:
        """Run one method on its network."""
        before = planner.accuracy(self.dense, course.data.test)
        match method:
            case "WGSEF de-biased" | "WGSEF convex":
                form = {"debiased": method.endswith("biased")}
                return self.sparse(self.plan.model_copy(update=form), course)
            case "group lasso, then cut":
                return self.lasso(course)
            case "one cut":
                return self.cut(self.importance, before, course)
            case "random channels of our plan":
                options = self.posed.options(thrifty=True)
                return self.cut(planner.at_random(self.posed.graph, options, seed=seed), before, course)
        if method == ONE_BUDGET:
            return self.shared(course)
        if method == DECAYED:
            return self.decayed(net, course)
        if method == SIBLING:
            return course.finished(net.model(self.draw(seed), self.posed), None, 0)
        return course.finished(net.model(self.dense, self.posed), before, 0)

    def sparse(self, plan: Plan, course: Course) -> Trained:
        """Shrink groups by WGSEF's proximal steps, remove those at zero, and train on."""
        model, last = copy.deepcopy(self.dense), round(course.steps * course.recipe.sparse_fraction)
        held: list[planner.Proximal] = []
        strength = Schedule(last, total=plan.strength.total, anneal=plan.strength.anneal)
        course.train_(
            model, 0, last, lambda optimizer: held.append(planner.attach(plan, model, optimizer, steps=strength))
        )
        before = planner.accuracy(model, course.data.test)
        return course.finished(rebuild(plan, model), before, last, held[0].changed_at_freeze)

    def shared(self, course: Course) -> Trained:
        """Let WGSEF share one budget in seconds among all widths, and solve the program again after every epoch."""
        model, last = copy.deepcopy(self.dense), round(course.steps * course.recipe.sparse_fraction)
        share, strength = self.share(self.choice), self.plan.strength
        agreement = planner.Agreement(
            self.posed.graph, self.plan, lambda now: self.posed.solve(share, importance=now), every=1
        )
        schedule, held = Schedule(last, total=strength.total, anneal=strength.anneal), list[planner.Proximal]()

        def prepare(optimizer: SGD) -> None:
            held.append(agreement.attach(model, optimizer, steps=schedule))
            optimizer.register_step_post_hook(ended)

        def ended(*_: object) -> None:
            if held[0].taken % len(course.train) == 0:
                agreement.after_epoch()

        course.train_(model, 0, last, prepare)
        before = planner.accuracy(model, course.data.test)
        found = course.finished(rebuild(agreement.plan, model), before, last, held[0].changed_at_freeze)
        choice = agreement.plan.choice
        return replace(found, keep=dict(choice.keep), removed=tuple(sorted(choice.removed)))

    def decayed(self, ranked: Net, course: Course) -> Trained:
        """Train with torch-pruning's decay of weak groups, cut where the table expects our latency, and train on.

        What the table is off by is taken from the network of the same ranking that was cut at once and measured.
        """
        model, last = copy.deepcopy(self.dense), round(course.steps * course.recipe.sparse_fraction)
        graph, ranking = self.posed.graph, RIVALS[RANKED]
        pruner = sparse_pruner(model, graph, ranking)

        def decay(*_: object) -> None:
            pruner.regularize(model)

        course.train_(model, 0, last, lambda optimizer: optimizer.register_step_pre_hook(decay))
        before = planner.accuracy(model, course.data.test)
        wanted, small, best = self.fraction * self.share(ranked.choice) / ranked.fraction, model, float("inf")
        for pruned in torch_pruned(model, graph, ranking, steps=STEPS):
            share = self.share(graph.choice(kept_of(graph, pruned)))
            if abs(share - wanted) < best:
                best, small = abs(share - wanted), copy.deepcopy(pruned)
        keep = kept_of(graph, small)
        gone = sum(width.size - keep[width.name] for width in graph.cuttable)  # decay alone zeroes none
        return replace(course.finished(small, before, last, gone), keep=keep)

    @property
    def choice(self) -> Choice:
        """What our plan keeps."""
        return self.posed.graph.choice(self.plan.choice.keep, self.plan.choice.removed)

    def share(self, choice: Choice) -> float:
        """Return the share of the dense latency that the table expects."""
        time = self.posed.times[self.posed.profile.id]
        return time.under(choice) / time.under(self.posed.graph.dense)

    def lasso(self, course: Course) -> Trained:
        """Shrink groups by the group lasso's proximal steps, cut to the plan, and train on."""
        model, last = copy.deepcopy(self.dense), round(course.steps * course.recipe.sparse_fraction)
        state = pools(self.plan, model, self.posed.graph)
        parameters, schedule, taken = dict(model.named_parameters()), Schedule(last), 0

        @torch.no_grad()
        def shrink(*_: object) -> None:
            nonlocal taken
            taken += 1
            norms = state.groups.norms(parameters)
            state.groups.scale_(parameters, lasso(norms, schedule.step_size(taken), state))

        course.train_(model, 0, last, lambda optimizer: optimizer.register_step_post_hook(shrink))
        before = planner.accuracy(model, course.data.test)
        zeroed = planner.harden_(self.plan, model)
        return course.finished(rebuild(self.plan, model), before, last, zeroed)

    def cut(self, importance: Importance, before: float, course: Course) -> Trained:
        """Cut to the plan at once, and train."""
        return course.finished(
            rebuild(self.plan, masked(self.dense, self.posed.graph, self.plan, importance)), before, 0
        )
