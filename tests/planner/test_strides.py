"""What moves when strides do: as OpenVINO's compiled networks show, and by hand."""

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn

import backends
from planner import resources
from planner.graph import Graph, trace
from planner.operations import Choice
from planner.roofline import Rules
from profiles import load
from profiles.compare import facts
from tools.contenders import narrowed
from tools.examples.resnet import ResNet

from .nets import Lambda, Sum, conv

PIXELS = (torch.ones(1, 3, 16, 16),)


def positions(graph: Graph, choice: Choice) -> dict[str, int]:
    """Return how many positions each convolution writes."""
    under = {own.name: own.under(choice, strides=True)[0] for own in graph.operations if own.present(choice)}
    return {name: made.macs_per_pair // prod(made.kernel) for name, made in under.items() if made.kernel}


def shapes(graph: Graph, choice: Choice) -> Counter[tuple[int, int]]:
    """Return the output channels and positions of all convolutions."""
    under = [own.under(choice, strides=True) for own in graph.operations if own.present(choice)]
    return Counter((out, made.macs_per_pair // prod(made.kernel)) for made, _, out in under if made.kernel)


def opened(model: nn.Module, path: Path) -> Counter[tuple[int, int]]:
    """Return the same of what OpenVINO makes of a network."""
    ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'espalier[openvino]'")
    backends.export_onnx(model, PIXELS, path)
    compiled = ov.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    nodes = compiled.get_runtime_model().get_ordered_ops()
    found = [node for node in nodes if node.get_rt_info()["layerType"].astype(str) == "Convolution"]
    return Counter((node.shape[1], prod(node.shape[2:])) for node in found)


@pytest.mark.parametrize("widths", [(8, 8, 8), (16, 24, 40)])
def test_openvino_computes_the_positions_that_are_expected(widths: tuple[int, int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ResNet(2, widths).eval()
    graph, dice, moved = trace(model, PIXELS), random.Random(0), 0
    names = [block.name for block in graph.blocks]
    sets = [frozenset(own) for n in range(len(names) + 1) for own in combinations(names, n)]
    for removed in dice.sample(sets, 12):
        choice = graph.choice({}, removed)
        assert shapes(graph, choice) == opened(narrowed(model, graph, choice).eval(), tmp_path / "net.onnx"), sorted(
            removed
        )
        moved += any(gone <= removed for own in graph.operations for gone, _ in own.strided)
    assert moved > 3, "strides move in too few of the networks"


def test_the_last_convolution_before_a_bare_strided_shortcut_takes_its_stride() -> None:
    graph = trace(ResNet(2, (8, 8, 8)).eval(), PIXELS)
    whole = positions(graph, graph.dense)
    assert (whole["layer1.1.conv1"], whole["layer1.1.conv2"], whole["layer2.0.downsample.0"]) == (256, 256, 64)
    assert positions(graph, graph.choice({}, frozenset({"layer2.1"}))) == {
        name: n for name, n in whole.items() if not name.startswith("layer2.1")
    }
    left = positions(graph, graph.choice({}, frozenset({"layer2.0"})))
    assert (left["layer1.1.conv1"], left["layer1.1.conv2"], left["layer2.0.downsample.0"]) == (256, 64, 64)
    more = positions(graph, graph.choice({}, frozenset({"layer2.0", "layer2.1", "layer3.0"})))
    assert (more["layer1.1.conv2"], more["layer2.0.downsample.0"], more["layer3.0.downsample.0"]) == (16, 16, 16)
    alone = positions(graph, graph.choice({}, frozenset({"layer2.1", "layer3.0"})))
    assert (alone["layer1.1.conv2"], alone["layer2.0.conv2"], alone["layer2.0.downsample.0"]) == (256, 16, 16)


def test_a_moved_stride_is_the_operation_that_has_it() -> None:
    """A 3x3 convolution that takes a stride costs what one costs that was written with it."""
    net = nn.Sequential(conv(3, 8), Sum(conv(8, 8)), nn.ReLU(), conv(8, 8, 1, stride=2))
    written = nn.Sequential(conv(3, 8), conv(8, 8, stride=2))
    read = Lambda(lambda n, x: n.last(n.first(x).relu()), first=conv(3, 8), last=conv(8, 8, 1, stride=2))
    (operation, last) = trace(read, PIXELS).operations  # nothing has to leave
    assert [gone for own in (operation, last) for gone, _ in own.strided] == [frozenset(), frozenset()]
    assert (operation.moved(frozenset()).macs_per_pair * 4, last.moved(frozenset()).macs_per_pair) == (
        operation.macs_per_pair,
        last.macs_per_pair,
    )
    first, body, end = trace(net, PIXELS).operations
    (gone, made), *rest = first.strided
    assert (rest, len(gone)) == ([], 1)
    assert made.signature == first.signature.replace("s1x1", "s2x2")
    assert made.signature.split(" @")[0] == trace(written, PIXELS).operations[1].signature.split(" @")[0]
    assert (made.macs_per_pair * 4, made.moved_per_output * 4) == (first.macs_per_pair, first.moved_per_output)
    assert (made.read_per_input, made.weights_per_pair, made.whole) == (
        first.read_per_input,
        9,
        replace(first, strided=()),
    )
    assert [(gone, own.macs_per_pair * 4) for gone, own in body.strided] == [(frozenset(), body.macs_per_pair)]
    assert [own.signature.split()[2] for _, own in end.strided] == ["s1x1"]


def test_the_program_counts_what_the_costs_say() -> None:
    graph, dice = trace(ResNet(3, (8, 16, 24)).eval(), PIXELS), random.Random(0)
    rules = Rules(load("x86_64_v4.openvino.fp32"))
    time, names, moved = resources.time(graph, rules, "it"), [block.name for block in graph.blocks], 0
    for _ in range(200):
        removed = frozenset(name for name in names if dice.random() < 0.6)
        keep = {w.name: dice.randrange(1, w.size + 1) for w in graph.cuttable}
        choice = graph.choice(keep, removed)
        assert time.under(choice) == pytest.approx(rules.latency(graph, choice), rel=1e-9), sorted(removed)
        unmoved = sum(rules.cost(*own.under(choice)) for own in graph.operations if own.present(choice))
        moved += time.under(choice) < 0.999 * unmoved
    assert moved > 100


def test_a_guess_moves_nothing() -> None:
    profile = load("x86_64_v4.openvino.fp32")
    (said,) = profile.rewrite
    guessed = profile.model_copy(update={"rewrite": (said.model_copy(update={"confidence": "inferred"}),)})
    assert (profile.moves_strides, guessed.moves_strides) == (True, False)
    assert "rewrite strides" in facts(profile)


def test_only_profiles_that_say_so_move_strides() -> None:
    assert load("x86_64_v4.openvino.fp32").moves_strides
    assert not load("x86_64_v4.onnxruntime.fp32").moves_strides
    assert not load("x86_64_v4.openvino.int8-vnni").moves_strides  # between quantised layers nothing was seen to move
