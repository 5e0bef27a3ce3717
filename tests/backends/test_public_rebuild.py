"""Networks as the `transformers` package defines them: cut at random, proven, and trained on.

All of them with ESPALIER_LONG=1; otherwise a few of each kind.
"""

import os
import random

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers")

from backends.equivalence import proven
from backends.rebuild import cut, zeroed
from planner.graph import trace

from ..zoo.public import PUBLIC

LONG = bool(os.environ.get("ESPALIER_LONG"))
ALWAYS = {
    "bert",
    "gpt2",
    "llama_sdpa",
    "t5",
    "swin",
    "vit",
    "mobilenet_v2",
    "gemma2",
    "whisper_encoder",
    "qwen3",
    "cvt",
}
LEFT_OUT = pytest.mark.skipif(not LONG, reason="a few of each kind are tested: ESPALIER_LONG=1 runs all")
NAMES = [pytest.param(name, marks=[] if name in ALWAYS else LEFT_OUT) for name in PUBLIC]


@pytest.mark.parametrize("name", NAMES)
def test_half_of_everything_that_can_be_cut_goes(name: str) -> None:
    net = PUBLIC[name]
    model, inputs = net.build(), net.inputs()
    graph = trace(model, inputs)
    dice = random.Random(name)
    kept = {
        width.name: torch.tensor(sorted(dice.sample(range(width.size), (width.size + 1) // 2)))
        for width in graph.cuttable
    }
    assert kept, [width.frozen for width in graph.widths]
    masked = zeroed(model, graph, kept)
    dense = cut(masked, graph, kept)
    proven(graph, masked, dense)
    assert _size(dense) < 0.9 * _size(model)
    outputs = [x for x in tree_leaves(dense.train()(*inputs)) if isinstance(x, torch.Tensor) and x.requires_grad]
    torch.stack([x.float().square().mean() for x in outputs]).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in dense.parameters() if p.grad is not None)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
