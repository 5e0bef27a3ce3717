"""Prune networks with torch-pruning, and check that each still computes what was asked for.

    python tools/zoo_baseline.py tests.zoo:ZOO tests.zoo.public:PUBLIC [--ratio 0.5] [--json]

Every argument names a mapping of nets, each with `name`, `feature`, `build()` and `inputs(variant)`. torch-pruning
chooses the channels; the same channels are zeroed in a second copy: in every layer, normalisation and parameter whose
output it says it prunes. Cutting zeros out must not change a function, so both copies are compared on random inputs. It
is used as its documentation says: the layers that make the outputs are ignored, numbers of heads are given, both
documented ways to prune attention are tried and the better one counts, and the size attributes of attention modules
are set afterwards. A norm over channels divides by statistics of what is left, so a net with one cannot stay the same:
where that alone makes the difference, the table says so. Every attempt has a limit of time, as some never end.
"""

import copy
import importlib
import json
import logging
import math
import multiprocessing
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

TOLERANCE = 1e-3  # of the largest output
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
KINDS = ("right", "norms", "wrong", "raised")
# How attention modules call their layers and numbers, by which a user finds them for `num_heads`.
QUERIES = ("q", "query", "q_proj", "to_q", "q_lin", "query_proj")
KEYS_VALUES = ("k", "v", "key", "value", "k_proj", "v_proj", "k_lin", "v_lin", "key_proj", "value_proj")
FUSED = ("qkv", "to_qkv", "qkv_proj", "query_key_value", "Wqkv", "c_attn")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
HEAD_SIZES = ("head_dim", "attention_head_size", "d_kv", "dim_head", "key_value_proj_dim")
ALL_SIZES = ("all_head_size", "inner_dim", "embed_dim")


class Inputs(Protocol):
    """Makes the random inputs of a variant."""

    def __call__(self, variant: int = 0) -> tuple[Tensor, ...]: ...


class Net(Protocol):
    """What a zoo holds."""

    @property
    def name(self) -> str: ...
    @property
    def feature(self) -> str: ...
    @property
    def inputs(self) -> Inputs: ...
    def build(self) -> nn.Module: ...


@dataclass(frozen=True)
class Outcome:
    """`kind` is one of KINDS, best first; `kept` is the share of the weights that are left."""

    kind: str
    detail: str = ""
    kept: float = 1.0

    def __str__(self) -> str:
        match self.kind:
            case "right":
                return "right"
            case "norms":
                return f"wrong: {self.detail}, by the statistics of norms alone"
            case kind:
                return f"{kind}: {self.detail}"


@dataclass(frozen=True)
class Attention:
    """An attention module, its projections, and its heads."""

    module: nn.Module
    query: nn.Module
    others: tuple[nn.Module, ...]
    heads: int
    key_heads: int
    fused: bool


@dataclass(frozen=True)
class Mask:
    """Zeroes in `model` the channels that are pruned elsewhere; `alive` are those left of each layer, by old number."""

    model: nn.Module
    alive: dict[str, list[int]] = field(default_factory=dict)

    def zero_(self, name: str, positions: Iterable[int], *, width: int, dim: int) -> None:
        """Zero the channels at `positions` among those alive of the layer or parameter `name`."""
        alive = self.alive.setdefault(name, list(range(width)))
        gone = {alive[i] for i in positions if i < len(alive)}
        self.alive[name] = [i for i in alive if i not in gone]
        owner, _, last = name.rpartition(".")
        target = getattr(self.model.get_submodule(owner), last) if name else self.model
        if isinstance(target, nn.Module):
            _zero_layer_(target, sorted(gone))
        else:
            target.index_fill_(dim, torch.tensor(sorted(gone), dtype=torch.long), 0.0)


def torch_pruning_result(net: Net, ratio: float) -> str:
    """Return `right`, `wrong: <difference>` or `raised: <reason>`."""
    return str(outcome(net, ratio))


def outcome(net: Net, ratio: float, *, limit_s: float = 10.0) -> Outcome:
    """Return the best outcome over the documented ways to prune: head sizes, and, with attention, whole heads."""
    ways: list[dict[str, Any]] = [{}]
    if attentions(net.build()):
        ways.append({"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": ratio})
    outcomes = (limited(net, ratio, way, limit_s=limit_s) for way in ways)
    return min(outcomes, key=lambda o: (KINDS.index(o.kind), o.kept))


def limited(net: Net, ratio: float, way: Mapping[str, Any], *, limit_s: float) -> Outcome:
    """Return the outcome of an attempt in a process of its own, which may take so many seconds of a processor."""
    context = multiprocessing.get_context("fork")  # nets are closures, which only a fork carries over
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit_s),) * 2)
        sender.send_bytes(json.dumps(asdict(attempt(net, ratio, way))).encode())

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        with suppress(EOFError):  # it was stopped at its limit
            if receiver.poll(6 * limit_s):  # a busy machine
                return Outcome(**json.loads(receiver.recv_bytes()))
        return Outcome("raised", f"no end in {limit_s:g} s")
    finally:
        process.kill()
        process.join()


def attempt(net: Net, ratio: float, way: Mapping[str, Any]) -> Outcome:
    """Prune, and compare with the masked copy."""
    model, mask = net.build(), Mask(net.build())
    dense = sum(p.numel() for p in model.parameters())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prune_(model, mask, net.inputs(), ratio, way)
        kept = sum(p.numel() for p in model.parameters()) / dense
        if kept == 1.0:
            return Outcome("wrong", "nothing pruned")
        found = outputs(model, net)
    except Exception as error:
        text = " ".join(str(error).split())
        return Outcome("raised", f"{type(error).__name__}: {text[:120]}".rstrip(": "))
    expected = outputs(mask.model, net)
    shapes = [(tuple(a.shape), tuple(b.shape)) for a, b in zip(found, expected, strict=True) if a.shape != b.shape]
    if shapes:
        return Outcome("wrong", "output {}, not {}".format(*shapes[0]), kept)
    error_of_all = difference(found, expected)
    if error_of_all <= TOLERANCE:
        return Outcome("right", "", kept)
    normalise_alive_(mask)
    kind = "norms" if difference(found, outputs(mask.model, net)) <= TOLERANCE else "wrong"
    return Outcome(kind, f"{error_of_all:.2g}", kept)


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest value of its output."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)


def normalise_alive_(mask: Mask) -> None:
    """Let every norm over channels of the masked model normalise the channels that are alive."""
    for name, module in mask.model.named_modules():
        own = [name, *(f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False))]
        alive = next((mask.alive[key] for key in own if key in mask.alive), None)
        if alive is not None and "Norm" in type(module).__name__ and not isinstance(module, PER_CHANNEL):
            module.register_forward_hook(_normalised(module, alive))


def _normalised(norm: nn.Module, alive: list[int]) -> Callable[..., Tensor]:
    small, index = copy.deepcopy(norm), torch.tensor(alive)
    width = max((p.shape[-1] for p in norm.parameters()), default=len(alive))
    for name, parameter in list(small.named_parameters(recurse=False)):
        setattr(small, name, nn.Parameter(parameter.index_select(-1, index)))
    if isinstance(small, nn.GroupNorm):
        small.num_channels = len(alive)
    elif isinstance(small, nn.LayerNorm | nn.RMSNorm):
        small.normalized_shape = (len(alive),)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        first = isinstance(norm, nn.GroupNorm) or getattr(norm, "data_format", "") == "channels_first"
        dim = 1 if first or x.shape[-1] != width else -1
        return torch.zeros_like(output).index_copy(dim, index, small(x.index_select(dim, index)))

    return hook


def prune_(model: nn.Module, mask: Mask, inputs: tuple[Tensor, ...], ratio: float, way: Mapping[str, Any]) -> None:
    """Prune `model` with torch-pruning, and zero in the mask what it says it prunes."""
    import torch_pruning  # a test extra

    logging.getLogger("torch_pruning").setLevel(logging.ERROR)
    found = attentions(model)
    num_heads = {a.query: a.heads for a in found} | {layer: a.key_heads for a in found for layer in a.others}
    fused_gates = {m: 2 for name, m in model.named_modules() if name.endswith("gate_up_proj")}
    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=output_layers(model, inputs),
        num_heads=num_heads,
        in_channel_groups={},  # its defaults are dictionaries that all pruners would share
        out_channel_groups=fused_gates,
        **way,
    )
    for group in pruner.step(interactive=True):
        with torch.no_grad():
            record_(mask, model, pruner.DG, group)
        group.prune()
    for attention in found:
        resize_(attention, pruner.num_heads)


def record_(mask: Mask, model: nn.Module, graph: Any, group: Any) -> None:
    """Zero in the mask the outputs of every layer and parameter in the group."""
    names: dict[int, str] = {id(m): name for name, m in model.named_modules(remove_duplicate=False)}
    names |= {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    for dependency, positions in group:
        target = dependency.target.module
        if id(target) not in names or not graph.is_out_channel_pruning_fn(dependency.handler):
            continue
        width = graph.get_out_channels(dependency.target)
        dim = dependency.target.pruning_dim if isinstance(target, nn.Parameter) else 0
        if width is not None:
            plain = [int(getattr(position, "idx", position)) for position in positions]
            mask.zero_(names[id(target)], plain, width=width, dim=dim)


def _zero_layer_(layer: nn.Module, channels: list[int]) -> None:
    """Zero the weights so that these channels of the layer's output are 0 where its input is."""
    parameters: list[tuple[Tensor | None, int]] = []
    rows = channels
    match layer:
        case nn.modules.conv._ConvTransposeNd() if layer.groups > 1:
            width, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
            for c in channels:
                layer.weight[c // width * inputs : (c // width + 1) * inputs, c % width] = 0
            parameters = [(layer.bias, 0)]
        case nn.modules.conv._ConvNd():
            parameters = [(layer.weight, int(layer.transposed)), (layer.bias, 0)]
        case nn.Linear():
            parameters = [(layer.weight, 0), (layer.bias, 0)]
        case nn.Embedding():
            parameters = [(layer.weight, 1)]
        case nn.modules.batchnorm._BatchNorm() if not layer.affine:
            parameters = [(layer.running_mean, 0)]
        case nn.LayerNorm():
            parameters = [(layer.weight, -1), (layer.bias, -1)]
        case _ if isinstance(layer, (*PER_CHANNEL, nn.GroupNorm)):
            parameters = [(layer.weight, 0), (layer.bias, 0)]
        case nn.LSTM():
            rows = [gate * layer.hidden_size + c for gate in range(4) for c in channels]
            parameters = [(p, 0) for p in layer.parameters()]
        case nn.MultiheadAttention():
            rows = [part * layer.embed_dim + c for part in range(3) for c in channels]
            for parameter in (layer.in_proj_weight, layer.in_proj_bias):
                parameter.index_fill_(0, torch.tensor(rows, dtype=torch.long), 0.0)
            rows, parameters = channels, [(layer.out_proj.weight, 0), (layer.out_proj.bias, 0)]
    for tensor, dim in parameters:
        if tensor is not None:
            tensor.index_fill_(dim, torch.tensor(rows, dtype=torch.long), 0.0)


def attentions(model: nn.Module) -> list[Attention]:
    """Return the attention modules that their layers' names give away."""
    return [found for module in model.modules() if (found := _attention(module)) is not None]


def _attention(module: nn.Module) -> Attention | None:
    layers = {name: layer for name, layer in module.named_children() if isinstance(layer, nn.Linear)}
    fused = next((layers[name] for name in FUSED if name in layers), None)
    query = fused or next((layers[name] for name in QUERIES if name in layers), None)
    heads = _number(module, HEADS)
    if query is None or heads is None:
        return None
    others = () if fused else tuple(layers[name] for name in KEYS_VALUES if name in layers)
    return Attention(module, query, others, heads, _number(module, KEY_HEADS) or heads, fused is not None)


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    owners = (module, getattr(module, "config", None))
    values = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def resize_(attention: Attention, num_heads: Mapping[nn.Module, int]) -> None:
    """Set the sizes that an attention module wrote down, as torch-pruning's examples do after pruning."""
    module = attention.module
    heads = num_heads[attention.query]
    key_heads = min((num_heads[layer] for layer in attention.others), default=heads)
    size = int(getattr(attention.query, "out_features", 0)) // (3 if attention.fused else 1)
    groups = heads // max(key_heads, 1)
    new = dict.fromkeys(HEADS, heads) | dict.fromkeys(KEY_HEADS, key_heads) | {"num_key_value_groups": groups}
    new |= dict.fromkeys(HEAD_SIZES, size // max(heads, 1)) | dict.fromkeys(ALL_SIZES, size)
    for name, value in new.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)


def output_layers(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[nn.Module]:
    """Return the layers from which an output is reached without another layer between: their widths must stay."""
    owner: dict[Any, nn.Module] = {}

    def remember(module: nn.Module, _: object, output: object) -> None:
        owner.update({tensor.grad_fn: module for tensor in flat(output)})

    hooks = [module.register_forward_hook(remember) for module in model.modules() if isinstance(module, LAYERS)]
    stack = [tensor.grad_fn for tensor in flat(model(*inputs))]
    for hook in hooks:
        hook.remove()
    seen: set[Any] = {None}
    found: list[nn.Module] = []
    while stack:
        function = stack.pop()
        if function in seen:
            continue
        seen.add(function)
        if function in owner:
            found.append(owner[function])
        else:
            stack += [following for following, _ in getattr(function, "next_functions", ())]
    return found


@torch.no_grad()
def outputs(model: nn.Module, net: Net) -> list[Tensor]:
    """Return what the model computes on the net's inputs, of both variants."""
    return [tensor for variant in (0, 1) for tensor in flat(model(*net.inputs(variant)))]


def flat(output: object) -> list[Tensor]:
    """Return the floating-point tensors of an output, however nested."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in flat(part)]


def nets(name: str) -> Iterator[Net]:
    """Yield the nets of `package.module:MAPPING`; the current folder is searched too."""
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    yield from getattr(importlib.import_module(module), attribute).values()


def main(
    zoos: Annotated[list[str], typer.Argument(help="package.module:MAPPING")],
    ratio: Annotated[float, typer.Option(min=0, max=1, help="of the channels of every layer")] = 0.5,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Print what torch-pruning makes of every net."""
    torch.set_num_threads(1)
    importlib.import_module("torch_pruning")  # once, before the processes
    every = [(zoo, net) for zoo in zoos for net in nets(zoo)]
    results = [(zoo, net, outcome(net, ratio)) for zoo, net in track(every, "pruning", console=Console(stderr=True))]
    if as_json:
        rows = [{"zoo": zoo, "net": net.name, "feature": net.feature} | asdict(result) for zoo, net, result in results]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    table = Table("net", "result", "weights left", "feature", box=None)
    for _, net, result in results:
        table.add_row(net.name, str(result), f"{100 * result.kept:.0f} %", net.feature)
    Console(width=200).print(table)
    counts = Counter((zoo, result.kind) for zoo, _, result in results)
    for zoo in zoos:
        Console().print(f"{zoo}: " + ", ".join(f"{counts[zoo, kind]} {kind}" for kind in KINDS))


if __name__ == "__main__":
    typer.run(main)
