"""Networks that a model can become, made only to be timed: which channels stay does not matter there."""

import torch
from torch import Tensor, nn

from backends.rebuild import cut
from backends.samples import Samples
from planner.graph import Graph
from planner.operations import Choice
from profiles import Profile
from tools.trimming import selecting, with_kernels


def network(model: nn.Module, graph: Graph, choice: Choice) -> nn.Module:
    """Return what `model` becomes under a choice that names every width; which channels stay does not matter here.

    Weights of N:M stay dense, as their zeros make no network smaller.
    """
    kept = present(graph, choice)
    return selecting(cut(with_kernels(model, choice), graph, kept, choice.removed, brief=True), choice)


def present(graph: Graph, choice: Choice) -> dict[str, Tensor]:
    """Return the channels that stay of the widths that are cut and have not left with a block: the first."""
    narrow = [width for width in graph.cuttable if choice.keep[width.name] < width.size]
    return {w.name: torch.arange(choice.keep[w.name]) for w in narrow if w.block not in choice.removed}


def random_samples(inputs: tuple[Tensor, ...], profile: Profile) -> Samples:
    """Return inputs to quantise with where the profile wants integers: latency does not depend on their values.

    Parity is shown on one input, as nobody will use these networks.
    """
    if not profile.dtype.weights.startswith("int"):
        return Samples(cases=1)
    generator = torch.Generator().manual_seed(0)
    return Samples(
        calibration=tuple(
            tuple(
                torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x for x in inputs
            )
            for _ in range(4)
        ),
        cases=1,
    )
