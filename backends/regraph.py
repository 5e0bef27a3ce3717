"""The dense smaller module as a graph: the exported program, every size and position written in it put right.

For models whose own forward hard-codes sizes. The graph trains (dropout and batch normalisation follow `.train()`),
keeps the names of parameters and buffers, and takes other batch sizes where the program does.
"""

import copy
import logging
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from backends.editor import Editor, Mask
from planner.axes import Propagation, kind
from planner.blocks import Block, find_blocks
from planner.graph import aliases, exported, live
from planner.regions import inline, under_autocast
from planner.rules import propagate
from planner.widths import components
from profiles.errors import BuildError, PlanError

log = logging.getLogger(__name__)
_ZERO_OR_ONE = re.compile(r"(!= [01]|> [01]|>= [12])$|^[01] < ")
Masks = Mapping[tuple[str, int], Mask]  # (parameter or buffer, axis) -> which elements stay


class Rewritten(GraphModule):
    """A graph that was put right; copies keep what was recorded on it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rewritten":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's own use of its tree specifications
            copied = super().__deepcopy__(memo)
        assert isinstance(copied, Rewritten)
        copied.__dict__.update({name: value for name, value in vars(self).items() if name.startswith("espalier_")})
        return copied


def regraph(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    masks: Masks,
    removed: Collection[Block],
    *,
    program: Callable[[], ExportedProgram] | None = None,
) -> Rewritten:
    """Return `model` with only the elements `masks` of its parameters and buffers and without the blocks `removed`.

    Raises BuildError, naming the operation and its place, where the elements that stay do not form a tensor.
    """
    module = (resizable(model, inputs) if program is None else program()).module()
    inline(module)
    if under_autocast(module.graph.nodes):
        raise BuildError("a part of the forward runs under torch.autocast, which an exported graph cannot keep")
    first = {name: same for same, names in aliases(model).items() for name in names}
    names = {n.name: first.get(str(n.target), str(n.target)) for n in module.graph.nodes if n.op == "get_attr"}
    learned = dict(model.named_parameters(remove_duplicate=False))  # a graph may go by another of its names
    nodes = live(module.graph)
    state = propagate(nodes, names, frozenset(learned), lossy=True)
    for node in nodes:
        state.of(node)  # what no operation asked for gets its units now
    _without_blocks(module, nodes, names, model, removed)
    editor = Editor(module, state, _kept(state, masks))
    for node in nodes:
        editor.visit(node)
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output", "call_module"))
    for node in module.graph.nodes:
        if kind(node) == "lift_fresh_copy":  # ONNX has no such operation
            node.target = torch.ops.aten.clone.default
    _follow_training(module.graph)
    _follow_weights(module)
    smaller = copy.deepcopy(Rewritten(module, module.graph))  # what is not cut is still the original's
    for name, own in smaller.named_parameters():
        own.requires_grad_(learned[first[name]].requires_grad)
    return smaller.train(model.training)


def resizable(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Return the program of `model`, which checks the sizes of its inputs where it is right for some alone."""
    several = tuple(torch.cat([x, x]) if x.dim() and len(x) == 1 else x for x in inputs)  # a 1 is taken for a constant
    try:
        program = exported(model, several, dynamic=True)
    except PlanError:
        program = exported(model, inputs, dynamic=True)
    # That a size is not 0 or 1 is assumed everywhere, and needed nowhere: broadcasting works for 1 too.
    program._guards_code = [said for said in program._guards_code if not _ZERO_OR_ONE.search(said)]
    return program


def _kept(state: Propagation, masks: Masks) -> Mask:
    """Return for every unit whether it stays: not if any that it is tied to goes."""
    group = components(state)
    goes = np.zeros(int(group.max(initial=-1)) + 1, bool)
    for leaf, units in state.leaves.items():
        if leaf in masks:
            goes[group[units[~masks[leaf]]]] = True
    return ~goes[group]


def _without_blocks(
    module: GraphModule, nodes: Sequence[Node], names: dict[str, str], model: nn.Module, removed: Collection[Block]
) -> None:
    """Put the shortcut in the place of the sum that ends each removed block."""
    if not removed:
        return
    inputs = [node.name for node in nodes if node.op == "placeholder"]
    leave = {block.last for block in removed}  # a graph of other sizes may hold more blocks, and name them otherwise
    for block in find_blocks(nodes, names, model, inputs=inputs):
        if block.last in leave:
            add = next(node for node in nodes if node.name == block.add)
            (shortcut,) = [source for source in add.all_input_nodes if source.name not in block.body]
            add.replace_all_uses_with(shortcut)


def _follow_training(graph: torch.fx.Graph) -> None:
    """Make dropout and batch normalisation do what `.train()` and `.eval()` say."""
    for node in list(graph.nodes):
        name = kind(node) if node.op == "call_function" else ""
        at = {"batch_norm": 5, "dropout": 2, "feature_dropout": 2, "alpha_dropout": 2}.get(name.rstrip("_"))
        if at is None or len(node.args) <= at or not isinstance(node.args[at], bool):
            continue
        if name == "batch_norm" and node.args[3] is None:  # it keeps no statistics
            continue
        with graph.inserting_before(node):
            mode = graph.create_node("get_attr", "training")
        node.update_arg(at, mode)


_BLANK = {
    "zeros": torch.ops.aten.new_zeros.default,
    "ones": torch.ops.aten.new_ones.default,
    "full": torch.ops.aten.new_full.default,
}


def _follow_weights(module: GraphModule) -> None:
    """Make blank tensors of the weights' precision and device, such as a first state, follow `.to()` as weights do."""
    weights = dict(module.named_parameters())
    learned = [node for node in module.graph.nodes if node.op == "get_attr" and str(node.target) in weights]
    for node in list(module.graph.nodes) if learned else ():
        made = _BLANK.get(kind(node)) if node.op == "call_function" else None
        if made is not None and node.meta["val"].dtype == weights[str(learned[0].target)].dtype:
            with module.graph.inserting_before(node):
                weight = module.graph.get_attr(str(learned[0].target))
                blank = module.graph.call_function(made, (weight, *node.args))
            node.replace_all_uses_with(blank)
            module.graph.erase_node(node)
