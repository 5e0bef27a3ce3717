"""The proof of a rebuild: dense(x) == masked(x) on fresh random inputs, or a refusal that names the place."""

import copy
import logging
import traceback
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from planner.evaluation import evaluating
from planner.graph import Graph
from profiles.errors import BuildError

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # largest |dense - masked| relative to the largest |masked|, in the model's own precision
TOLERANCE_FLOAT64 = 1e-9
TOLERANCE_CAST = 1e-5  # in float64, where the model itself computes in a lower precision


class Proof:
    """What a masked model computes on fresh random inputs, which its rebuilt one has to compute too."""

    def __init__(
        self,
        graph: Graph,
        masked: nn.Module,
        *,
        cases: int = 2,
        exact: bool = True,
        float64: bool = False,
        brief: bool = False,
    ) -> None:
        """Run `masked` on `cases` batches, of other sizes where it takes them; `exact`: differences are refused.

        `brief`: on one example, where it takes so few. Raises BuildError if it runs on none.
        """
        self._graph, self._exact, self._float64 = graph, exact, float64
        self._masked = self._precise(masked)
        device = next(masked.parameters()).device
        self._batches: list[tuple[tuple[Tensor, ...], Tensor]] = []
        for seed in range(1 if brief else cases):
            more = 1 - self._examples if brief else seed
            refused = self._add(seed, more, device) and self._add(seed, 0, device)
        if not self._batches and refused:
            raise refused

    @property
    def _examples(self) -> int:
        """How many examples the model was traced with; 1 where inputs differ in what may be that."""
        firsts = {shape[0] if shape else 1 for shape, _ in self._graph.inputs}
        return firsts.pop() if len(firsts) == 1 else 1

    def _add(self, seed: int, more: int, device: torch.device) -> BuildError | None:
        """Run one batch with `more` examples; return why it does not run."""
        inputs = tuple(x.to(device) for x in self._graph.example(seed=seed, more=more))
        if self._float64:
            inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        try:
            expected = run(self._masked, inputs)
        except BuildError as error:
            return error
        if not expected.isfinite().any():
            return BuildError(f"no value of the masked model's output, {_told(expected)}, is finite")
        self._batches.append((inputs, expected))
        return None

    def _precise(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).double() if self._float64 else model

    @property
    def tolerance(self) -> float:
        """The largest difference that passes."""
        if not self._float64:
            return TOLERANCE
        return TOLERANCE_CAST if self._graph.casts else TOLERANCE_FLOAT64

    def check(self, dense: nn.Module) -> float:
        """Return max|dense - masked| / max|masked| in evaluation mode; raises BuildError if it is too large."""
        worst = 0.0
        _refuse_diverged(self._masked)
        _refuse_diverged(dense)
        dense = self._precise(dense)
        for inputs, expected in self._batches:
            found = run(dense, inputs)
            if not _comparable(found, expected):
                raise BuildError(
                    f"the rebuilt model's output is {_told(found)}, the masked model's is {_told(expected)}"
                )
            worst = max(worst, _difference(found, expected))
            if worst > self.tolerance and self._exact:
                raise BuildError(
                    f"the rebuilt model differs from the masked one by {worst:.2e} (allowed {self.tolerance:g}); first "
                    f"at {_first_difference(self._graph, self._masked, dense, inputs)}; the weights there are not "
                    "exactly zero or the channels are used in a way that was not followed"
                )
        return worst


def _refuse_diverged(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise BuildError(f"{name} has weights that are not finite; the training diverged: lower its learning rate")


def _comparable(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs have one shape, some finite values, and these at the same places."""
    if found.shape != expected.shape:
        return False
    finite = expected.isfinite()  # attention over nothing, where random masks hide everything, is not
    return bool(finite.any()) and torch.equal(finite, found.isfinite())


def proven(graph: Graph, masked: nn.Module, dense: nn.Module, *, cases: int = 2, exact: bool = True) -> float:
    """Check `dense` in float64 and in the model's own precision; return the largest relative difference in the latter.

    A model that does not run in float64 is checked in its own precision alone, as is an exported graph into which a
    lower precision is written. Raises BuildError as Proof does.
    """
    if not (graph.casts and isinstance(dense, GraphModule)):
        try:
            precise = Proof(graph, masked, cases=cases, exact=exact, float64=True)
        except BuildError as error:
            log.info("the model does not run in float64, so it is checked in its own precision alone: %s", error)
        else:
            precise.check(dense)
    return Proof(graph, masked, cases=cases, exact=exact).check(dense)


def _difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found[expected.isfinite()], expected[expected.isfinite()]
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
    return out if isinstance(out, Tensor) else torch.cat([x.flatten().double() for x in _leaves(out)])


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
