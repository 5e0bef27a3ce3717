"""The proof of a rebuild: dense(x) == masked(x) on fresh random inputs, or a refusal that names the place."""

import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from planner.evaluation import evaluating
from planner.graph import Graph
from profiles.errors import BuildError

TOLERANCE = 1e-4  # largest |dense - masked| relative to the largest |masked|


class Proof:
    """What a masked model computes on fresh random inputs, which its rebuilt one has to compute too."""

    def __init__(self, graph: Graph, masked: nn.Module, *, cases: int = 2, exact: bool = True) -> None:
        """Run `masked` on `cases` batches, of other sizes where it takes them; `exact`: differences are refused."""
        self._graph, self._masked, self._exact = graph, masked, exact
        device = next(masked.parameters()).device
        self._batches: list[tuple[tuple[Tensor, ...], Tensor]] = []
        for seed in range(cases):
            for more in (seed, 0):
                inputs = tuple(x.to(device) for x in graph.example(seed=seed, more=more))
                with suppress(BuildError):
                    self._batches.append((inputs, run(masked, inputs)))
                    break

    def check(self, dense: nn.Module) -> float:
        """Return max|dense - masked| / max|masked| in evaluation mode; raises BuildError if it is too large."""
        worst = 0.0
        for inputs, expected in self._batches:
            found = run(dense, inputs)
            if expected.shape != found.shape or not torch.isfinite(found).all() or not torch.isfinite(expected).all():
                raise BuildError(
                    f"the rebuilt model's output is {_told(found)}, the masked model's is {_told(expected)}"
                )
            worst = max(worst, _difference(found, expected))
            if worst > TOLERANCE and self._exact:
                raise BuildError(
                    f"the rebuilt model differs from the masked one by {worst:.2e} (allowed {TOLERANCE:g}); first at "
                    f"{_first_difference(self._graph, self._masked, dense, inputs)}; the weights there are not exactly "
                    "zero or the channels are used in a way that was not followed"
                )
        return worst


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _told(x: Tensor) -> str:
    return f"{'x'.join(map(str, x.shape))}{'' if torch.isfinite(x).all() else ' with values that are not finite'}"


@torch.no_grad()
def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the model's output in evaluation mode; several outputs are joined."""
    with evaluating(model):
        try:
            out = model(*inputs)
        except Exception as error:
            foreign = (torch.__path__[0], __file__, "<")
            frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(foreign)]
            where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
            raise BuildError(
                f"the rebuilt model does not run: {error}{where}; a size is written into the model there: take it "
                "from the tensor instead, or keep that width"
            ) from error
    return out if isinstance(out, Tensor) else torch.cat([x.flatten().float() for x in _leaves(out)])


def _leaves(out: object) -> list[Tensor]:
    """Return the tensors in a nest of mappings and sequences."""
    if isinstance(out, Mapping):
        out = list(out.values())
    if isinstance(out, list | tuple):
        return [x for part in out for x in _leaves(part)]
    return [out] if isinstance(out, Tensor) else []


def _first_difference(graph: Graph, masked: nn.Module, dense: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """Return the first operation whose surviving channels differ, by the sum of magnitudes over each output."""
    before, after = _sums(masked, inputs), _sums(dense, inputs)
    for operation in graph.operations:
        if operation.name in before and operation.name in after:
            expected = before[operation.name]
            if abs(expected - after[operation.name]) > 1e-3 * max(expected, 1e-30):
                return f"{operation.name} ({operation.where})"
    return "the model's output"


def _sums(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Return Σ|output| of every module without children."""
    sums: dict[str, float] = {}

    def recorder(name: str) -> Callable[[nn.Module, object, object], None]:
        def record(_: nn.Module, __: object, out: object) -> None:
            if isinstance(out, Tensor):
                sums[name] = float(out.abs().double().sum())

        return record

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(recorder(name)) for name, module in leaves]
    try:
        run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return sums
