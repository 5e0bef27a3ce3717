"""The zoo itself: every net is what it says, the same each time, and can be exported."""

import pytest
import torch
from torch import Tensor

from . import ZOO, Net

VARIANTS = (0, 1)
nets = pytest.mark.parametrize("net", ZOO.values(), ids=lambda net: net.name)


def tensors(output: object) -> list[Tensor]:
    """Return the tensors of an output, however nested."""
    if isinstance(output, Tensor):
        return [output]
    assert isinstance(output, tuple | list | dict)
    return [t for part in (output.values() if isinstance(output, dict) else output) for t in tensors(part)]


@torch.no_grad()
def outputs(net: Net, variant: int = 0) -> list[Tensor]:
    """Return what a fresh build of `net` computes."""
    return tensors(net.build()(*net.inputs(variant)))


def test_names_are_unique_and_each_net_has_a_feature() -> None:
    from . import THEMES

    assert sum(len(theme.NETS) for theme in THEMES) == len(ZOO) >= 60
    assert all(net.feature for net in ZOO.values())


@nets
def test_two_builds_have_the_same_weights(net: Net) -> None:
    torch.manual_seed(1)
    first = net.build().state_dict()
    torch.manual_seed(2)
    second = net.build().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@nets
def test_nothing_is_trivial(net: Net) -> None:
    model = net.build()
    assert not any(module.training for module in model.modules())
    assert not [name for name, p in model.named_parameters() if not p.any() or bool((p == 1).all())]
    moved = {name: buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    assert not [name for name, buffer in moved.items() if not buffer.any() or bool((buffer == 1).all())]


@nets
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_finite_and_vary(net: Net, variant: int) -> None:
    for output in outputs(net, variant):
        assert output.isfinite().all()
        assert output.std() > 1e-3 * output.abs().max()


@nets
def test_every_input_reaches_an_output(net: Net) -> None:
    model, inputs, reference = net.build(), net.inputs(), outputs(net)
    for i, x in enumerate(inputs):
        other = 0.5 * x.flip(-1) - 0.2 if x.is_floating_point() else (x - 1).clamp(min=0)
        with torch.no_grad():
            changed = tensors(model(*inputs[:i], other, *inputs[i + 1 :]))
        assert any((a - b).abs().max() > 1e-4 * b.abs().max() for a, b in zip(changed, reference, strict=True))


@nets
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")  # torch's own recurrent modules
def test_it_exports_and_computes_the_same(net: Net) -> None:
    model, inputs = net.build(), net.inputs()
    exported = torch.export.export(model, inputs, strict=False).module()
    with torch.no_grad():
        found = tensors(exported(*inputs))
    for a, b in zip(found, outputs(net), strict=True):
        torch.testing.assert_close(a, b)
