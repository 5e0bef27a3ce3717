"""The rows of SSL and WGSEF say what happened: levels are reached exactly, and no prediction changes in the rebuild."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import planner
import profiles
from backends.weights import save
from profiles.errors import EspalierError
from tools.evidence import record, render, sparse_alexnet, ssl, wgsef
from tools.evidence.runs import part
from tools.examples import cifar10, fashion_mnist, small_images
from tools.examples.alexnet import LocalResponseNorm, alexnet, alexnet_towers
from tools.examples.resnet import ResNet

FAST: dict[str, Any] = {"runtimes": "onnxruntime", "seconds": 0.02, "epochs": 2, "lr": 0.01, "seed": 0}


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random images in CIFAR-10's layout; a small network stands for ResNet-20."""
    monkeypatch.setenv(cifar10.FOLDER, "unset")
    monkeypatch.setattr(cifar10, "resnet20", lambda: ResNet(2, (8, 8, 16)))
    for name in [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]:
        records = bytes_of(80, 3073)
        records[:, 0] %= 10
        (tmp_path / name).write_bytes(records.numpy().tobytes())
    return tmp_path


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random images in Fashion-MNIST's layout."""
    monkeypatch.setenv(fashion_mnist.FOLDER, "unset")
    for name, count in (("train", 300), ("t10k", 100)):
        _write(tmp_path / f"{name}-images-idx3-ubyte.gz", bytes_of(count, 28, 28))
        _write(tmp_path / f"{name}-labels-idx1-ubyte.gz", bytes_of(count) % 10)
    return tmp_path


def _write(path: Path, values: Tensor) -> None:
    head = bytes([0, 0, 8, values.dim()]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + values.numpy().tobytes()))


# --- data and networks ------------------------------------------------------------------------------------------------


def test_fashion_mnist_comes_back_byte_for_byte_in_a_frame_of_zeros(fashion: Path) -> None:
    images, labels = fashion_mnist.labelled(fashion, "train")
    assert torch.equal(images[:, 0, 2:30, 2:30], bytes_of(300, 28, 28))
    assert int(images.sum()) == int(bytes_of(300, 28, 28).sum())
    assert torch.equal(labels, bytes_of(300) % 10)


def _zipped(content: bytes) -> bytes:
    """Compress without the time of day, which would make the names of tests differ from worker to worker."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"text", "cannot be read"),
        (_zipped(b"\x00\x00\x08\x01")[:-5], "cannot be read"),
        (_zipped(bytes(range(200)))[:10] + b"\xff" * 90, "cannot be read"),
        (_zipped(b"\x00\x00\x08\x01\x00\x00\x00\x05\x01"), "has 1 bytes for the shape \\[5\\]: it is cut off"),
        (_zipped(b"\x00\x00\x0d\x01\x00\x00\x00\x00"), "is no idx file of bytes"),
        (_zipped(b"\x00\x00\x08\x01"), "is no idx file of bytes"),
    ],
)
def test_what_is_no_fashion_mnist_is_refused(fashion: Path, content: bytes, said: str) -> None:
    (fashion / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(EspalierError, match=rf"{said}.*https://github.com/zalandoresearch"):
        fashion_mnist.labelled(fashion, "t10k")


def test_labels_of_other_images_are_refused(fashion: Path) -> None:
    _write(fashion / "train-labels-idx1-ubyte.gz", bytes_of(299))
    with pytest.raises(EspalierError, match=r"\(300, 28, 28\) and \(299,\), not one label per image"):
        fashion_mnist.labelled(fashion, "train")


@pytest.mark.parametrize(
    ("name", "parameters"), [("vgg16", 14_724_042), ("resnet18", 11_173_962), ("mobilenet_v1", 3_217_226)]
)
def test_networks_of_small_images_have_the_size_of_those_published(name: str, parameters: int) -> None:
    model = getattr(small_images, name)().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert getattr(small_images, name)(1)(torch.ones(2, 1, 32, 32)).shape == (2, 10)
    assert torch.equal(next(model.parameters()), next(getattr(small_images, name)().parameters()))


def test_a_part_of_the_images_is_the_same_for_every_seed(cifar: Path) -> None:
    data = cifar10.load(cifar, cifar10.Normalise((0.5,) * 3, (0.2,) * 3))
    first, second = (part(data, 150, seed=seed) for seed in (0, 1))
    assert len(first.train.x) == 150
    assert torch.equal(first.train.x, second.train.x)
    assert not torch.equal(next(iter(first.train))[1], next(iter(second.train))[1])
    with pytest.raises(EspalierError, match="--examples 20 is not between a batch of 128 and all 400"):
        part(data, 20, seed=0)


# --- AlexNet ----------------------------------------------------------------------------------------------------------


def test_alexnet_is_caffes_and_computes_the_same_in_towers() -> None:
    model, towers = alexnet().eval(), alexnet_towers().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 60_965_224
    x = sparse_alexnet.image()[0]
    torch.testing.assert_close(towers(x), model(x))
    x = 30 * torch.randn(2, 7, 3, 5)
    torch.testing.assert_close(LocalResponseNorm()(x), nn.functional.local_response_norm(x, 5, 1e-4, 0.75, 1.0))


@pytest.mark.parametrize("published", sparse_alexnet.LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("pattern", sparse_alexnet.PATTERNS)
def test_a_layer_alone_computes_the_filters_that_stay_of_its_masked_self(
    pattern: str, published: sparse_alexnet.Layer
) -> None:
    conv = alexnet().features.get_submodule(published.name)
    assert isinstance(conv, nn.Conv2d)
    x = torch.randn(1, conv.in_channels, 23, 23, generator=torch.Generator().manual_seed(0))
    small = sparse_alexnet.layer(conv, pattern, (x,), published)
    alive = sparse_alexnet._alone(conv, pattern, published)
    rows = sparse_alexnet.filters(conv.out_channels, published.rows, parts=conv.groups, seed=0)
    assert int(rows.sum()) == conv.groups * round((1 - published.rows) * conv.out_channels / conv.groups)
    wanted = (1 - published.columns) * alive.numel()
    nearest = {"fibres": 1, "channels": conv.weight[0, 0].numel(), "kernels": len(alive)}[pattern]
    assert abs(int(alive.sum()) - wanted) <= nearest / 2
    with torch.no_grad():
        conv.weight.mul_(alive)
    torch.testing.assert_close(small(x), conv(x)[:, rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", sparse_alexnet.PATTERNS)
def test_the_rebuilt_convolutions_of_alexnet_compute_what_the_masked_ones_do(pattern: str) -> None:
    profile = profiles.load("x86_64_v4.onnxruntime.fp32")
    small, plan = sparse_alexnet.network(pattern, "features", profile)
    masked = alexnet_towers().eval()
    stays = sparse_alexnet.pruned(masked, pattern)
    x = torch.randn(1, *sparse_alexnet.IMAGE, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found, expected = small(x), masked.features(x)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    few = {name: alive for name, alive in stays.items() if "conv1" not in name}
    assert all(not alive.all() for alive in few.values())
    before, after = (planner.trace(each, sparse_alexnet.image()) for each in (alexnet().features.eval(), small))
    assert before.macs(before.dense) > 2.5 * after.macs(after.dense)
    assert plan.forced


def test_the_product_of_lowered_matrices_is_timed_without_what_is_zero() -> None:
    published = sparse_alexnet.LAYERS[3]
    conv = alexnet().features.conv4
    assert isinstance(conv, nn.Conv2d)
    assert sparse_alexnet.products(conv, published, seconds=0.05).value > 1  # of 12 times fewer multiplications


# --- trained rows -----------------------------------------------------------------------------------------------------


def test_learned_depth_reaches_its_layers_and_the_rebuild_changes_no_image(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(ResNet(2, (8, 8, 16), seed=3), tmp_path / "weights.safetensors")
    options = {
        "data": cifar,
        "weights": tmp_path / "weights.safetensors",
        "layers": "14,12,8",
        "examples": None,
        **FAST,
    }
    ssl.main(**options, out=tmp_path / "out", table=tmp_path)
    rows = record.read("ssl", tmp_path).rows
    assert [len(row["blocks_left"]) for row in rows] == [0, 1, 3]
    assert [row["images_changed"] for row in rows] == [0, 0, 0]
    assert all(row["before_cut_error"] == row["error"] for row in rows)
    assert [set(row["speed"]) for row in rows] == [set(), {"onnxruntime"}, {"onnxruntime"}]
    assert rows[2]["macs_speedup"] > rows[1]["macs_speedup"] > rows[0]["macs_speedup"] == 1
    monkeypatch.setattr(planner.train, "_epoch", None)
    ssl.main(**options, out=tmp_path / "out", table=tmp_path)  # trains nothing again; measures again if disturbed
    again = record.read("ssl", tmp_path).rows
    assert [{**row, "speed": None} for row in again] == [{**row, "speed": None} for row in rows]
    text = render.rendered("<!-- evidence: ssl -->\n<!-- end of evidence -->", tmp_path)
    assert f"| 12 (2 epochs of 400, seed 0) | `{rows[1]['blocks_left'][0]}` |" in text
    with pytest.raises(EspalierError, match="13 layers cannot be left of 14"):
        ssl.main(**{**options, "layers": "13"}, out=tmp_path / "out", table=tmp_path)
    with pytest.raises(EspalierError, match="give --weights"):
        ssl.main(**{**options, "weights": None}, out=tmp_path / "out", table=tmp_path)


@pytest.mark.parametrize("convex", [True, False])
def test_the_given_level_is_reached_exactly_and_a_row_is_run_once(
    convex: bool, fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(wgsef.NETWORKS, "tiny", lambda channels: ResNet(1, (8, 8, 16), channels=channels))
    options = {"networks": "tiny", "data_sets": "fashion_mnist", "sparsities": "0,0.5,0.9", "convex": convex}
    options |= {"cifar10_folder": None, "fashion_folder": fashion, "examples": 256, **FAST}
    wgsef.main(**options, out=tmp_path / "out", table=tmp_path)
    rows = record.read("wgsef", tmp_path).rows
    sizes = (8, 8, 16, 8, 8, 16)  # three streams and what lies within three blocks
    assert [row["groups_zero"] for row in rows] == [sum(size - keep(size, s) for size in sizes) for s in (0, 0.5, 0.9)]
    assert all(row["level_reached"] and row["images_changed"] == 0 for row in rows)
    assert [row["form"] for row in rows] == ["none", *["convex" if convex else "de-biased"] * 2]
    assert rows[2]["compression"] > rows[1]["compression"] > 3
    monkeypatch.setattr(wgsef, "row", None)
    wgsef.main(**options, out=tmp_path / "out", table=tmp_path)
    assert record.read("wgsef", tmp_path).rows == rows
    text = render.rendered("<!-- evidence: wgsef -->\n<!-- end of evidence -->", tmp_path)
    assert f"({rows[1]['form']}, 2 epochs of 256, seed 0) | 32 of 64 | 32 |" in text
    for wrong in ({"networks": "tiny,no"}, {"data_sets": "mnist"}, {"sparsities": "1"}):
        with pytest.raises(EspalierError, match=r"is not known; there are|is no share"):
            wgsef.main(**{**options, **wrong}, out=tmp_path / "out", table=tmp_path)


def keep(size: int, sparsity: float) -> int:
    return max(1, size - round(sparsity * size))


def test_alexnets_layers_stand_beside_what_is_published_and_a_mean_needs_all_of_them(tmp_path: Path) -> None:
    about = {"part": "alexnet", "published": {"rows": 0.1, "columns": 0.5, "cpu": 4.0, "gpu": 2.0}}
    rows = [
        {**about, "case": case, "how": how, "zero_columns": 0.56, "speed": {"ort": {"speedup": {"value": value}}}}
        for case, how, value in (("conv1", "fibres", 2.0), ("conv2", "fibres", 3.0), ("conv1", "kernels", 5.0))
    ]
    rows.append({"part": "alexnet", "case": "network", "how": "fibres", "speed": {"ort": {"speedup": {"value": 1.5}}}})
    record.add("ssl", rows, command="c", key=("part", "case", "how"), folder=tmp_path)
    text = render.rendered("<!-- evidence: ssl -->\n<!-- end of evidence -->", tmp_path)
    assert "| SSL, product on a CPU | 4.00x | 4.00x | 4.00x | - |\n" in text
    assert "| zero columns as fibres | 56.0 % | 56.0 % | - | - |\n" in text
    assert "| fibres, ort | 2.00x | 3.00x | 2.50x | 1.50x |\n" in text
    assert "| kernels, ort | 5.00x | - | - | - |\n" in text
