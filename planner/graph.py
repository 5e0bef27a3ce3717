"""`trace(model, inputs)`: which widths a model has, which axes are cut together, and which blocks can leave.

The model is exported (`torch.export`), so that every operation is seen with its shapes and the line of the user's code
that made it; planner.axes sends channel ids through the operations and planner.blocks finds residual blocks.
"""

import hashlib
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from planner.activations import Activation, find_alive
from planner.axes import kind, shape
from planner.blocks import Block, find_blocks, module_path
from planner.evaluation import evaluating
from planner.operations import Choice, Extent, Operation, find_operations
from planner.parallel import unwrapped
from planner.regions import inline, under_autocast
from planner.rules import propagate
from planner.trims import Trim
from planner.widths import Width, extent, find_widths, labels_of
from profiles.errors import PlanError

log = logging.getLogger(__name__)
_MANY_MODULES = 150


@dataclass(frozen=True)
class Graph:
    """What a model is made of, as far as cutting goes; holds no weights."""

    widths: tuple[Width, ...]
    blocks: tuple[Block, ...]
    operations: tuple[Operation, ...]
    fingerprint: str
    inputs: tuple[tuple[tuple[int, ...], str], ...]  # (shape, dtype) of each input
    counted: tuple[tuple[str, Extent], ...] = ()  # modules that divide by the length of an axis that can be cut
    alive: tuple[tuple[Activation, ...], ...] = ()  # the sets of activations that a run holds at once
    casts: bool = False  # whether the model itself computes in another precision than that of its weights
    trims: tuple[Trim, ...] = ()  # what single layers may lose beside the widths, where a plan is offered any

    @cached_property
    def width(self) -> dict[str, Width]:
        """The widths by name."""
        return {width.name: width for width in self.widths}

    @cached_property
    def part(self) -> dict[str, Width | Trim]:
        """The widths and trims by name."""
        return {**self.width, **{trim.name: trim for trim in self.trims}}

    @cached_property
    def trims_of(self) -> dict[str, tuple[Trim, ...]]:
        """The trims by the weight."""
        found: dict[str, tuple[Trim, ...]] = {}
        for trim in self.trims:
            found[trim.groups.tensor] = (*found.get(trim.groups.tensor, ()), trim)
        return found

    @cached_property
    def block(self) -> dict[str, Block]:
        """The residual blocks by name."""
        return {block.name: block for block in self.blocks}

    @cached_property
    def stages(self) -> dict[str, tuple[Block, ...]]:
        """The residual blocks that may leave, by their stages."""
        found: dict[str, tuple[Block, ...]] = {}
        for block in self.blocks:
            if not block.frozen:
                found[block.stage] = (*found.get(block.stage, ()), block)
        return found

    @property
    def dense(self) -> Choice:
        """The choice that keeps everything."""
        return Choice({name: part.size for name, part in self.part.items()}, frozenset())

    @property
    def cuttable(self) -> tuple[Width, ...]:
        """The widths that can be cut."""
        return tuple(width for width in self.widths if width.frozen is None)

    def choice(self, keep: Mapping[str, int], removed: frozenset[str] = frozenset()) -> Choice:
        """Return the choice that keeps `keep` channels of the named widths, and all of the others."""
        return Choice({**self.dense.keep, **keep}, removed)

    def example(self, *, seed: int = 0, more: int = 0) -> tuple[Tensor, ...]:
        """Return random inputs; `more` of them than in those that the model was traced with."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(random_input(shape, dtype, generator, more=more) for shape, dtype in self.inputs)

    def macs(self, choice: Choice) -> int:
        """Return the multiply-accumulates of one run under a choice."""
        return sum(operation.macs(choice) for operation in self.operations)

    def weights(self, choice: Choice) -> int:
        """Return how many weights the operations hold under a choice."""
        return sum(made.weights(inputs, outputs) for made, inputs, outputs in self.under(choice))

    def under(self, choice: Choice, *, strides: bool = False) -> Iterator[tuple[Operation, int, int]]:
        """Yield what is left of the operations under a choice, with their input and output channels.

        With `strides`, as they are in a runtime that moves them, see planner.strides.
        """
        return (own.under(choice, strides=strides) for own in self.operations if own.present(choice))


def trace(
    model: nn.Module, inputs: tuple[Tensor, ...], *, lossy: bool = False, program: ExportedProgram | None = None
) -> Graph:
    """Return the graph of `model` on `inputs`; the model is left as it was.

    With `lossy`, widths that a layer normalisation runs over can be cut too, though not exactly. `program` is what
    `exported` made of the two, if it is at hand.

    Raises PlanError with the operation and the file:line if the model does not run on the inputs or cannot be exported.
    """
    if unwrapped(model) is not model:
        raise PlanError(f"the model is wrapped by {type(model).__name__}; give the model within it")
    program = exported(model, inputs) if program is None else program
    names = _names(program, model)
    inline(program.graph_module)
    nodes = live(program.graph)
    state = propagate(nodes, names, frozenset(name for name, _ in model.named_parameters()), lossy=lossy)
    blocks = find_blocks(nodes, names, model, inputs=program.graph_signature.user_inputs)
    labels = labels_of(state)
    widths = find_widths(state, labels, blocks, frozenset(aliases(model)))
    operations = find_operations(nodes, state, partial(extent, widths, labels), blocks)
    alive = find_alive(nodes, state, partial(extent, widths, labels), blocks)
    log.debug("traced %d operations, %d widths, %d blocks", len(operations), len(widths), len(blocks))
    specs = tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs)
    counted = tuple((module_path(node), extent(widths, labels, units, len(units))) for node, units in state.counted)
    casts = under_autocast(nodes) or any(
        kind(node) in ("to", "_to_copy", "float", "half", "bfloat16") for node in nodes
    )
    return Graph(widths, blocks, operations, _fingerprint(nodes, names, specs), specs, counted, alive, casts)


def random_input(shape: Sequence[int], dtype: str, generator: torch.Generator, *, more: int = 0) -> Tensor:
    """Return a random tensor; integers are 0 or 1, which every vocabulary has, and every mask."""
    size, kind_ = (shape[0] + more, *shape[1:]) if shape else (), getattr(torch, dtype)
    if kind_.is_floating_point:
        return torch.randn(size, generator=generator).to(kind_)
    return torch.randint(2, size, generator=generator).to(kind_)


def exported(model: nn.Module, inputs: tuple[Tensor, ...], *, dynamic: bool = False) -> ExportedProgram:
    """Return the program of `model` in evaluation mode; if `dynamic`, for other sizes of its inputs if it takes them.

    Raises PlanError with the place in the user's code.
    """
    shapes = ", ".join("x".join(map(str, x.shape)) for x in inputs)
    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own workings
        try:
            with torch.no_grad():
                if not any(x.is_meta for x in inputs):  # without data, what a forward asks of them has no answer
                    model(*inputs)
        except Exception as error:
            raise PlanError(f"the model does not run on inputs of shape {shapes}: {_reason(error)}") from error
        # Of many reshapes of many unknown sizes the exporter reasons for minutes: then only the batch may change.
        for dims in ((None, 1) if sum(1 for _ in model.modules()) < _MANY_MODULES else (1,)) if dynamic else ():
            sizes = tuple({axis: Dim.AUTO for axis, size in enumerate(x.shape[:dims]) if size > 1} for x in inputs)
            with suppress(Exception):
                return torch.export.export(model, inputs, dynamic_shapes=sizes, strict=False)
        try:
            return torch.export.export(model, inputs, strict=False)
        except Exception as error:
            raise PlanError(
                f"the model cannot be traced on inputs of shape {shapes}: {_reason(error)}; "
                "torch.export must be able to follow it without data-dependent Python branches"
            ) from error


def live(graph: torch.fx.Graph) -> list[Node]:
    """Return the nodes that the outputs need, and those that write in place, in order."""
    needed: set[Node] = set()
    for node in reversed(graph.nodes):
        name = kind(node)
        writes = node.op == "call_function" and name.endswith("_") and not name.endswith("__")
        if writes or node.op in ("output", "placeholder") or any(user in needed for user in node.users):
            needed.add(node)
    return [node for node in graph.nodes if node in needed]


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of each parameter and buffer, by the first: the one that groups, slices and plans go by."""
    names: dict[int, list[str]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        names.setdefault(id(tensor), []).append(name)
    return {same[0]: same for same in names.values()}


def _names(program: ExportedProgram, model: nn.Module) -> dict[str, str]:
    """Return the parameter or buffer behind each placeholder, by its first name."""
    first = {name: same for same, names in aliases(model).items() for name in names}
    signature = program.graph_signature
    given = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    given |= getattr(signature, "inputs_to_lifted_tensor_constants", {})
    return {placeholder: first.get(name, name) for placeholder, name in given.items()}


def _reason(error: BaseException) -> str:
    """Return the first line of an error with the last place in the user's own code."""
    foreign = (torch.__path__[0], __file__, "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(foreign)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}{where}"


def _fingerprint(nodes: list[Node], names: dict[str, str], inputs: object) -> str:
    """Return a hash of the operations, the parameters' names and shapes, and the inputs: not of weights or devices."""
    lines = []
    for node in nodes:
        options = {key: value for key, value in node.kwargs.items() if key != "device"}
        given = f" {node.args} {options}" if node.op == "call_function" else ""
        lines.append(f"{names.get(node.name, node.op)} {kind(node)} {shape(node)}{given}")
    return hashlib.sha256("\n".join([*lines, str(inputs)]).encode()).hexdigest()[:16]
