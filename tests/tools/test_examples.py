"""The examples read their data exactly, serve it reproducibly, and build the networks that are published."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from profiles.errors import BackendUnavailable, EspalierError
from tools.batches import Batches, Normalise, Shift
from tools.examples import cifar10, digits
from tools.examples.resnet import ResNet

FILES = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six files of 40 random images each, in the layout of the official archive."""
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name in FILES:
        records = torch.randint(0, 256, (40, 3073), generator=generator, dtype=torch.uint8)
        records[:, 0] %= 10
        (inner / name).write_bytes(records.numpy().tobytes())
    return tmp_path


def _batches(*, shuffle: bool = True, count: int = 50, seed: int = 0) -> Batches:
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    augment = Shift(pad=2, flip=True) if shuffle else None
    return Batches(images, torch.arange(count), batch=16, shuffle=shuffle, augment=augment, seed=seed)


def _pass(batches: Batches, epoch: int) -> tuple[Tensor, Tensor]:
    batches.set_epoch(epoch)
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_binary_files_come_back_byte_for_byte(folder: Path) -> None:
    path = folder / "cifar-10-batches-bin" / FILES[0]
    images, labels = cifar10.read(path)
    written = path.read_bytes()
    assert images.shape == (40, 3, 32, 32)
    assert labels.tolist() == list(written[::3073])
    record = written[7 * 3073 : 8 * 3073]
    assert images[7, 2, 5, 9] == record[1 + 2 * 1024 + 5 * 32 + 9]
    assert bytes(images[7].flatten().tolist()) == record[1:]


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_data_is_found_and_normalised(folder: Path, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cifar10.FOLDER, str(folder / inner))
    test = cifar10.data_a().test
    images, labels = next(iter(test))
    assert len(cifar10.data().train.x) == 200
    assert labels.dtype == torch.int64
    green = (test.x[3, 1, 4, 5].item() / 255 - 0.456) / 0.224
    assert images[3, 1, 4, 5].item() == pytest.approx(green, rel=1e-5)


def test_cut_off_file_is_refused(folder: Path) -> None:
    path = folder / "cifar-10-batches-bin" / FILES[2]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EspalierError, match=r"data_batch_3\.bin has 122919 bytes.*cut off.*https://www\.cs\.toronto"):
        cifar10.read(path)


def test_foreign_label_is_refused(folder: Path) -> None:
    path = folder / "cifar-10-batches-bin" / FILES[0]
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(EspalierError, match="label 10"):
        cifar10.read(path)


@pytest.mark.parametrize("value", [None, "absent"])
def test_missing_folder_says_how_to_get_it(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cifar10.FOLDER, raising=False)
    if value is not None:
        monkeypatch.setenv(cifar10.FOLDER, value)
    with pytest.raises(EspalierError, match=rf"(?s)https://www\.cs\.toronto\.edu/~kriz/cifar\.html.*{cifar10.FOLDER}"):
        cifar10.data()


def _slow_crop(image: Tensor, pad: int, top: int, left: int, flip: bool) -> Tensor:
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * pad, width + 2 * pad, dtype=image.dtype)
    padded[:, pad : pad + height, pad : pad + width] = image
    cropped = padded[:, top : top + height, left : left + width]
    return cropped.flip(2) if flip else cropped


@pytest.mark.parametrize("flip", [False, True])
def test_crop_agrees_with_one_image_at_a_time(flip: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (30, 3, 6, 9), generator=generator, dtype=torch.uint8)
    tops, lefts = torch.randint(0, 9, (2, 30), generator=generator)
    flips = torch.randint(0, 1 + flip, (30,), generator=generator).bool()
    fast = Shift(pad=4, flip=flip).crop(images, tops, lefts, flips)
    draws = zip(images, tops.tolist(), lefts.tolist(), flips.tolist(), strict=True)
    assert torch.equal(fast, torch.stack([_slow_crop(image, 4, *draw) for image, *draw in draws]))


def test_shift_draws_every_place_and_both_sides() -> None:
    ramp = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(400, 1, 3, 3)
    shifted = Shift(pad=1, flip=True)(ramp, torch.Generator().manual_seed(0))
    assert len({tuple(image.flatten().tolist()) for image in shifted}) == 3 * 3 * 2


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    first, again = _pass(_batches(), 3), _pass(_batches(), 3)
    torch.rand(7)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    for other in (_pass(_batches(), 4), _pass(_batches(seed=1), 3), _pass(_batches(seed=3), 0)):
        assert not torch.equal(first[1], other[1])


def test_batches_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    _pass(_batches(), 0)
    ResNet(1, (4, 8, 16))
    assert torch.equal(state, torch.get_rng_state())


def test_training_drops_the_short_batch_and_testing_keeps_it() -> None:
    train, test = _batches(), _batches(shuffle=False)
    assert [len(labels) for _, labels in train] == [16, 16, 16]
    assert [len(labels) for _, labels in test] == [16, 16, 16, 2]
    assert (len(train), len(test)) == (3, 4)
    assert torch.equal(_pass(test, 1)[1], torch.arange(50))
    assert _pass(train, 1)[1].unique().numel() == 48


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_have_the_layout_asked_for(channels_last: bool) -> None:
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    batches = Batches(pixels, torch.zeros(4), batch=4, shuffle=False, channels_last=channels_last)
    images, labels = next(iter(batches))
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_bytes_are_normalised_per_channel() -> None:
    images = Normalise((0.0, 0.5), (1.0, 0.25))(torch.full((1, 2, 1, 1), 255, dtype=torch.uint8))
    assert images.flatten().tolist() == [1.0, 2.0]


IMPOSSIBLE = [(9, 4, "10 images have 9 labels"), (10, 11, "choose 1 to 10"), (10, 0, "batch 0")]


@pytest.mark.parametrize(("labels", "batch", "message"), IMPOSSIBLE)
def test_impossible_batches_are_refused(labels: int, batch: int, message: str) -> None:
    with pytest.raises(EspalierError, match=message):
        Batches(torch.zeros(10, 1, 2, 2), torch.zeros(labels), batch=batch, shuffle=True)


PUBLISHED = [
    (cifar10.resnet20_a, 269_722),
    (cifar10.resnet56_a, 853_018),
    (cifar10.resnet20, 272_474),
    (cifar10.resnet56, 855_770),
]


@pytest.mark.parametrize(("factory", "params"), PUBLISHED)
def test_networks_have_the_published_size(factory: Callable[[], ResNet], params: int) -> None:
    assert sum(parameter.numel() for parameter in factory().parameters()) == params


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
@pytest.mark.parametrize("suffix", ["", "_a"])
def test_depth_counts_the_layers_on_the_longest_path(depth: int, suffix: str) -> None:
    model = getattr(cifar10, f"resnet{depth}{suffix}")()
    kinds = (nn.Conv2d, nn.Linear)
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds) and "downsample" not in name]
    assert len(layers) == depth


def test_weights_are_named_as_in_published_checkpoints() -> None:
    plain, padded = (set(factory().state_dict()) for factory in (cifar10.resnet20, cifar10.resnet20_a))
    shortcuts = {f"layer{stage}.0.downsample.{part}" for stage in (2, 3) for part in ("0.weight", "1.running_var")}
    assert {"conv1.weight", "bn1.bias", "layer1.2.conv2.weight", "layer3.0.bn2.running_mean", "fc.bias"} < plain
    assert shortcuts < plain
    assert {"linear.weight", "linear.bias"} < padded
    assert not {name for name in padded if "downsample" in name or name.startswith("fc")}


def test_weights_follow_from_the_seed() -> None:
    first, again, other = (ResNet(1, (4, 8, 16), seed=seed).layer3[0].conv1.weight for seed in (2, 2, 3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_padded_shortcut_keeps_every_second_pixel_between_zero_channels() -> None:
    block = cifar10.resnet20_a().layer2[0]
    images = torch.rand(2, 16, 6, 6)
    shortcut = block.downsample(images)
    assert torch.equal(shortcut[:, 8:24], images[:, :, ::2, ::2])
    assert shortcut[:, :8].abs().sum() + shortcut[:, 24:].abs().sum() == 0


def test_digits_are_split_in_proportion() -> None:
    data = digits.data()
    train, test = data.train.y, data.test.y
    assert (len(train), len(test)) == (1297, 500)
    assert data.train.x.shape[1:] == (1, 16, 16)
    total = train.bincount() + test.bincount()
    assert total.sum() == 1797
    assert ((test.bincount() / total - 500 / 1797).abs() < 0.01).all()
    assert torch.equal(digits.data().train.x, data.train.x)


def test_digits_are_normalised_and_fit_the_network() -> None:
    data = digits.data()
    assert data.train.normalise is not None
    pixels = data.train.normalise(data.train.x)
    assert abs(pixels.mean().item()) < 1e-3
    assert abs(pixels.std().item() - 1) < 1e-3
    images, labels = next(iter(data.train))
    assert images.shape == (64, 1, 16, 16)
    assert digits.resnet().eval()(images[:2]).shape == (2, 10)
    assert labels.shape == (64,)


def test_no_digit_is_in_both_parts() -> None:
    data = digits.data()
    train, test = ({tuple(image.flatten().tolist()) for image in part.x} for part in (data.train, data.test))
    assert len(train) > 1290
    assert not train & test


def test_missing_scikit_learn_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'espalier\[demo\]'"):
        digits.data()
