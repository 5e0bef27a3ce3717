"""The comparison with torch-pruning is honest: it knows right from wrong, and gives the peer what its documents ask."""

import pytest
import torch
from torch import nn

from tools.zoo_baseline import Mask, attentions, output_layers, torch_pruning_result

from . import ZOO

pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12


@pytest.mark.parametrize("name", ["plain_cnn", "vgg", "resnext", "mobilenet_v3", "densenet"])
def test_what_torch_pruning_can_is_right(name: str) -> None:
    assert torch_pruning_result(ZOO[name], 0.5) == "right"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smooth", "wrong: 0."),  # f(0) != 0: cut channels still spoke
        ("shufflenet_v1", "wrong: 0."),
        ("gpt2", "wrong: nothing pruned"),
        ("resnet_a", "raised: RuntimeError"),
        ("space_to_depth", "raised: RuntimeError"),
    ],
)
def test_what_it_cannot_is_told_apart(name: str, expected: str) -> None:
    assert torch_pruning_result(ZOO[name], 0.5).startswith(expected)


@torch.no_grad()
def test_mask_counts_channels_as_they_were_before_earlier_cuts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4))
    mask = Mask(model)
    for name in ("0", "1", "2"):
        mask.zero_(name, [1], width=4, dim=0)  # channel 1
        mask.zero_(name, [1, 2], width=3, dim=0)  # of 0, 2, 3: channels 2 and 3
    assert mask.alive == {"0": [0], "1": [0], "2": [0]}
    output = model(torch.ones(1, 3, 2, 2))
    assert output[:, 0].any()
    assert not output[:, 1:].any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("googlenet", {"fc", "auxiliary"}), ("densenet", {"classifier"}), ("detr", {"class_embed", "bbox_embed.2"})],
)
def test_only_layers_that_make_outputs_are_ignored(name: str, expected: set[str]) -> None:
    model = ZOO[name].build()
    ignored = {id(layer) for layer in output_layers(model, ZOO[name].inputs())}
    assert {name for name, layer in model.named_modules() if id(layer) in ignored} == expected


def test_attention_is_found_by_its_names() -> None:
    (first, _) = attentions(ZOO["llama"].build())
    assert (first.heads, first.key_heads, len(first.others), first.fused) == (4, 2, 2, False)
    assert [found.fused for found in attentions(ZOO["vit"].build())] == [True, True]
    assert attentions(ZOO["resnet_b"].build()) == []
