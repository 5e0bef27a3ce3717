"""What can be cut of a network, structure by structure: how each is zeroed and rebuilt, and what the result must do."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from backends.artifact import specs_of
from backends.channels import select, unread
from backends.equivalence import proven, run
from backends.export import export_onnx
from backends.layers import weight_of
from backends.rebuild import cut, zeroed
from backends.regraph import resizable
from backends.shapes import crop, gather
from planner.graph import Graph, exported, trace
from planner.groups import group
from planner.pools import input_channels
from planner.structures import NM, FilterShape, Weight
from planner.widths import Width
from profiles.errors import BuildError, EspalierError
from tools.zoo_baseline import Mask, Net, flat, normalise_alive_

TOLERANCE = 1e-4  # of the largest output, in the model's own precision and in ONNX Runtime
EXPLAINED = 1e-3  # of the largest output: norms written by hand differ in their rounding
QUANTUM = 8  # filters in a block
WIDTHS = ("filter", "hidden", "head", "embedding", "block")
STRUCTURES = (*WIDTHS, "channel", "depth", "kernel", "fibre", "N:M", "weight")
OUTPUT = "it is an output of the model"
LAYERED = ("conv", "linear", "addmm", "matmul", "aten.mm", "bmm", "einsum")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
READERS = (*CONVOLUTIONS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)

Rebuild = Callable[[Sequence[str]], tuple[nn.Module, nn.Module]]


@dataclass(frozen=True)
class Case:
    """Things that can be cut, by name, and what zeroes and rebuilds some: (masked, dense), or an EspalierError."""

    names: tuple[str, ...]
    of: int
    make: Rebuild
    reason: str = ""  # why none of them, or not all, can be cut
    graph: Graph | None = None  # where the cut is not exact
    kept: Mapping[str, Tensor] = field(default_factory=dict)  # channels, where widths are cut
    outputs: bool = False  # whether all of them are outputs of the model, if normalisations are let pass


@dataclass(frozen=True)
class Subject:
    """A network, and what the dense one can: what it cannot is asked of no rebuilt one."""

    net: Net

    @cached_property
    def model(self) -> nn.Module:
        """The dense network."""
        return self.net.build()

    @cached_property
    def program(self) -> ExportedProgram:
        """The program of the network."""
        return exported(self.model, self.net.inputs())

    @cached_property
    def resizable(self) -> ExportedProgram:
        """The same for inputs of other sizes."""
        return resizable(self.model, self.graph.example())

    @cached_property
    def graph(self) -> Graph:
        """What can be cut exactly."""
        return trace(self.model, self.net.inputs(), program=self.program)

    @cached_property
    def lossy_graph(self) -> Graph:
        """What can be cut if normalisations may count fewer channels."""
        return trace(self.model, self.net.inputs(), lossy=True, program=self.program)

    @cached_property
    def checks(self) -> dict[str, "Check"]:
        """The checks that the dense network passes itself."""
        return {name: check for name, check in CHECKS.items() if not guarded(check, self, self.model, self.model)}


# --- checks: each says what is wrong with a rebuilt model, or "" ------------------------------------------------------

Check = Callable[[Subject, nn.Module, nn.Module], str]


def _on_other_sizes(subject: Subject, masked: nn.Module, dense: nn.Module) -> str:
    inputs = subject.net.inputs(1)
    return _told(run(dense, inputs), run(masked, inputs))


def _in_training(subject: Subject, _: nn.Module, dense: nn.Module) -> str:
    model = copy.deepcopy(dense).train()
    if not list(model.parameters()):  # all that learns has left
        return ""
    losses = [out.square().mean() for out in flat(model(*subject.net.inputs()))]
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    finite = all(bool(torch.isfinite(x).all()) for x in [*gradients, *model.parameters()])
    return "" if gradients and finite else "no finite gradients"


def _in_onnx_runtime(subject: Subject, masked: nn.Module, dense: nn.Module) -> str:
    import onnxruntime

    options, inputs = onnxruntime.SessionOptions(), subject.net.inputs()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.onnx"
        export_onnx(dense, inputs, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = {spec.name for spec in session.get_inputs()}
    given = {spec.name: x.numpy() for spec, x in zip(specs_of(inputs), inputs, strict=True) if spec.name in taken}
    found = session.run(None, given)
    whole = torch.cat([torch.from_numpy(np.asarray(out)).flatten().double() for out in found])
    return _told(whole, run(masked, inputs).flatten().double())


CHECKS: dict[str, Check] = {
    "on other sizes": _on_other_sizes,
    "in training": _in_training,
    "in ONNX Runtime": _in_onnx_runtime,
}


def guarded(check: Check, subject: Subject, masked: nn.Module, dense: nn.Module) -> str:
    """Return what a check says, or "raises" and the error that it ends in."""
    try:
        return check(subject, masked, dense)
    except Exception as error:
        return f"raises {line(error)}"


def line(error: Exception) -> str:
    """Return an error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def _told(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"output {tuple(found.shape)}, not {tuple(expected.shape)}"
    worst = difference(found, expected)
    return "" if worst <= TOLERANCE else f"differs by {worst:.2g}"


def difference(found: Tensor, expected: Tensor) -> float:
    """Return max|found - expected| / max|expected|."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def faults(subject: Subject, masked: nn.Module, dense: nn.Module, *, exact: bool) -> dict[str, str]:
    """Return what is wrong with a rebuilt model, by where it shows; one that is not exact is compared with itself."""
    reference, found = masked if exact else dense, {}
    for name, check in subject.checks.items():
        if fault := guarded(check, subject, reference, dense):
            found[name] = fault
    try:
        proven(subject.graph, reference, dense)
    except BuildError as error:
        found["in float64 or its own precision"] = line(error)
    return found


def lossy(subject: Subject, case: Case, names: Sequence[str], masked: nn.Module, dense: nn.Module) -> tuple[str, str]:
    """Return "lossy", or "wrong" if the statistics of norms alone do not explain the change, and how large that is."""
    assert case.graph is not None
    norms = {name for name, m in masked.named_modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)}
    alive: dict[str, set[int]] = {}
    for name in names:
        for piece in case.graph.width[name].slices:
            if piece.tensor.rpartition(".")[0] in norms:
                stays = np.isin(piece.units, [-1, *case.kept[name].tolist()]).nonzero()[0].tolist()
                alive[piece.tensor] = alive.get(piece.tensor, set(stays)) & set(stays)
    inputs = subject.net.inputs()
    expected, found = run(masked, inputs), run(dense, inputs)
    told = f"changes the output by {difference(found, expected):.2g}"
    mask = Mask(copy.deepcopy(masked), {tensor: sorted(left) for tensor, left in alive.items()})
    normalise_alive_(mask)
    if difference(found, run(mask.model, inputs)) > EXPLAINED:
        return "wrong", f"{told}, and not by the statistics of norms alone"
    return "lossy", told


# --- cases ------------------------------------------------------------------------------------------------------------


def cases(subject: Subject, structure: str, share: float) -> Iterator[Case]:
    """Yield how to cut a structure, if the network has any: a lossy way too where there is no exact one."""
    dice = Random(f"{subject.net.name} {structure} {share}")
    if structure in WIDTHS:
        case = _widths(subject, subject.graph, structure, share, dice)
        if case.names or (not case.of and _computed(subject, structure)):
            yield case
        elif case.of:
            lossy = _widths(subject, subject.lossy_graph, structure, share, dice)
            if lossy.names or not lossy.outputs:
                yield from (case, lossy) if lossy.of else (case,)
    elif structure == "depth":
        yield from _depth(subject, share, dice)
    elif structure == "channel":
        yield from _channels(subject, share)
    elif structure in ("kernel", "fibre"):
        yield from _kernels(subject, structure, share)
    else:
        yield from _in_place(subject, structure, share, dice)


def _is(width: Width, structure: str) -> bool:
    """Whether a width is of this kind: it is made of several channels, and is no output of the model."""
    several = any(piece.penalised and (piece.units >= 0).sum() > 1 for piece in width.slices)
    kind = width.size > QUANTUM if structure == "block" else width.structure == structure
    return kind and several and width.frozen != OUTPUT


def _computed(subject: Subject, structure: str) -> bool:
    """Whether there are convolutions of whose channels nothing is known."""
    known = {piece.tensor for width in subject.graph.widths for piece in width.slices}
    layers = {name for name, module in subject.model.named_modules() if isinstance(module, CONVOLUTIONS)}
    return structure == "filter" and bool(layers) and not any(f"{name}.weight" in known for name in layers)


def _widths(subject: Subject, graph: Graph, structure: str, share: float, dice: Random) -> Case:
    every = [width for width in subject.graph.widths if _is(width, structure)]
    if graph is not subject.graph:  # where more can be cut, other things may be tied to the same makers
        makers = {maker for width in every for maker in width.makers}
        every = [width for width in graph.widths if makers.intersection(width.makers) and width.size > 1]
    runs = QUANTUM if structure == "block" else 1
    kept = {width.name: _kept(width.size, share, runs, dice) for width in every if not width.frozen}

    def make(names: Sequence[str]) -> tuple[nn.Module, nn.Module]:
        own = {name: kept[name] for name in names}
        return zeroed(subject.model, graph, own), cut(subject.model, graph, own, program=lambda: subject.resizable)

    reasons = [f"{width.name}: {width.frozen}" for width in every if width.frozen]
    inexact = graph if any(width.lossy for width in every if not width.frozen) else None
    reason = (reasons or ["the weights of its convolutions are computed"])[0]
    outputs = bool(every) and all(width.frozen == OUTPUT for width in every)
    return Case(tuple(kept), len(every), make, reason, inexact, kept, outputs)


def _kept(size: int, share: float, runs: int, dice: Random) -> Tensor:
    """Return what stays of `size` channels, cut in runs of `runs`: at least one run goes, and one stays."""
    count = -(-size // runs)
    gone = set(dice.sample(range(count), min(max(1, round(share * count)), count - 1)))
    return torch.tensor([i for i in range(size) if i // runs not in gone])


def _channels(subject: Subject, share: float) -> Iterator[Case]:
    """Input channels of layers: cut where nothing else reads them, else selected."""
    model, graph = subject.model, subject.graph
    layers = [name for name, module in model.named_modules() if isinstance(module, READERS)]
    held = {name for name, _ in model.named_parameters()}
    every = {name: input_channels(model, graph, weight_of(name)) for name in layers if weight_of(name) in held}
    every = {name: structure for name, structure in every.items() if structure.size > 1}

    def make(names: Sequence[str]) -> tuple[nn.Module, nn.Module]:
        masked = copy.deepcopy(model)
        for name in names:
            stays = torch.zeros(every[name].size)
            stays[_kept(every[name].size, share, 1, Random(f"{name} {share}"))] = 1
            group([every[name]], masked).scale_(dict(masked.named_parameters()), stays)
        dense = cut(masked, graph, unread(masked, graph))
        weights = dict(dense.named_parameters(remove_duplicate=False))  # some may be of no use any more
        own = [name for name in names if weight_of(name) in weights]
        return masked, select(dense, graph, [n for n in own if _reads_less(weights[weight_of(n)], every[n].axis)])

    if every:
        yield Case(tuple(every), len(every), make)


def _reads_less(weight: Tensor, axis: int) -> bool:
    """Whether a weight is zero for some of its input channels."""
    return not bool((weight != 0).movedim(axis, 0).flatten(1).any(1).all())


def _depth(subject: Subject, share: float, dice: Random) -> Iterator[Case]:
    model, graph = subject.model, subject.graph
    free = [block.name for block in graph.blocks if not block.frozen]
    drawn = dice.sample(free, max(1, round(share * len(free)))) if free else []

    def make(names: Sequence[str]) -> tuple[nn.Module, nn.Module]:
        return zeroed(model, graph, {}, frozenset(names)), cut(
            model, graph, {}, frozenset(names), program=lambda: subject.resizable
        )

    sums = 0 if graph.blocks else residual_sums(subject.program)
    reasons = [f"{block.name}: {block.frozen}" for block in graph.blocks if block.frozen]
    if graph.blocks or sums:
        of = len(drawn) or len(graph.blocks) or sums
        yield Case(tuple(drawn), of, make, (reasons or [f"no block found at its {sums} residual sums"])[0])


def residual_sums(program: ExportedProgram) -> int:
    """Return how many sums of a tensor and what layers make of it there are, whether these can leave or not."""
    behind: dict[object, set[object]] = {}
    layers, count = set[object](), 0
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        behind[node] = {node}.union(*(behind[source] for source in sources))
        if any(name in str(node.target) for name in LAYERED):
            layers.add(node)
        if str(node.target).startswith("aten.add") and len(sources) == 2:
            pairs = ((sources[0], sources[1]), (sources[1], sources[0]))
            count += any(a in behind[b] and bool(layers & (behind[b] - behind[a])) for a, b in pairs)
    return count


def _kernels(subject: Subject, structure: str, share: float) -> Iterator[Case]:
    kinds = CONVOLUTIONS if structure == "kernel" else (nn.Conv2d,)
    found = [(name, module) for name, module in subject.model.named_modules() if isinstance(module, kinds)]
    sizes = {name: module.weight.shape for name, module in found if max(module.kernel_size) > 1}

    def make(names: Sequence[str]) -> tuple[nn.Module, nn.Module]:
        masked = copy.deepcopy(subject.model)
        for name in names:
            dice, weight = Random(f"{name} {share}"), masked.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            with torch.no_grad():
                weight.mul_(_border(weight, share, dice) if structure == "kernel" else _fibres(weight, share, dice))
        dense = crop(masked, subject.graph)
        if structure == "fibre":
            return masked, gather(dense, subject.graph, names)
        if same := [name for name in names if dense.get_submodule(name).weight.shape == sizes[name]]:
            raise BuildError(f"{same[0]} stays as it is: its forward or weight is not PyTorch's own, or is shared")
        return masked, dense

    if sizes:
        yield Case(tuple(sizes), len(sizes), make)


def _border(weight: Tensor, share: float, dice: Random) -> Tensor:
    """Return 0 for rows and columns at the borders of a kernel, at least the share of its positions, and else 1."""
    bounds = [[0, size] for size in weight.shape[2:]]
    inside = torch.ones(weight.shape[2:])
    while float(inside.mean()) > 1 - share and inside.sum() > 1:
        axis = dice.choice([i for i, (first, end) in enumerate(bounds) if end - first > 1])
        side = dice.choice((0, 1))
        bounds[axis][side] += 1 - 2 * side
        inside = torch.zeros(weight.shape[2:])
        inside[tuple(slice(*bound) for bound in bounds)] = 1
    return inside


def _fibres(weight: Tensor, share: float, dice: Random) -> Tensor:
    """Return 0 for random shape fibres of a kernel, and else 1."""
    structure = FilterShape("weight", tuple(weight.shape[1:]))
    stays = torch.ones(structure.count)
    stays[dice.sample(range(structure.count), round(share * structure.count))] = 0
    ((_, ids),) = structure.maps({"weight": weight.shape})
    return stays[ids]


def _in_place(subject: Subject, structure: str, share: float, dice: Random) -> Iterator[Case]:
    """N:M and single weights: what is rebuilt is the masked model itself."""
    weights = {
        name: parameter
        for name, parameter in subject.model.named_parameters()
        if parameter.dim() > 1 and parameter.shape[0] > 1 and (structure == "weight" or parameter.shape[1] % 4 == 0)
    }

    def make(names: Sequence[str]) -> tuple[nn.Module, nn.Module]:
        masked = copy.deepcopy(subject.model)
        parameters = dict(masked.named_parameters())
        many = structure == "weight"
        own = [Weight(n, weights[n].numel()) if many else NM(n, weights[n].numel(), 2, 4) for n in names]
        groups, scale = group(own, masked), torch.ones(sum(each.count for each in own))
        runs = [range(i, i + 4) for i in range(0, len(scale), 4)]
        gone = dice.sample(range(len(scale)), round(share * len(scale))) if many else _of_each(runs, share, dice)
        scale[gone] = 0
        groups.scale_(parameters, scale)
        if int(groups.norms(parameters).eq(0).sum()) < len(gone):
            raise EspalierError("weights that should be zero are not")
        return masked, masked

    if weights:
        yield Case(tuple(weights), len(weights), make)


def _of_each(runs: Sequence[range], share: float, dice: Random) -> list[int]:
    return [i for run_ in runs for i in dice.sample(run_, round(share * len(run_)))]
