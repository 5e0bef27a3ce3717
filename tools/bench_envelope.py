"""Measure the envelope: time and memory of the root search, and the proximal step beside what it is added to.

    python tools/bench_envelope.py [--max-groups 10000000] [--json]

One thread for all, float32. Times are CPU times: of the root search the least of several runs, side by side the medians
of runs in turns. Exit 1 if a limit is missed. The limit of the time per group needs --max-groups 100000000. ModOpt and
pyproximal are measured where they are installed: `pip install modopt pyproximal`.
"""

import copy
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch_pruning
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from planner import envelope
from planner.graph import trace
from planner.pools import Pools, Share, pooled
from planner.prox import Proximal, Schedule
from planner.structures import Filter, Rows, Structure, Weight
from tools.examples.cifar10 import resnet20

MAX_TIME_RATIO = 1.5  # of the time per group, 1e8 groups against 1e6
MAX_PER_FILTER_STEP = 1.0  # of a step of SGD with momentum, on the parameters of ResNet-50
MAX_PER_WEIGHT_STEP = 4.0
MAX_TRAINING_STEP = 1.05  # of the same training step without the proximal step, ResNet-20 at batch 128
MAX_OF_OTHERS = 0.2  # of the time of others for the same job
MAX_EXTRA_VECTORS = 4.0  # vectors of as many float32 as there are groups; the result is one of them
OTHERS = ("modopt", "pyproximal")  # measured where they are installed
_SMALLEST_FOR_MEMORY = 10**7  # below it the chunks, of a fixed size, outweigh the vectors


@dataclass(frozen=True)
class Row:
    """One measured call."""

    name: str
    groups: int
    cpu_s: float
    extra_vectors: float | None

    @property
    def per_group_ns(self) -> float:
        """CPU time divided by groups."""
        return self.cpu_s / self.groups * 1e9


@dataclass(frozen=True)
class Verdict:
    """A figure that has a limit."""

    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the figure is within its limit."""
        return self.value <= self.limit


def measured(name: str, groups: int, call: Callable[[], Tensor]) -> Row:
    """Time a call and take its peak of memory; the result counts as extra memory."""
    before = _reset_peak_bytes()
    result = call()
    peak = None if before is None else _status_bytes("VmHWM") - before
    del result
    best = min(_cpu_s(call) for _ in range(max(3, min(30, 10**7 // groups))))
    return Row(name, groups, best, peak / (4 * groups) if peak is not None and groups >= _SMALLEST_FOR_MEMORY else None)


def _cpu_s(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _reset_peak_bytes() -> int | None:
    """Make the kernel forget the peak of memory; return the present use, or None where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _norms(groups: int, seed: int = 0) -> Tensor:
    return torch.empty(groups).log_normal_(generator=torch.Generator().manual_seed(seed))


def one_pool(max_groups: int) -> Iterator[Row]:
    """The prox and the value of one pool, three tenths of which may remain."""
    for groups in [10**power for power in range(4, 9) if 10**power <= max_groups]:
        norms, a, d = (_norms(groups, seed) for seed in range(3))
        k, share = 0.3 * groups, 0.3 * float(d.sum())
        yield measured("prox", groups, partial(envelope.scale, norms, 0.01, 1.0, 1.0, k))
        yield measured("de-biased prox", groups, partial(envelope.scale, norms, 0.01, 1.0, 1.0, k, debiased=True))
        yield measured("prox with a, d", groups, partial(envelope.scale, norms, 0.01, a, d, share))
        yield measured("value", groups, partial(envelope.value, norms, 1.0, 1.0, k))
        yield measured("value with a, d", groups, partial(envelope.value, norms, a, d, share))


def pools_of_four(max_groups: int) -> Iterator[Row]:
    """The prox of pools of four of which two may remain, as in 2:4 sparsity; a million weights."""
    groups = min(10**6, max_groups)
    yield measured("prox, pools of 4", groups, partial(envelope.scale, _norms(groups), 0.01, 1.0, 1.0, 2.0, pool=4))


ROWS: list[Callable[[int], Iterator[Row]]] = [one_pool, pools_of_four]


@dataclass(frozen=True)
class Pair:
    """Two calls that were measured in turns; the limit is on the first one's time relative to the second's."""

    name: str
    cpu_s: float
    beside: str
    beside_s: float
    limit: float | None  # None: for information


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, *, repeats: int = 1) -> dict[str, float]:
    """Return the median CPU time of each call; they take turns of `repeats` calls, and the first turns do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name] += [_cpu_s(call) for _ in range(repeats)]
    return {name: statistics.median(each[repeats:]) for name, each in times.items()}


def _resnet50() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the parameters of ResNet-50 (He et al. 2016): 25,557,032 weights."""
    convolutions, inputs = [("stem", (64, 3, 7, 7))], 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for block in range(blocks):
            shapes = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            shapes += [(4 * width, inputs, 1, 1)] if block == 0 else []
            convolutions += [(f"stage{stage}_block{block}_conv{i}", shape) for i, shape in enumerate(shapes)]
            inputs = 4 * width
    for name, shape in convolutions:
        yield name, shape
        yield f"{name}_norm_weight", shape[:1]
        yield f"{name}_norm_bias", shape[:1]
    yield from [("fc", (1000, 2048)), ("fc_bias", (1000,))]


def _parameters() -> nn.ParameterDict:
    generator = torch.Generator().manual_seed(0)
    parameters = nn.ParameterDict(
        {name: nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for name, shape in _resnet50()}
    )
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


def _halving(structures: Sequence[Structure], model: nn.Module) -> Pools:
    """Return one pool for each structure, half of whose groups may remain."""
    return pooled([Share.of(structure, structure.count / 2) for structure in structures], model)


def _halved_together(structures: Sequence[Structure], model: nn.Module) -> Pools:
    """Return one pool for all structures, half of whose groups may remain."""
    ones = (1.0,) * len(structures)
    budget = sum(structure.count for structure in structures) / 2
    return pooled([Share("all", tuple(structures), ones, ones, budget)], model)


def _proximal(pools: Pools, model: nn.Module) -> Proximal:
    """Return a proximal step in the middle of its schedule, where its size is 0.003."""
    proximal = Proximal(pools, model, Schedule(2000), debiased=True)
    proximal.taken = 1000
    return proximal


def _per_weight(parameters: nn.ParameterDict) -> Callable[[], None]:
    """Return the proximal step with every weight a group, all in one pool; its parts are put together here."""
    norms = torch.empty(sum(parameter.numel() for parameter in parameters.values()))
    pieces = torch.split(norms, [parameter.numel() for parameter in parameters.values()])
    views = list(map(Tensor.view_as, pieces, parameters.values()))

    @torch.no_grad()
    def step() -> None:
        for view, parameter in zip(views, parameters.values(), strict=True):
            torch.abs(parameter, out=view)
        envelope.scale(norms, 0.003, 1.0, 1.0, len(norms) / 2, debiased=True, out=norms)
        for view, parameter in zip(views, parameters.values(), strict=True):
            parameter.mul_(view)

    return step


def beside_sgd() -> Iterator[Pair]:
    """The proximal step beside a step of SGD with momentum, on the parameters of ResNet-50."""
    parameters = _parameters()
    sgd = torch.optim.SGD(parameters.values(), lr=1e-9, momentum=0.9, foreach=True)
    filters = [Rows((name,), each.shape[0], 1) for name, each in parameters.items() if each.dim() == 4]
    found = in_turns(
        {
            "filters": _proximal(_halving(filters, parameters), parameters).step,
            "weights": _per_weight(parameters),
            "SGD": sgd.step,
        },
        rounds=11,
    )
    yield Pair("ResNet-50, filters, a pool per layer", found["filters"], "SGD step", found["SGD"], MAX_PER_FILTER_STEP)
    yield Pair("ResNet-50, single weights, one pool", found["weights"], "SGD step", found["SGD"], MAX_PER_WEIGHT_STEP)
    singles = [Weight(name, each.numel()) for name, each in parameters.items()]
    proximal = _proximal(_halved_together(singles, parameters), parameters)
    found = in_turns({"Proximal": proximal.step, "SGD": sgd.step}, rounds=2)
    yield Pair("the same through planner.prox.Proximal", found["Proximal"], "SGD step", found["SGD"], None)


def training_step() -> Iterator[Pair]:
    """A training step of ResNet-20 at batch 128 with the proximal step that halves the inner widths, or without it."""
    model, generator = resnet20(), torch.Generator().manual_seed(0)
    x, y = torch.randn(128, 3, 32, 32, generator=generator), torch.randint(10, (128,), generator=generator)
    inner = [Filter(width) for width in trace(model, (x[:1],)).cuttable if not width.is_stream]
    proximal = _proximal(_halving(inner, model), model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def without() -> None:
        sgd.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        sgd.step()

    def with_proximal() -> None:
        without()
        proximal.step()

    found = in_turns({"with": with_proximal, "without": without}, rounds=31)
    yield Pair("ResNet-20, training step", found["with"], "without the prox", found["without"], MAX_TRAINING_STEP)


def _plain_lasso(model: nn.Module) -> Callable[[], None]:
    """Return the group lasso's prox on filters, written the plain way."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]

    @torch.no_grad()
    def step() -> None:
        for weight in weights:
            for row in weight:
                row *= (1 - 1e-6 / row.norm().clamp(min=1e-12)).clamp(min=0)

    return step


def beside_others() -> Iterator[Pair]:
    """The proximal step on all widths of ResNet-20 beside the same job by others."""
    model, inputs = resnet20(), torch.randn(1, 3, 32, 32)
    pools = _halving([Filter(width) for width in trace(model, (inputs,)).cuttable], model)
    parameters = dict(model.named_parameters())
    pools.groups.scale_(parameters, _norms(pools.groups.count).sqrt_())  # they differ as those of trained filters do
    other = copy.deepcopy(model)
    importance = torch_pruning.importance.GroupMagnitudeImportance()
    pruner = torch_pruning.pruner.GroupNormPruner(other, inputs, importance=importance)
    pruner.update_regularizer()
    for parameter in other.parameters():
        parameter.grad = torch.zeros_like(parameter)
    calls = {
        "ours": _proximal(pools, model).step,
        "torch-pruning GroupNormPruner.regularize": lambda: pruner.regularize(other),
        "group lasso in a Python loop": _plain_lasso(copy.deepcopy(model)),
    }
    found = in_turns(calls, rounds=15, repeats=15)
    for name in list(calls)[1:]:
        yield Pair("ResNet-20, filters", found["ours"], name, found[name], MAX_OF_OTHERS)
    yield from _beside_proxes("ResNet-20, filters, only the prox", pools.groups.norms(parameters), pools)


def _proxes(step: float) -> Iterator[tuple[str, Callable[[int, NDArray[np.float64]], object]]]:
    """Yield the installed proxes, of the norms of one pool, that `envelope.scale` has for integer k and a = d = 1."""
    if "modopt" not in missing():
        modopt = importlib.import_module("modopt.opt.proximity")
        yield "ModOpt KSupportNorm", lambda k, x: modopt.KSupportNorm(step, k).op(x)
    if "pyproximal" not in missing():  # the de-biased form
        envelopes = importlib.import_module("pyproximal")
        yield "pyproximal QuadraticEnvelope", lambda k, x: envelopes.QuadraticEnvelopeCardIndicator(k).prox(x, step)


def _beside_proxes(job: str, norms: Tensor, pools: Pools) -> Iterator[Pair]:
    """The prox of given norms, all pools in one call, beside others', a call per pool."""
    parts = [part.numpy() for part in torch.split(norms.double(), pools.pool.bincount().tolist())]
    tasks = list(zip([int(k) for k in pools.k.tolist()], parts, strict=True))
    calls: dict[str, Callable[[], object]] = {
        name: partial(lambda prox: [prox(k, part) for k, part in tasks], prox) for name, prox in _proxes(0.003)
    }
    ours = partial(envelope.scale, norms, 0.003, 1.0, 1.0, pools.k, pool=pools.layout, debiased=True)
    found = in_turns({"ours": ours, **calls}, rounds=15, repeats=20)
    yield from (Pair(job, found["ours"], name, found[name], MAX_OF_OTHERS) for name in calls)


PAIRS: list[Callable[[], Iterator[Pair]]] = [beside_sgd, training_step, beside_others]


def missing() -> list[str]:
    """Return the packages that cannot be measured: nothing else in the project needs them."""
    return [name for name in OTHERS if importlib.util.find_spec(name) is None]


def verdicts(rows: Sequence[Row], pairs: Sequence[Pair]) -> Iterator[Verdict]:
    """Hold the rows of one pool, and the pairs, against the limits."""
    times = {(row.name, row.groups): row.per_group_ns for row in rows}
    for name in dict.fromkeys(row.name for row in rows):
        if (name, 10**6) in times and (name, 10**8) in times:
            ratio = times[name, 10**8] / times[name, 10**6]
            yield Verdict(f"{name}: time per group, 1e8 against 1e6", ratio, MAX_TIME_RATIO)
    for row in rows:
        if row.extra_vectors is not None and row.name != "prox, pools of 4":
            yield Verdict(f"{row.name}: extra vectors, {row.groups:.0e} groups", row.extra_vectors, MAX_EXTRA_VECTORS)
    for pair in pairs:
        if pair.limit is not None:
            yield Verdict(f"{pair.name} / {pair.beside}", pair.cpu_s / pair.beside_s, pair.limit)


def _table(rows: list[Row]) -> Table:
    table = Table("call", "groups", "CPU time", "per group", "extra memory", title="WGSEF on one thread, float32")
    for row in rows:
        memory = "" if row.extra_vectors is None else f"{row.extra_vectors:.2f} vectors"
        table.add_row(row.name, f"{row.groups:,}", f"{row.cpu_s * 1e3:,.2f} ms", f"{row.per_group_ns:.1f} ns", memory)
    return table


def _pairs_table(pairs: list[Pair]) -> Table:
    table = Table("proximal step", "CPU time", "beside", "CPU time", "ratio", title="Side by side, one thread, float32")
    for pair in pairs:
        ours, theirs = f"{pair.cpu_s * 1e3:,.2f} ms", f"{pair.beside_s * 1e3:,.2f} ms"
        table.add_row(pair.name, ours, pair.beside, theirs, f"{pair.cpu_s / pair.beside_s:.3f}")
    for name in missing():
        table.add_row("ResNet-20, filters", "", name, "not installed", "not measured")
    return table


def main(
    max_groups: Annotated[int, typer.Option(min=10**4, help="the most groups to measure")] = 10**7,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure the envelope."""
    torch.set_num_threads(1)
    progress = Console(stderr=True)
    rows: list[Row] = []
    for measure in ROWS:
        for row in measure(max_groups):
            rows.append(row)
            progress.print(f"{row.name}, {row.groups:,} groups: {row.per_group_ns:.1f} ns per group")
    pairs: list[Pair] = []
    for compare in PAIRS:
        for pair in compare():
            pairs.append(pair)
            progress.print(f"{pair.name}: {pair.cpu_s / pair.beside_s:.3f} of {pair.beside}")
    judged = list(verdicts(rows, pairs))
    if as_json:
        found = {
            "torch": torch.__version__,
            "threads": 1,
            "rows": [asdict(row) for row in rows],
            "pairs": [asdict(pair) for pair in pairs],
            "not_installed": missing(),
            "verdicts": [{**asdict(verdict), "holds": verdict.holds} for verdict in judged],
        }
        print(json.dumps(found, indent=2))
    else:
        console = Console()
        console.print(_table(rows), _pairs_table(pairs))
        for verdict in judged:
            sign = "within" if verdict.holds else "[red]above[/red]"
            console.print(f"{verdict.name}: {verdict.value:.3f}, {sign} the limit {verdict.limit}")
    sys.exit(0 if all(verdict.holds for verdict in judged) else 1)


if __name__ == "__main__":
    typer.run(main)
