"""A training that is killed, or whose checkpoint is cut short, continues to the same bits, dropout included."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import planner
from planner import Moment, Plan, Recipe
from profiles.errors import PlanError

from . import nets
from .nets import PIXELS, conv, looking_trained
from .test_train import Noisy, same

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(4, lr=0.05)
CHECKPOINT = "run.safetensors"


def net() -> nn.Module:
    """Return a small net with dropout, of pixels and of whole channels."""
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(32, 4)]
    return looking_trained(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1), *head))


def train(folder: Path, *, kill_at: int = -1) -> nn.Module:
    """Train to the plan in `folder`; after step `kill_at` the process kills itself, as `kill -9` would."""

    def watch(moment: Moment) -> None:
        if moment.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = net()
    plan = Plan.load(folder / "plan.json")
    planner.fit(model, Noisy(), RECIPE, plan=plan, checkpoint=folder / CHECKPOINT, watch=watch)
    return model


def process(folder: Path, kill_at: int) -> int:
    """Train in a process of its own, which writes its weights to `folder`; return its exit status."""
    code = (
        "import sys, pathlib; from safetensors.torch import save_file; from tests.planner.test_resume import train; "
        "folder = pathlib.Path(sys.argv[1]); model = train(folder, kill_at=int(sys.argv[2])); "
        "save_file(model.state_dict(), folder / 'weights.safetensors')"
    )
    return subprocess.run([sys.executable, "-c", code, str(folder), str(kill_at)], cwd=ROOT, check=False).returncode


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Half of the channels."""
    return planner.plan(net(), (torch.ones(PIXELS),), nets.anywhere(), latency=0.5)


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> Path:
    """A folder with the plan."""
    plan.save(tmp_path / "plan.json")
    return tmp_path


@pytest.fixture
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights after an uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    plan.save(folder / "plan.json")
    return train(folder).state_dict()


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# --- the process dies ---------------------------------------------------------------------------------------------


def test_a_killed_training_continues_to_the_same_bits(folder: Path, whole: dict[str, Tensor]) -> None:
    assert process(folder, kill_at=15) == -signal.SIGKILL  # in the third of four epochs of six steps
    assert not (folder / "weights.safetensors").exists()
    assert len(planner.history(folder / CHECKPOINT)) == 12
    assert process(folder, kill_at=-1) == 0
    assert equal(load_file(folder / "weights.safetensors"), whole)


def test_dropout_makes_the_random_state_matter(folder: Path, whole: dict[str, Tensor]) -> None:
    train(folder)
    path = folder / CHECKPOINT
    assert equal({k.removeprefix("model."): t for k, t in load_file(path).items() if k.startswith("model.")}, whole)
    torch.manual_seed(1)
    model = net()
    planner.fit(model, Noisy(), RECIPE, plan=Plan.load(folder / "plan.json"))
    assert not equal(model.state_dict(), whole)


# --- the writing dies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_crash_while_writing_leaves_the_last_good_checkpoint(
    folder: Path, whole: dict[str, Tensor], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def cut_short(tensors: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
        save_file(tensors, path, about)
        written.append(path)
        if len(written) == 3:
            os.truncate(path, path.stat().st_size // 2)
            raise error

    monkeypatch.setattr(planner.train, "save_file", cut_short)
    with pytest.raises(type(error)):
        train(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json", CHECKPOINT]
    assert len(planner.history(folder / CHECKPOINT)) == 12
    assert equal(train(folder).state_dict(), whole)


# --- wrappers and recipes -----------------------------------------------------------------------------------------


def test_a_compiled_model_continues_what_a_plain_one_began(folder: Path) -> None:
    path, plan = folder / CHECKPOINT, Plan.load(folder / "plan.json")
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        planner.fit(net(), Noisy(until=2), RECIPE, plan=plan, checkpoint=path)
    model = net()
    history = planner.fit(torch.compile(model, backend="eager"), Noisy(), RECIPE, plan=plan, checkpoint=path)
    assert history[-1].nonzero_groups == 4
    again = net()
    assert planner.fit(again, Noisy(until=0), RECIPE, plan=plan, checkpoint=path) == history
    assert same(again, model)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_outside_of_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(PlanError, match=rf"sparse_fraction is {share}; it must be above 0 and at most 1"):
        Recipe(4, sparse_fraction=share)


def test_a_share_of_1_ends_on_the_budget(plan: Plan) -> None:
    history = planner.fit(net(), Noisy(), Recipe(2, sparse_fraction=1.0), plan=plan)
    assert (history[-1].phase, history[-1].nonzero_groups) == ("finetune", 4)
    assert {moment.phase for moment in history[:-1]} == {"sparse"}
