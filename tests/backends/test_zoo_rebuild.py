"""Every net of the zoo is cut at random, proven, run on other sizes, trained, copied and exported, or says why not.

By default half of every width is cut in every net, and a part of the nets, chosen by their names, goes through the
rest; ESPALIER_LONG=1 sends every net through everything.
"""

import copy
import os
import random
import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backends.equivalence import run
from backends.export import export_onnx
from backends.rebuild import cut
from planner.graph import Graph, trace
from profiles.errors import BuildError

from ..planner.nets import masked
from ..zoo import ZOO

LONG = os.environ.get("ESPALIER_LONG") == "1"
TOLERANCE = 1e-4
SLOW = {"swin"}  # a minute: its windows are cut by sizes that the exporter has to reason about
ALWAYS = {"selective_scan"}  # its only addition has another number where sizes are computed
OF_ONE_SIZE = {"resnet_a", "gru", "swin"}  # pools as large as the image, steps in time: the exporter writes them down
EXPORTED = (
    *("plain_cnn", "resnet_a", "shufflenet_v2", "mobilenet_v3", "densenet", "unet", "yolo", "espcn", "vit"),
    *("vit_separate", "bert", "gpt2", "llama", "lstm", "wavenet", "group_norm"),
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning"),  # torch's recurrent modules
]


def part(of: int, number: int) -> list[object]:
    """Return the names of all nets; all but one in `of`, by their names, are skipped unless the run is long."""
    left_out = pytest.mark.skipif(not LONG, reason="only one net in some here: ESPALIER_LONG=1 runs all")
    chosen = {name for name in ZOO if zlib.crc32(name.encode()) % of == number or name in ALWAYS} - SLOW
    return [pytest.param(name, marks=[] if name in chosen else left_out) for name in ZOO]


every = pytest.mark.parametrize("name", part(1, 0))


@cache
def traced(name: str) -> tuple[nn.Module, Graph]:
    """Return a net and its graph; both are shared: copy before changing."""
    model = ZOO[name].build()
    return model, trace(model, ZOO[name].inputs())


def drawn(name: str, share: float) -> dict[str, Tensor]:
    """Return random channels to keep: `share` of every width that can be cut."""
    dice = random.Random(f"{name} {share}")
    return {
        width.name: torch.tensor(sorted(dice.sample(range(width.size), max(1, round(share * width.size)))))
        for width in traced(name)[1].cuttable
    }


@cache
def halved(name: str) -> nn.Module:
    """Return a net with half of each width; what it computes is proven in `cut`."""
    model, graph = traced(name)
    return cut(model, graph, drawn(name, 0.5))


def parameters(model: nn.Module) -> int:
    """Return how many numbers a model learns."""
    return sum(parameter.numel() for parameter in model.parameters())


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Assert that two outputs differ by less than the tolerance, relative to the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@every
def test_half_of_the_channels_compute_what_the_masked_net_does(name: str) -> None:
    model, graph = traced(name)
    if not graph.cuttable:
        pytest.skip("nothing can be cut; why is asserted below")
    zeroed = masked(model, graph, drawn(name, 0.5))
    assert parameters(halved(name)) < parameters(model)
    for variant in (0, 1):  # another batch, and another size where the net takes one
        inputs = ZOO[name].inputs(variant)
        if variant and name in OF_ONE_SIZE:
            assert isinstance(halved(name), torch.fx.GraphModule)
            with pytest.raises(BuildError, match=r"does not run: Guard failed: .*x\.size\(\)\[\d\].* == \d+"):
                run(halved(name), inputs)
        else:
            assert_close(run(halved(name), inputs), run(zeroed, inputs))


@every
def test_every_width_that_cannot_be_cut_says_why_and_where(name: str) -> None:
    for width in traced(name)[1].widths:
        if width.frozen and width.size > 1 and width.frozen != "it is an output of the model":
            assert re.search(r" at /.*\.py:\d+", width.frozen), (width.name, width.frozen)


@every
def test_the_halved_net_trains(name: str) -> None:
    net = copy.deepcopy(halved(name)).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    sum(out.square().sum() for out in _tensors(net(*ZOO[name].inputs()))).backward()  # type: ignore[union-attr]
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@every
def test_a_copy_of_the_halved_net_is_the_same(name: str) -> None:
    inputs = ZOO[name].inputs()
    assert torch.equal(run(copy.deepcopy(halved(name)), inputs), run(halved(name), inputs))


@pytest.mark.parametrize("name", part(4, 0))
def test_three_quarters_of_the_channels_compute_what_the_masked_net_does(name: str) -> None:
    model, graph = traced(name)
    kept = drawn(name, 0.75)
    assert_close(run(cut(model, graph, kept), ZOO[name].inputs()), run(masked(model, graph, kept), ZOO[name].inputs()))


@pytest.mark.parametrize("name", part(3, 0))
def test_all_blocks_leave_together(name: str) -> None:
    model, graph = traced(name)
    removed = frozenset(block.name for block in graph.blocks if not block.frozen)
    dense, zeroed = cut(model, graph, {}, removed), masked(model, graph, {}, removed)
    assert_close(run(dense, ZOO[name].inputs()), run(zeroed, ZOO[name].inputs()))
    gone = {tensor for block in graph.blocks if block.name in removed for tensor in block.last}
    assert not gone & dict(dense.named_parameters()).keys()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(not LONG and name not in EXPORTED, reason="ESPALIER_LONG=1 runs all")
        )
        for name in ZOO
    ],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1:UserWarning")
@pytest.mark.filterwarnings("ignore:Exporting aten..index operator of advanced indexing:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:ONNX export mode is set to TrainingMode.EVAL, but operator 'instance_norm':UserWarning"
)
def test_the_exported_halved_net_computes_the_same_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    inputs = ZOO[name].inputs()
    try:
        export_onnx(halved(name), inputs, tmp_path / "small.onnx")
    except BuildError as error:  # then the dense net cannot be exported either
        with pytest.raises(BuildError, match=re.escape(re.split(r"\[Caused|\n", str(error))[0])):
            export_onnx(traced(name)[0], inputs, tmp_path / "dense.onnx")
        pytest.skip(str(error))
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    given = {spec.name: x.numpy() for spec, x in zip(session.get_inputs(), inputs, strict=True)}
    found = torch.cat([torch.from_numpy(np.asarray(out)).flatten() for out in session.run(None, given)])
    assert_close(found, run(halved(name), inputs).flatten())


@pytest.mark.parametrize("name", ["resnet_a", "shufflenet_v2", "vit", "llama"])
def test_the_halved_net_compiles_and_is_cut_again(name: str) -> None:
    dense, inputs = halved(name), ZOO[name].inputs()
    assert_close(run(torch.compile(copy.deepcopy(dense), backend="eager"), inputs), run(dense, inputs))
    graph = trace(dense, inputs)
    kept = {width.name: torch.arange(width.size // 2) for width in graph.cuttable if width.size > 1}
    smaller = cut(dense, graph, kept)
    assert parameters(smaller) < parameters(dense)
    assert_close(run(smaller, inputs), run(masked(dense, graph, kept), inputs))


def _tensors(out: object) -> list[Tensor]:
    if isinstance(out, dict):
        out = list(out.values())
    return [t for o in out for t in _tensors(o)] if isinstance(out, list | tuple) else [out]  # type: ignore[list-item]
