"""The dense smaller module of the user's own class: its tensors cut, and what modules say of their sizes put right."""

import copy
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from backends.equivalence import Proof
from backends.shapes import CroppedConv
from planner.blocks import Block, bare_shortcut
from planner.graph import Graph, aliases
from planner.operations import Choice
from profiles.errors import BuildError

Masks = Mapping[tuple[str, int], Tensor]
_MOST_TRIALS = 24


def surgery(model: nn.Module, graph: Graph, masks: Masks, choice: Choice, proof: Proof) -> nn.Module:
    """Return a copy of `model` with what `masks` keep of its tensors and without the blocks that `choice` removes.

    Integer attributes that look like a size which has changed (`num_heads`, `hidden_size`) are changed with it, in the
    combination for which the forward is proven right. Raises BuildError if there is none.
    """
    dense = without(copy.deepcopy(model), [graph.block[name] for name in sorted(choice.removed)])
    names = aliases(model)
    for (tensor, axis), keep in masks.items():
        _select(_owners(dense, names[tensor]), axis, keep)
    for path, extent in graph.counted:
        _recount(dense, path, extent.under(graph.dense) / extent.under(choice))
    first: BuildError | None = None
    found = _sizes(dense, graph, masks)
    for attempt in _subsets(found):
        for module, attribute, _, new in itertools.chain(*(found[key] for key in attempt)):
            setattr(module, attribute, new)
        try:
            proof.check(dense)
            return dense
        except BuildError as error:
            first = first or error
        for module, attribute, old, _ in itertools.chain(*found.values()):
            setattr(module, attribute, old)
    assert first is not None
    raise first


def without(dense: nn.Module, blocks: Sequence[Block]) -> nn.Module:
    """Return `dense` without the bodies of `blocks`; one that lies in the body of another goes with it."""
    by_module = defaultdict(list)
    for block in blocks:
        if not any(block.body < other.body for other in blocks):
            by_module[block.module].append(block)
    for module, own in sorted(by_module.items(), reverse=True):  # inner modules first
        shortcut = bare_shortcut(dense.get_submodule(module), own)
        if not module:
            return shortcut
        dense.set_submodule(module, shortcut)
    return dense


_Key = tuple[type, str]
_Change = tuple[nn.Module, str, int, int]  # module, attribute, old, new


def _sizes(dense: nn.Module, graph: Graph, masks: Masks) -> dict[_Key, list[_Change]]:
    """Return the integer attributes that may be sizes which have changed, by class and name."""
    found: dict[_Key, list[_Change]] = defaultdict(list)
    for path, module in dense.named_modules():
        if isinstance(module, tuple(_SIZES)):
            continue
        ratios = _ratios(path, graph, masks)
        for name, value in vars(module).items():
            if type(value) is not int or value < 2:
                continue
            new = {value * keep // size for size, keep in ratios if value % size == 0 and value * keep % size == 0}
            if len(new - {value}) == 1:
                found[type(module), name].append((module, name, value, (new - {value}).pop()))
    return dict(found)


def _ratios(path: str, graph: Graph, masks: Masks) -> set[tuple[int, int]]:
    """Return (size, size kept) of the axes and widths that were cut in a module, or in those within it."""
    prefix = f"{path}." if path else ""
    ratios = set()
    for (tensor, _), keep in masks.items():
        if tensor.startswith(prefix):
            ratios.add((len(keep), int(keep.sum())))
    for width in graph.widths:
        for piece in width.slices:
            keep_of = masks.get((piece.tensor, piece.axis))
            if keep_of is not None and piece.tensor.startswith(prefix):
                stays = torch.zeros(width.size, dtype=torch.bool)
                own = torch.from_numpy(piece.units)
                stays[own[(own >= 0) & keep_of]] = True
                ratios.add((width.size, int(stays.sum())))
    return {(size, keep) for size, keep in ratios if 0 < keep < size}


_SAYS_SIZE = re.compile(r"head|dim|width|channel|feature|hidden|embed|plane|inner|groups|size")
_SAYS_OTHER = re.compile(r"kernel|patch|window|image|img|vocab|batch|chunk|position|layer|per_|key_value_groups|rep")


def _subsets(found: Mapping[_Key, object]) -> Iterator[frozenset[_Key]]:
    """Return which attributes to change in each trial: those called like sizes, none, all, then the others by size."""
    keys = sorted(found, key=lambda key: (key[0].__name__, key[1]))
    called = frozenset(key for key in keys if _SAYS_SIZE.search(key[1]) and not _SAYS_OTHER.search(key[1]))
    rest = (frozenset(own) for size in range(1, len(keys)) for own in itertools.combinations(keys, size))
    return itertools.islice(
        dict.fromkeys((called, frozenset[_Key](), frozenset(keys), *itertools.islice(rest, _MOST_TRIALS))), _MOST_TRIALS
    )


def _owners(dense: nn.Module, names: Sequence[str]) -> list[tuple[nn.Module, str]]:
    """Return every (module, attribute) that still holds the tensor of these names."""
    modules = dict(dense.named_modules(remove_duplicate=False))
    found = {}
    for path, _, attribute in (name.rpartition(".") for name in names):
        if isinstance(getattr(modules.get(path), attribute, None), Tensor):
            found[id(modules[path]), attribute] = modules[path], attribute
    return list(found.values())


def _select(owners: Sequence[tuple[nn.Module, str]], axis: int, keep: Tensor) -> None:
    """Keep these elements of an axis of one tensor, wherever it is held."""
    if not owners:  # it left with a block
        return
    old = getattr(*owners[0])
    new = old.detach().index_select(axis, keep.nonzero().flatten().to(old.device)).contiguous()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module, attribute in owners:
        setattr(module, attribute, new)
        _resize(module, attribute, axis, old.shape[axis], new.shape[axis])


# What a module says about its own sizes, by the axis of its weight that they follow.
_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.modules.conv._ConvTransposeNd: ("in_channels", "out_channels"),
    nn.modules.conv._ConvNd: ("out_channels", "in_channels"),
    CroppedConv: ("out_channels", "in_channels"),
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.PReLU: ("num_parameters",),
    nn.modules.batchnorm._NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels",),
    nn.LayerNorm: ("normalized_shape",),
    nn.RMSNorm: ("normalized_shape",),
    nn.RNNBase: ("hidden_size", "input_size"),
    nn.RNNCellBase: ("hidden_size", "input_size"),
}


def _resize(module: nn.Module, attribute: str, axis: int, before: int, after: int) -> None:
    names = next((sizes for kind, sizes in _SIZES.items() if isinstance(module, kind)), ())
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        if axis == 1 and (attribute.endswith("_l0") or isinstance(module, nn.RNNCellBase)):
            setattr(module, names[0] if attribute.startswith("weight_hh") else names[1], after)
        return
    counts = attribute == "running_mean" and isinstance(module, nn.modules.batchnorm._NormBase)
    if attribute != "weight" and not counts:
        return
    if axis < len(names):
        value = (*getattr(module, names[axis])[:-1], after) if names[0] == "normalized_shape" else after
        setattr(module, names[axis], value)
    if isinstance(module, nn.GroupNorm):
        module.num_groups = max(1, module.num_groups * after // before)
    elif axis == 0 and isinstance(module, nn.modules.conv._ConvNd | CroppedConv) and module.groups > 1:  # whole ones go
        module.groups = module.groups * after // before
        other = "out_channels" if isinstance(module, nn.modules.conv._ConvTransposeNd) else "in_channels"
        setattr(module, other, module.groups * module.weight.shape[1])


def _recount(dense: nn.Module, path: str, share: float) -> None:
    """Correct a root-mean-square normalisation for the channels that left: scale times √(n/n'), epsilon times n/n'."""
    module = dict(dense.named_modules()).get(path)
    if module is None or share == 1:
        return
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.mul_(share**0.5)
    for name, value in vars(module).items():
        if type(value) is float and 0 < value < 1e-2:
            setattr(module, name, value * share)
    if isinstance(module, nn.RMSNorm) and module.eps is None:
        module.eps = torch.finfo(next(dense.parameters()).dtype).eps * share
