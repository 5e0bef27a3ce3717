"""`trace(model, inputs)`: which widths a model has, which axes are cut together, and which blocks can leave.

The model is exported (`torch.export`), so that every operation is seen with its shapes and the line of the user's code
that made it; planner.axes sends channel ids through the operations and planner.blocks finds residual blocks.
"""

import hashlib
import logging
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from planner.axes import Ids, Propagation, Slice, kind, shape
from planner.blocks import Block, find_blocks, module_path
from planner.evaluation import evaluating
from planner.operations import Choice, Extent, Operation, find_operations
from planner.parallel import unwrapped
from planner.rules import propagate
from profiles.errors import PlanError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Width:
    """A number of channels (or features) that can be cut: `size` groups, each owning slices of several parameters."""

    name: str  # the module that makes it
    size: int
    slices: tuple[Slice, ...]  # units are group numbers 0..size-1 of this width, -1 elsewhere
    frozen: str | None  # why it cannot be cut
    makers: tuple[str, ...]  # every module whose outputs are tied in it
    block: str | None  # the residual block that it lies in wholly

    @property
    def is_stream(self) -> bool:
        """Whether several producers are tied in it, as in the stream of a residual network."""
        return len(self.makers) > 1


@dataclass(frozen=True)
class Graph:
    """What a model is made of, as far as cutting goes; holds no weights."""

    widths: tuple[Width, ...]
    blocks: tuple[Block, ...]
    operations: tuple[Operation, ...]
    fingerprint: str
    inputs: tuple[tuple[tuple[int, ...], str], ...]  # (shape, dtype) of each input

    @cached_property
    def width(self) -> dict[str, Width]:
        """The widths by name."""
        return {width.name: width for width in self.widths}

    @cached_property
    def block(self) -> dict[str, Block]:
        """The residual blocks by name."""
        return {block.name: block for block in self.blocks}

    @property
    def dense(self) -> Choice:
        """The choice that keeps everything."""
        return Choice({width.name: width.size for width in self.widths}, frozenset())

    @property
    def cuttable(self) -> tuple[Width, ...]:
        """The widths that can be cut."""
        return tuple(width for width in self.widths if width.frozen is None)

    def choice(self, keep: Mapping[str, int], removed: frozenset[str] = frozenset()) -> Choice:
        """Return the choice that keeps `keep` channels of the named widths, and all of the others."""
        return Choice({**self.dense.keep, **keep}, removed)

    def macs(self, choice: Choice) -> int:
        """Return the multiply-accumulates of one run under a choice."""
        return sum(operation.macs(choice) for operation in self.operations)


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Graph:
    """Return the graph of `model` on `inputs`; the model is left as it was.

    Raises PlanError with the operation and the file:line if the model does not run on the inputs or cannot be exported.
    """
    if unwrapped(model) is not model:
        raise PlanError(f"the model is wrapped by {type(model).__name__}; give the model within it")
    program = _export(model, inputs)
    names = _names(program, model)
    nodes = list(program.graph.nodes)
    state = propagate(nodes, names, frozenset(name for name, _ in model.named_parameters()))
    blocks = find_blocks(nodes, names, model, inputs=program.graph_signature.user_inputs)
    groups, members = _components(state)
    widths = _widths(state, groups, members, blocks)
    operations = find_operations(nodes, state, partial(_extent, widths, members), blocks)
    log.debug("traced %d operations, %d widths, %d blocks", len(operations), len(widths), len(blocks))
    specs = tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs)
    return Graph(widths, blocks, operations, _fingerprint(nodes, names, specs), specs)


def _export(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    shapes = ", ".join("x".join(map(str, x.shape)) for x in inputs)
    with evaluating(model):
        try:
            with torch.no_grad():
                model(*inputs)
        except Exception as error:
            raise PlanError(f"the model does not run on inputs of shape {shapes}: {_reason(error)}") from error
        try:
            return torch.export.export(model, inputs, strict=False)
        except Exception as error:
            raise PlanError(
                f"the model cannot be traced on inputs of shape {shapes}: {_reason(error)}; "
                "torch.export must be able to follow it without data-dependent Python branches"
            ) from error


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
    given = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    return {placeholder: first.get(name, name) for placeholder, name in given.items()}


def _reason(error: BaseException) -> str:
    """Return the first line of an error with the last place in the user's own code."""
    foreign = (torch.__path__[0], __file__, "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(foreign)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}{where}"


def _components(state: Propagation) -> tuple[Ids, Ids]:
    """Return for each unit its group (units tied together) and its width (groups of common producers)."""

    def label(pairs: list[Ids]) -> Ids:
        left, right = np.concatenate([np.zeros((2, 0), np.int64), *pairs], axis=1)
        links = coo_array((np.ones(len(left)), (left, right)), shape=(state.count, state.count))
        labels: Ids = connected_components(links, directed=False)[1].astype(np.int64)
        return labels

    return label(state.ties), label(state.ties + state.siblings)


def _widths(state: Propagation, groups: Ids, members: Ids, blocks: tuple[Block, ...]) -> tuple[Width, ...]:
    """Number the groups of each width 0.. in order of their first unit, and give each width its slices."""
    frozen: dict[int, str] = {}
    for units, reason in state.frozen:
        for label in np.unique(members[units]):
            frozen.setdefault(int(label), reason)
    widths: list[Width] = []
    names: Counter[str] = Counter()
    for label in range(members.max(initial=-1) + 1):
        inside = members == label
        makers = [node for units, node in state.makers if inside[units[0]]]
        kept, first = np.unique(groups[inside], return_index=True)
        number = np.full(groups.max() + 1, -1)
        number[kept[np.argsort(first)]] = np.arange(len(kept))
        of_unit = np.append(np.where(inside, number[groups], -1), -1)  # the last entry serves units of -1
        slices = [Slice(s.tensor, s.axis, of_unit[s.units], s.penalised) for s in state.slices]
        paths = [module_path(node) or node.name for node in makers]
        owned = tuple(s for s in slices if (s.units >= 0).any())
        names[paths[0]] += 1
        name = paths[0] if names[paths[0]] == 1 else f"{paths[0]}#{names[paths[0]]}"
        block = next((b.name for b in blocks if all(node.name in b.body for node in makers)), None)
        why = frozen.get(label) or _uneven(owned, len(kept))
        widths.append(Width(name, len(kept), owned, why, tuple(paths), block))
    return tuple(widths)


def _uneven(slices: tuple[Slice, ...], size: int) -> str | None:
    """Return why the number of channels kept would not say how long every axis becomes, or None."""
    for piece in slices:
        counts = np.bincount(piece.units[piece.units >= 0], minlength=size)
        if counts.min() != counts.max():
            return f"only some of its channels reach {piece.tensor}"
    return None


def _extent(widths: tuple[Width, ...], members: Ids, units: Ids | None, size: int) -> Extent:
    """Return the length of an axis with these units as a function of the widths that can be cut."""
    if units is None:
        return Extent(size, ())
    labels, counts = np.unique(members[units[units >= 0]], return_counts=True)
    cut = [(widths[i], int(n) // widths[i].size) for i, n in zip(labels, counts, strict=True) if not widths[i].frozen]
    fixed = size - sum(times * width.size for width, times in cut)
    return Extent(fixed, tuple((width.name, times) for width, times in cut))


def _fingerprint(nodes: list[Node], names: dict[str, str], inputs: object) -> str:
    """Return a hash of the operations, the parameters' names and shapes, and the inputs: not of weights or devices."""
    lines = []
    for node in nodes:
        options = {key: value for key, value in node.kwargs.items() if key != "device"}
        given = f" {node.args} {options}" if node.op == "call_function" else ""
        lines.append(f"{names.get(node.name, node.op)} {kind(node)} {shape(node)}{given}")
    return hashlib.sha256("\n".join([*lines, str(inputs)]).encode()).hexdigest()[:16]
