"""`trace(model, inputs)`: which widths a model has, which axes are cut together, and which blocks can leave.

The model is exported (`torch.export`), so that every operation is seen with its shapes and the line of the user's code
that made it; planner.axes sends channel ids through the operations and planner.blocks finds residual blocks.
"""

import hashlib
import logging
import traceback
import warnings
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from planner.axes import Ids, Propagation, Slice, kind, place, shape
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
    ties: tuple[str, ...] = ()  # the operations that tie its parts, with file:line
    lossy: str | None = None  # why removing its channels changes the output although their weights are zero

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
    counted: tuple[tuple[str, Extent], ...] = ()  # modules that divide by the length of an axis that can be cut
    casts: bool = False  # whether the model itself computes in another precision than that of its weights

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

    def example(self, *, seed: int = 0, more: int = 0) -> tuple[Tensor, ...]:
        """Return random inputs; `more` of them than in those that the model was traced with."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(random_input(shape, dtype, generator, more=more) for shape, dtype in self.inputs)

    def macs(self, choice: Choice) -> int:
        """Return the multiply-accumulates of one run under a choice."""
        return sum(operation.macs(choice) for operation in self.operations)


def trace(model: nn.Module, inputs: tuple[Tensor, ...], *, lossy: bool = False) -> Graph:
    """Return the graph of `model` on `inputs`; the model is left as it was.

    With `lossy`, widths that a layer normalisation runs over can be cut too, though not exactly.

    Raises PlanError with the operation and the file:line if the model does not run on the inputs or cannot be exported.
    """
    if unwrapped(model) is not model:
        raise PlanError(f"the model is wrapped by {type(model).__name__}; give the model within it")
    program = exported(model, inputs)
    names = _names(program, model)
    nodes = live(program.graph)
    state = propagate(nodes, names, frozenset(name for name, _ in model.named_parameters()), lossy=lossy)
    blocks = find_blocks(nodes, names, model, inputs=program.graph_signature.user_inputs)
    labels = _labels(state)
    widths = _widths(state, labels, blocks, frozenset(aliases(model)))
    operations = find_operations(nodes, state, partial(_extent, widths, labels), blocks)
    log.debug("traced %d operations, %d widths, %d blocks", len(operations), len(widths), len(blocks))
    specs = tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs)
    counted = tuple((module_path(node), _extent(widths, labels, units, len(units))) for node, units in state.counted)
    casts = any(kind(node) in ("to", "_to_copy", "float", "half", "bfloat16") for node in nodes)
    return Graph(widths, blocks, operations, _fingerprint(nodes, names, specs), specs, counted, casts)


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
                model(*inputs)
        except Exception as error:
            raise PlanError(f"the model does not run on inputs of shape {shapes}: {_reason(error)}") from error
        for dims in (None, 1) if dynamic else ():
            sizes = tuple(dict.fromkeys(range(x.dim())[:dims], Dim.AUTO) for x in inputs)
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


@dataclass(frozen=True)
class _Labels:
    """What every unit belongs to."""

    group: Ids  # (units,) units tied together
    width: Ids  # (groups,) the width that each group is a channel of, -1 if of none
    number: Ids  # (groups,) its number there


def _label(state: Propagation, pairs: list[Ids]) -> Ids:
    left, right = np.concatenate([np.zeros((2, 0), np.int64), *pairs], axis=1)
    links = coo_array((np.ones(len(left)), (left, right)), shape=(state.count, state.count))
    labels: Ids = connected_components(links, directed=False)[1].astype(np.int64)
    return labels


def components(state: Propagation) -> Ids:
    """Return the group of every unit: units that are tied together."""
    return _label(state, state.ties)


def _labels(state: Propagation) -> _Labels:
    """Number the groups, and the widths: groups of common producers that appear equally often everywhere."""
    group = components(state)
    count = int(group.max(initial=-1)) + 1
    if not count:
        return _Labels(group, np.zeros(0, np.int64), np.zeros(0, np.int64))
    producer = np.zeros(count, np.int64)
    producer[group] = _label(state, state.ties + state.siblings)
    made = np.zeros(count, bool)
    for units, _ in state.makers:
        made[group[units]] = True
    frozen = np.zeros(count, bool)
    for units, _ in state.frozen:
        frozen[group[units]] = True
    dice, appears = np.random.default_rng(0), np.zeros(count, np.uint64)  # a hash of how often it appears in each leaf
    for units in state.leaves.values():
        appears += np.bincount(group[units], minlength=count).astype(np.uint64) * dice.integers(
            1, 2**63, dtype=np.uint64
        )
    first = np.full(count, state.count)
    np.minimum.at(first, group, np.arange(state.count))
    order = np.argsort(first)[made[np.argsort(first)]]  # by the first unit
    keys = np.stack([producer.astype(np.uint64), frozen.astype(np.uint64), appears], axis=1)[order]
    _, start, of_key = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(start), np.int64)
    rank[np.argsort(start)] = np.arange(len(start))
    width, number = np.full(count, -1), np.full(count, -1)
    width[order] = rank[of_key.reshape(-1)]
    sort = np.argsort(width[order], kind="stable")
    sizes = np.bincount(width[order], minlength=len(start))
    number[order[sort]] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return _Labels(group, width, number)


def _widths(state: Propagation, labels: _Labels, blocks: tuple[Block, ...], owned: Container[str]) -> tuple[Width, ...]:
    """Give each width its slices of the tensors `owned`, its makers, and why it cannot be cut."""
    sizes = np.bincount(labels.width[labels.width >= 0])
    of_unit = labels.width[labels.group]
    slices: list[list[Slice]] = [[] for _ in sizes]
    makers: list[list[Node]] = [[] for _ in sizes]
    ties: list[list[str]] = [[] for _ in sizes]
    for (tensor, axis), units in state.leaves.items():
        inside = of_unit[units]
        for width in np.unique(inside[inside >= 0]) if tensor in owned else ():
            numbers = np.where(inside == width, labels.number[labels.group[units]], -1)
            slices[width].append(Slice(tensor, axis, numbers, (tensor, axis) in state.penalised))
    for units, node in state.makers:
        for width in np.unique(of_unit[units]):
            makers[width].append(node)
    for pairs, tie in zip(state.ties, state.tied_at, strict=True):
        for width in np.unique(of_unit[pairs[0]]):
            if width >= 0 and tie is not None:
                ties[width].append(place(tie))
    reasons: dict[int, str] = {}
    lossy: dict[int, str] = {}
    for found, listed in ((reasons, state.frozen), (lossy, state.inexact)):
        for units, reason in listed:
            for width in np.unique(of_unit[units]):
                found.setdefault(int(width), reason)
    names = _width_names(makers)
    return tuple(
        Width(
            name=names[i],
            size=int(size),
            slices=tuple(slices[i]),
            frozen=reasons.get(i) or ("all its channels are one group" if size == 1 else None),
            makers=tuple(module_path(node) or node.name for node in makers[i]),
            block=next((b.name for b in blocks if all(node.name in b.body for node in makers[i])), None),
            ties=tuple(dict.fromkeys(ties[i])),
            lossy=lossy.get(i),
        )
        for i, size in enumerate(sizes)
    )


def _width_names(makers: Sequence[Sequence[Node]]) -> list[str]:
    """Name each width by its first maker, with a number where one makes several."""
    names, counts = [], Counter[str]()
    for nodes in makers:
        path = module_path(nodes[0]) or nodes[0].name
        counts[path] += 1
        names.append(path if counts[path] == 1 else f"{path}#{counts[path]}")
    return names


def _extent(widths: tuple[Width, ...], labels: _Labels, units: Ids | None, size: int) -> Extent:
    """Return the length of an axis with these units as a function of the widths that can be cut."""
    if units is None:
        return Extent(size, ())
    inside = labels.width[labels.group[units]]
    found, counts = np.unique(inside[inside >= 0], return_counts=True)
    cut = [
        (widths[i], round(int(n) / widths[i].size)) for i, n in zip(found, counts, strict=True) if not widths[i].frozen
    ]
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
