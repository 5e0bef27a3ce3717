"""`fit` learns, an interrupted run continues bit for bit, and a checkpoint of something else is refused."""

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import planner
from planner import Moment, Plan, Recipe
from planner.pools import excess
from profiles.errors import PlanError
from tools.examples.resnet import ResNet

from . import nets
from .nets import PIXELS, conv, example, looking_trained

RECIPE = Recipe(4, lr=0.05)


class Noisy:
    """Four classes of patterns, whose order and noise follow from the epoch."""

    def __init__(self, count: int = 48, batch: int = 8, *, until: int = 99) -> None:
        generator = torch.Generator().manual_seed(1)
        self.y = torch.arange(count) % 4
        self.x = torch.randn(4, 3, 8, 8, generator=generator)[self.y]
        self.batch, self.epoch, self.until = batch, 0, until

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if epoch == self.until:
            raise KeyboardInterrupt

    def __len__(self) -> int:
        return len(self.y) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.epoch)
        for rows in torch.randperm(len(self.y), generator=generator).split(self.batch):
            yield self.x[rows] + 0.3 * torch.randn(len(rows), 3, 8, 8, generator=generator), self.y[rows]


def net() -> nn.Module:
    """Return a small net with a normalisation."""
    layers = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)]
    return looking_trained(nn.Sequential(*layers))


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Half of the channels."""
    plan = planner.plan(net(), (torch.ones(PIXELS),), nets.anywhere(), latency=0.5)
    assert [pool.budget for pool in plan.pools] == [4]
    return plan


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


# --- fit ----------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_reports_it() -> None:
    model, seen = net(), list[Moment]()
    history = planner.fit(model, Noisy(), RECIPE, watch=seen.append)
    assert seen == history
    assert history[-1].loss < 0.5 * history[0].loss
    assert [moment.step for moment in history] == list(range(1, 25))
    assert (history[-1].epoch, history[-1].steps) == (4, 24)
    assert {moment.phase for moment in history} == {"dense"}
    assert planner.accuracy(model, Noisy()) > 0.9


def test_training_with_a_plan_ends_on_its_budget(plan: Plan) -> None:
    model = net()
    history = planner.fit(model, Noisy(), RECIPE, plan=plan)
    assert excess(plan, model, plan.graph(model)) == []
    assert [moment.phase for moment in history] == ["sparse"] * 11 + ["finetune"] * 13
    assert {moment.nonzero_groups for moment in history if moment.phase == "finetune"} == {4}
    assert {moment.budget_groups for moment in history} == {4}
    assert planner.accuracy(model, Noisy()) > 0.9


def test_about_eight_moments_an_epoch_average_all_losses() -> None:
    losses: list[float] = []

    def loss(out: Tensor, y: Tensor) -> Tensor:
        value = nn.functional.cross_entropy(out, y)
        losses.append(value.item())
        return value

    history = planner.fit(net(), Noisy(144, 8), replace(RECIPE, epochs=1), loss=loss)
    assert [moment.step for moment in history] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    pairs = zip(losses[::2], losses[1::2], strict=True)
    assert [moment.loss for moment in history] == pytest.approx([(first + second) / 2 for first, second in pairs])


@pytest.mark.parametrize(("sparse", "said"), [(True, "weights not finite at"), (False, "the loss is nan at")])
def test_a_diverged_training_stops_with_its_step(plan: Plan, sparse: bool, said: str) -> None:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, y) * torch.nan

    with pytest.raises(PlanError, match=rf"training diverged: {said} step 1; lower the learning rate"):
        planner.fit(net(), Noisy(), RECIPE, plan=plan if sparse else None, loss=loss)


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    rates = [RECIPE.rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[5] == RECIPE.lr
    assert 0 < rates[-1] < 1e-4


def test_bfloat16_trains_too(plan: Plan) -> None:
    model = net()
    history = planner.fit(model, Noisy(), replace(RECIPE, bfloat16=True), plan=plan)
    assert history[-1].loss < history[0].loss
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# --- interruption and resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("pause", [1, 2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(plan: Plan, pause: int, sparse: bool, tmp_path: Path) -> None:
    about = {"plan": plan if sparse else None, "checkpoint": tmp_path / "run.safetensors"}
    whole = net()
    expected = planner.fit(whole, Noisy(), RECIPE, plan=about["plan"])
    with pytest.raises(KeyboardInterrupt):
        planner.fit(net(), Noisy(until=pause), RECIPE, **about)
    assert planner.history(about["checkpoint"]) == expected[: 6 * pause]
    model, seen = nets.looking_trained(net(), seed=7), list[Moment]()
    history = planner.fit(model, Noisy(), RECIPE, watch=seen.append, **about)
    assert history == expected
    assert seen == expected[6 * pause :]
    assert same(model, whole)
    again = net()
    assert planner.fit(again, Noisy(until=0), RECIPE, **about) == expected  # nothing is left to do
    assert same(again, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_tied_and_channels_last_models_resume_too(tmp_path: Path) -> None:
    recipe = replace(RECIPE, lr=0.001)
    for make in (nets.tied_weights, lambda: net().to(memory_format=torch.channels_last)):
        path = tmp_path / "run.safetensors"
        whole, model = looking_trained(make()), make()
        planner.fit(whole, Noisy(until=99), recipe)
        start = copy.deepcopy(looking_trained(model))
        with pytest.raises(KeyboardInterrupt):
            planner.fit(start, Noisy(until=2), recipe, checkpoint=path)
        planner.fit(model, Noisy(), recipe, checkpoint=path)
        assert same(model, whole)
        path.unlink()


OTHERS = {
    "recipe": {"recipe": replace(RECIPE, lr=0.04)},
    "plan": {"plan": None},
    "length": {"train": Noisy(40)},
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another_training_is_refused(plan: Plan, case: str, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    planner.fit(net(), Noisy(), replace(RECIPE, epochs=1), plan=plan, checkpoint=path)
    arguments = {"train": Noisy(), "recipe": replace(RECIPE, epochs=1), "plan": plan, **OTHERS[case]}
    model = net()
    with pytest.raises(PlanError, match=r"run.safetensors belongs to another training .*; remove it to start"):
        planner.fit(model, checkpoint=path, **arguments)
    assert same(model, net())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path, recipe = tmp_path / "run.safetensors", replace(RECIPE, epochs=1)
    planner.fit(net(), Noisy(), recipe, checkpoint=path)
    with pytest.raises(PlanError, match=r"run.safetensors belongs to another model \(0.bias differs\); remove it"):
        planner.fit(ResNet(1, (8, 8, 8)), Noisy(), recipe, checkpoint=path)


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _of_other_tools(path: Path) -> None:
    save_file(load_file(path), path)  # without what espalier writes about it


@pytest.mark.parametrize(("spoil", "said"), [(_cut_off, "SafetensorError"), (_of_other_tools, "KeyError")])
def test_a_spoilt_checkpoint_is_refused(spoil: object, said: str, tmp_path: Path) -> None:
    path, recipe = tmp_path / "run.safetensors", replace(RECIPE, epochs=1)
    planner.fit(net(), Noisy(), recipe, checkpoint=path)
    spoil(path)  # type: ignore[operator]
    with pytest.raises(PlanError, match=rf"run.safetensors is not a whole checkpoint \({said}.*remove it"):
        planner.fit(net(), Noisy(), recipe, checkpoint=path)


def test_a_foreign_file_has_no_history(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "run.safetensors")
    with pytest.raises(PlanError, match="is not a whole checkpoint"):
        planner.history(tmp_path / "run.safetensors")


def test_no_checkpoint_has_no_history(tmp_path: Path) -> None:
    assert planner.history(tmp_path / "absent.safetensors") == []


# --- accuracy and statistics --------------------------------------------------------------------------------------


def mixed_modes() -> nn.Module:
    """Return a model that trains but for its first normalisation."""
    model = copy.deepcopy(example("VGG")[0]).train()
    model.get_submodule("1").eval()
    return model


def test_accuracy_is_the_share_of_right_answers_and_leaves_the_modes() -> None:
    model = mixed_modes()
    before = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(10, 3, 8, 8)
    y = copy.deepcopy(model).eval()(x).argmax(1)
    y[:3] += 1
    assert planner.accuracy(model, [(x[:4], y[:4]), (x[4:], y[4:])]) == 0.7
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_recalibration_averages_the_statistics_of_the_batches() -> None:
    model = mixed_modes()
    before = {name: module.training for name, module in model.named_modules()}
    momenta = [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    batches = [(torch.randn(6, 3, 8, 8), torch.zeros(6)) for _ in range(3)]
    first = model.get_submodule("0")
    with torch.no_grad():
        seen = [first(x).transpose(0, 1).flatten(1) for x, _ in batches]
    planner.recalibrate_(model, batches)
    norm = model.get_submodule("1")
    assert torch.allclose(norm.running_mean, torch.stack([x.mean(1) for x in seen]).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack([x.var(1) for x in seen]).mean(0), rtol=1e-5)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)] == momenta


def test_recalibration_does_not_depend_on_dropout() -> None:
    first, second = mixed_modes(), mixed_modes()
    first.append(nn.BatchNorm1d(5))
    second.append(nn.BatchNorm1d(5))
    batches = [(torch.randn(6, 3, 8, 8), torch.zeros(6))]
    for seed, model in enumerate((first, second)):
        torch.manual_seed(seed)
        planner.recalibrate_(model, batches)
    assert same(first, second)


def test_a_recipe_is_plain_data() -> None:
    assert Recipe(**asdict(RECIPE)) == RECIPE
    assert math.isclose(RECIPE.sparse_fraction, 0.5)
