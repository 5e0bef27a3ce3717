"""Weights on disk: what is saved comes back bit for bit on the user's class, and spoilt files are refused by name."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import planner
from backends import pytorch
from backends.rebuild import cut, rebuild
from backends.weights import load_pruned, load_rebuilt, save, save_pruned
from planner.spec import Plan
from profiles.errors import PlanError
from tools.examples.resnet import ResNet

from ..planner import nets
from ..planner.nets import PIXELS, example, looking_trained
from .planned import planned, resnet_ready


@pytest.fixture(scope="module")
def ready() -> tuple[Plan, nn.Module]:
    """A plan that narrows and removes, and a model that is exactly zero where it says."""
    return resnet_ready()


def dense_class() -> ResNet:
    """Return the dense model with other weights."""
    return ResNet(2, (8, 12, 16), seed=5)


def test_a_saved_model_comes_back_bit_for_bit(ready: tuple[Plan, nn.Module], tmp_path: Path) -> None:
    plan, model = ready
    dense = rebuild(plan, model)
    save(dense, tmp_path / "small.safetensors")
    loaded = load_rebuilt(plan, dense_class(), tmp_path / "small.safetensors").eval()
    x = torch.randn(PIXELS)
    assert loaded.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(x), dense(x))
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_what_is_built_says_by_which_plan_it_was_made(ready: tuple[Plan, nn.Module], tmp_path: Path) -> None:
    plan, model = ready
    dense = rebuild(plan, model)
    save(dense, tmp_path / "small.safetensors")
    loaded = load_rebuilt(plan, dense_class(), tmp_path / "small.safetensors")
    for each, digest in (
        (dense, plan.sha256),
        (copy.deepcopy(dense), plan.sha256),
        (loaded, plan.sha256),
        (model, None),
    ):
        artifact = pytorch.build(each, (torch.randn(PIXELS),), None, tmp_path / "built.safetensors")
        assert artifact.plan_sha256 == digest


@pytest.mark.parametrize(
    ("name", "latency"),
    [
        *(("tied weights", 1.0), ("shared twice", 1.0), ("nested", 0.6), ("densely connected", 0.6)),
        *(("functional", 0.6), ("residual, option A", 0.6), ("size written down", 0.6), ("channel shuffle", 0.6)),
        *(("chunk and cat", 0.6), ("sigmoid gate", 0.6), ("part of the channels", 0.6)),
    ],
)
def test_other_nets_come_back_too(name: str, latency: float, tmp_path: Path) -> None:
    model = copy.deepcopy(example(name)[0])
    plan = planned(model, latency)
    planner.harden_(plan, model)
    dense = rebuild(plan, model)
    save(dense, tmp_path / "small.safetensors")
    loaded = load_rebuilt(plan, nets.CUTTABLE[name](), tmp_path / "small.safetensors").eval()
    assert type(loaded) is type(dense) or isinstance(dense, torch.fx.GraphModule)
    assert torch.equal(loaded(x := torch.randn(PIXELS)), dense(x))
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _of_another_model(path: Path) -> None:
    save(ResNet(2, (8, 12, 16)), path)


def _of_something_else(path: Path) -> None:
    save_file({"conv1.weight": torch.ones(1), "layer1.0.conv1.weight": torch.ones(())}, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_cut_off, "not a whole safetensors file"),
        (Path.unlink, "not a whole safetensors file"),
        (_of_another_model, r"does not fit the model: layer\d.* such tensors"),
        (_of_something_else, r"does not fit the model: bn1.bias is absent in the file, \d+ in the model"),
    ],
)
def test_spoilt_weights_are_refused(ready: tuple[Plan, nn.Module], tmp_path: Path, spoil: object, said: str) -> None:
    plan, model = ready
    path = tmp_path / "small.safetensors"
    save(rebuild(plan, model), path)
    spoil(path)  # type: ignore[operator]
    with pytest.raises(PlanError, match=said):
        load_rebuilt(plan, ResNet(2, (8, 12, 16)), path)


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_holds_plan_and_weights_and_nothing_else(ready: tuple[Plan, nn.Module], tmp_path: Path) -> None:
    plan, model = ready
    dense = rebuild(plan, model)
    save_pruned(plan, dense, tmp_path / "made" / "here")
    assert sorted(path.name for path in (tmp_path / "made" / "here").iterdir()) == ["plan.json", "weights.safetensors"]
    loaded = load_pruned(dense_class, tmp_path / "made" / "here").eval()
    assert type(loaded) is ResNet
    x = torch.randn(PIXELS)
    assert torch.equal(loaded(x), dense(x))


def _edited_plan(folder: Path) -> None:
    content = json.loads((folder / "plan.json").read_text())
    content["widths"][0]["keep"] -= 1
    (folder / "plan.json").write_text(json.dumps(content))


def _no_plan(folder: Path) -> None:
    (folder / "plan.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


def _impossible_channels(folder: Path) -> None:
    path = folder / "weights.safetensors"
    save_file(load_file(path), path, {"kept": json.dumps({"layer1.0.conv1": [0, 99]})})


SPOILT = [
    (_edited_plan, dense_class, "plan.json"),
    (_no_plan, dense_class, "plan.json"),
    (_no_weights, dense_class, "weights.safetensors is not a whole safetensors file"),
    (_impossible_channels, dense_class, "keeps channels of layer1.0.conv1 that the model does not have"),
    (lambda folder: None, lambda: ResNet(2, (8, 12, 20)), "made for another model: its fingerprint is"),
]


@pytest.mark.parametrize(("spoil", "factory", "said"), SPOILT)
def test_a_spoilt_folder_or_wrong_factory_is_refused(
    ready: tuple[Plan, nn.Module], tmp_path: Path, spoil: object, factory: object, said: str
) -> None:
    plan, model = ready
    save_pruned(plan, rebuild(plan, model), tmp_path)
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(PlanError, match=said):
        load_pruned(factory, tmp_path)  # type: ignore[arg-type]


def test_the_channels_that_are_kept_need_not_be_the_first(tmp_path: Path) -> None:
    model, graph = example("part of the channels")
    kept = {width.name: torch.tensor([width.size - 2, width.size - 1]) for width in graph.cuttable}
    save(cut(model, graph, kept), tmp_path / "small.safetensors")
    plan = planned(model, 0.6)
    said = {width.name: 2 for width in graph.cuttable}
    widths = tuple(width.model_copy(update={"keep": said[width.name]}) for width in plan.widths)
    loaded = load_rebuilt(
        plan.model_copy(update={"widths": widths}),
        nets.CUTTABLE["part of the channels"](),
        tmp_path / "small.safetensors",
    ).eval()
    x = torch.randn(PIXELS)
    assert torch.equal(loaded(x), cut(model, graph, kept)(x))


def test_a_model_that_was_not_cut_is_saved_too(tmp_path: Path) -> None:
    model = looking_trained(ResNet(2, (8, 12, 16))).eval()
    save(model, tmp_path / "whole.safetensors")
    assert load_file(tmp_path / "whole.safetensors").keys() == model.state_dict().keys()
