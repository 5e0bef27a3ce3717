"""Cut every network of a zoo in every way that applies, check what comes out, and put torch-pruning's result beside it.

    python tools/bench_zoo.py tests.zoo:ZOO tests.zoo.public:PUBLIC [--jobs N] [--log F] [--json F] [--markdown F]

A case is a network, a structure, and the share of its groups that is zeroed at random. The rebuilt model is compared
with the masked one in its own precision, in float64, and on inputs of other sizes, takes a step of SGD, and is run by
ONNX Runtime: all that the dense network can. It is wrong if it computes something else, and raised if it does not run,
train or export. A structure applies if the network has any of it beside its outputs; it is refused if none of it can be
cut, else the case says how much was. Exit 1 if a case is wrong or raised, or if more than 5 % are refused. What is in
the log is not run again if it was made by the same sources, PyTorch and transformers (torch-pruning's: by the same
torch-pruning and networks); what others made is not shown. Several processes may write to one log.
"""

import hashlib
import importlib
import importlib.metadata
import json
import logging
import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from backends.equivalence import run
from profiles import atomic
from profiles.errors import BuildError, EspalierError
from tools.zoo_baseline import Net, nets, outcome
from tools.zoo_cases import STRUCTURES, Case, Subject, cases, faults, line, lossy

MOST_REFUSED = 0.05
SHARES = (0.25, 0.5)
PEER_LIMIT_S = 20.0
KINDS = ("own class", "graph", "lossy", "refused", "raised", "wrong")
PEER, PEER_KINDS = "torch-pruning", ("right", "norms", "wrong", "raised")
ONE_SIZE = "takes inputs of one size alone"
STYLES = {"own class": "green", "graph": "green", "right": "green", "lossy": "cyan", "refused": "yellow"}


@dataclass(frozen=True)
class Cell:
    """What became of a case: `cut` of `of` widths, blocks or layers; torch-pruning has one per network and share."""

    zoo: str
    theme: str
    net: str
    structure: str
    share: float
    kind: str
    detail: str = ""
    cut: int = 0
    of: int = 0
    version: str = ""  # of what made it
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, float]:
        """What tells cases apart."""
        return self.zoo, self.net, self.structure, self.share

    def __str__(self) -> str:
        some = f" {self.cut}/{self.of}" if 0 < self.cut < self.of else ""
        return f"[{STYLES.get(self.kind, 'red')}]{self.kind}{some}[/]"


def judged(subject: Subject, structure: str, share: float) -> tuple[str, str, int, int] | None:
    """Return (kind, detail, cut, of) of a case, or None if the network has nothing of the structure."""
    refused = None
    for case in cases(subject, structure, share):
        names, made, reason = most(case)
        if made is None:
            refused = "refused", reason, 0, case.of
            continue
        masked, dense = made
        found = faults(subject, masked, dense, exact=case.graph is None)
        kind = "own class" if type(dense) is type(subject.model) else "graph"
        sizes = _of_one_size(subject, dense)
        if sizes:
            found.pop("on other sizes", None)
        if found:
            kind = "raised" if all(fault.startswith("raises") for fault in found.values()) else "wrong"
            return kind, "; ".join(f"{where}: {fault}" for where, fault in found.items()), len(names), case.of
        if case.graph is not None:
            kind, detail = lossy(subject, case, names, masked, dense)
            return kind, detail, len(names), case.of
        return kind, "; ".join(filter(None, (sizes, reason if len(names) < case.of else ""))), len(names), case.of
    return refused


def _of_one_size(subject: Subject, dense: nn.Module) -> str:
    """Return what a model that takes inputs of one size alone says to others."""
    try:
        run(dense, subject.net.inputs(1))
    except BuildError as error:
        return f"{ONE_SIZE}: {line(error)}" if "on other sizes" in subject.checks else ""
    return ""


def most(case: Case) -> tuple[list[str], tuple[nn.Module, nn.Module] | None, str]:
    """Return what can be cut together, all or one after the other, (masked, rebuilt), and why the rest cannot."""
    chosen: list[str] = []
    made, reason = None, case.reason
    if case.names:
        try:
            return list(case.names), case.make(case.names), reason
        except EspalierError as error:
            reason = line(error)
    for name in case.names if len(case.names) > 1 else ():
        try:
            made = case.make([*chosen, name])
            chosen.append(name)
        except EspalierError as error:
            reason = line(error)
    return chosen, made, reason


def run_net(
    zoo: str, net: Net, *, theme: str, structures: Sequence[str], done: Collection[tuple[object, ...]]
) -> Iterator[Cell]:
    """Yield the cases of one network that are not done."""
    subject = Subject(net)
    for structure in structures:
        for share in SHARES:
            if (zoo, net.name, structure, share) in done:
                continue
            start = time.perf_counter()
            kind, detail, cut, of = _found(subject, structure, share)
            took = round(time.perf_counter() - start, 2)
            key = zoo, theme, net.name, structure, share
            yield Cell(*key, kind, _short(detail), cut, of, version(zoo, structure), took)


def _found(subject: Subject, structure: str, share: float) -> tuple[str, str, int, int]:
    """Return (kind, detail, cut, of) of a case of ours or torch-pruning's."""
    if structure == PEER:
        peer = outcome(subject.net, share, limit_s=PEER_LIMIT_S)
        return peer.kind, peer.detail, 0, 0
    try:
        return judged(subject, structure, share) or ("none", "", 0, 0)
    except Exception as error:
        return "raised", line(error), 0, 0


@cache
def version(zoo: str, structure: str) -> str:
    """Return what a case depends on beside itself: the versions of packages, and a hash of the sources."""
    here = Path(__file__).parent
    folder = Path(str(importlib.import_module(zoo.partition(":")[0]).__file__)).parent
    own = [here / "zoo_baseline.py"] if structure == PEER else [here / "zoo_cases.py", here / "zoo_baseline.py"]
    folders = [folder] if structure == PEER else [folder, here.parent / "planner", here.parent / "backends"]
    files = [*own, *(file for one in folders for file in sorted(one.glob("*.py")))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    packages = ("torch", "transformers", *(("torch-pruning",) if structure == PEER else ()))
    return " ".join([digest, *(f"{name} {_installed(name)}" for name in packages)])


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _worked(
    zoo: str, name: str, *, log: Path | None, structures: Sequence[str], done: Collection[tuple[object, ...]]
) -> list[Cell]:
    """Run one network, in a process of its own if there are several; every case is logged once it is known."""
    _quiet()
    net = next(net for net in nets(zoo) if net.name == name)
    theme = themes(zoo).get(name, zoo.partition(":")[0].rpartition(".")[2])
    cells = []
    for cell in run_net(zoo, net, theme=theme, structures=structures, done=done):
        cells.append(cell)
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps(asdict(cell)) + "\n")
    return cells


def _quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)


def _short(text: str) -> str:
    """Return a text whose paths begin in a package or in the current folder."""
    return re.sub(r"/\S*/site-packages/", "", text).replace(f"{Path.cwd()}/", "")


def themes(zoo: str) -> dict[str, str]:
    """Return what each net of a zoo belongs to, if its module says so: THEMES, modules with NETS."""
    module = importlib.import_module(zoo.partition(":")[0])
    own = getattr(module, "THEMES", ())
    return {net.name: theme.__name__.rpartition(".")[2] for theme in own for net in theme.NETS}


# --- what is shown ----------------------------------------------------------------------------------------------------


def by_case(cells: Iterable[Cell]) -> Table:
    """Return a row per network."""
    rows: dict[tuple[str, str], dict[str, list[Cell]]] = {}
    for cell in cells:
        rows.setdefault((cell.zoo, cell.net), {}).setdefault(cell.structure, []).append(cell)
    table = Table("net", *STRUCTURES, PEER, box=None)
    for (_, net), own in rows.items():
        shown = [" · ".join(dict.fromkeys(map(str, own.get(structure, ())))) for structure in (*STRUCTURES, PEER)]
        table.add_row(net, *shown)
    return table


def count(cells: Iterable[Cell], kinds: Sequence[str]) -> list[int]:
    """Return how many cells are of each kind."""
    counts = Counter(cell.kind for cell in cells)
    return [counts[kind] for kind in kinds]


def totals(cells: Sequence[Cell]) -> list[str]:
    """Return what it comes to, in lines."""
    ours, peers = ([cell for cell in cells if (cell.structure == PEER) is peer] for peer in (False, True))
    own, graph, lossy, refused, raised, wrong = count(ours, KINDS)
    right, norms, peer_wrong, peer_raised = count(peers, PEER_KINDS)
    one_size = sum(ONE_SIZE in cell.detail for cell in ours if cell.kind != "refused")
    some = sum(0 < cell.cut < cell.of for cell in ours)
    said = [
        f"espalier: {own + graph} right ({own} of the user's own class, {graph} as a graph; {one_size} take inputs of "
        f"one size alone, {some} are cut in part), {lossy} only with an error, {refused} refused "
        f"({100 * share_refused(ours):.1f} %), {raised} raised, {wrong} wrong, of {len(ours)} cases"
    ]
    if peers:
        said.append(
            f"{PEER}: {right} right, {norms} wrong by the statistics of norms alone, {peer_wrong} wrong, {peer_raised} "
            f"raised, of {len(peers)} (a case per network and share: all that it prunes)"
        )
    return said


def share_refused(cells: Sequence[Cell]) -> float:
    """Return the share of refused cases."""
    return sum(cell.kind == "refused" for cell in cells) / max(1, len(cells))


def markdown(cells: Sequence[Cell]) -> str:
    """Return totals by theme and structure, and who fails where."""
    lines = [f"| networks | right | lossy | refused | raised | wrong | {PEER}: right | norms | wrong | raised |"]
    lines.append("| :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: |")
    groups = {f"{theme} ({_nets(cells, theme)})": [c for c in cells if c.theme == theme] for theme in _in_order(cells)}
    groups |= {f"*{s}*": [c for c in cells if c.structure == s] for s in STRUCTURES}
    for name, own in {**groups, "**all**": list(cells)}.items():
        of_class, graph, *rest = count([c for c in own if c.structure != PEER], KINDS)
        peers = [c for c in own if c.structure == PEER]
        told = count(peers, PEER_KINDS) if peers else ["", "", "", ""]
        lines.append(f"| {name} | {' | '.join(map(str, [of_class + graph, *rest, *told]))} |")
    lines += ["", *(f"* {said}" for said in totals(cells))]
    for kind, title in (("raised", "raises on"), ("wrong", "is wrong on"), ("norms", "is wrong by norms alone on")):
        if named := _names(c for c in cells if c.structure == PEER and c.kind == kind):
            lines.append(f"* {PEER} {title} {named}")
    if named := _names((c for c in cells if c.structure != PEER and c.kind == "refused"), structures=True):
        lines.append(f"* espalier refuses {named}")
    return "\n".join(lines) + "\n"


def _in_order(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.theme for cell in cells))


def _nets(cells: Iterable[Cell], theme: str) -> int:
    return len({cell.net for cell in cells if cell.theme == theme})


def _names(cells: Iterable[Cell], *, structures: bool = False) -> str:
    return ", ".join(dict.fromkeys(f"{c.net}: {c.structure}" if structures else c.net for c in cells))


def logged(path: Path | None) -> tuple[list[Cell], int]:
    """Return the cells of a log that today's versions made, the last of each case, and how many others made."""
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    cells = list({cell.key: cell for cell in (Cell(**json.loads(text)) for text in lines)}.values())
    current = [cell for cell in cells if cell.version == version(cell.zoo, cell.structure)]
    return current, len(cells) - len(current)


def main(
    zoos: Annotated[list[str], typer.Argument(help="package.module:MAPPING")],
    log: Annotated[Path | None, typer.Option(help="JSON lines; what is in it is not run again")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="write every case there")] = None,
    as_markdown: Annotated[Path | None, typer.Option("--markdown", help="write the totals there")] = None,
    only: Annotated[str, typer.Option(help="networks whose name matches this")] = "",
    structures: Annotated[str, typer.Option(help="separated by commas")] = ",".join((*STRUCTURES, PEER)),
    jobs: Annotated[int, typer.Option(min=1, help="processes, of one thread each")] = 1,
) -> None:
    """Cut every network in every way, and print what became of it."""
    _quiet()
    if PEER in structures:
        importlib.import_module("torch_pruning")  # once, before the processes
    names = [(zoo, net.name) for zoo in zoos for net in nets(zoo) if re.search(only, net.name)]
    for zoo, structure in product(zoos, structures.split(",")):
        version(zoo, structure)  # of the sources that the processes below run, though they may change meanwhile
    cells, others = logged(log)
    console = Console(stderr=True)
    if others:
        console.print(f"{others} cases in {log} were made by other versions: they are run again")
    work = partial(_worked, log=log, structures=structures.split(","), done=frozenset(cell.key for cell in cells))
    # A fork carries over what is imported; threads of its own would not survive one.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        runs = [pool.submit(work, zoo, name) for zoo, name in names]
        for run_ in track(as_completed(runs), "cutting", total=len(runs), console=console):
            cells += run_.result()
    place = {key: i for i, key in enumerate(names)}
    wanted = [cell for cell in cells if cell.kind != "none" and (cell.zoo, cell.net) in place]
    _show(sorted(wanted, key=lambda cell: place[cell.zoo, cell.net]), as_json, as_markdown)


def _show(cells: Sequence[Cell], as_json: Path | None, as_markdown: Path | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 240)
    console.print(by_case(cells))
    for cell in cells:
        if cell.kind in ("refused", "raised", "wrong") and cell.structure != PEER:
            console.print(f"{cell.net}, {cell.structure} {cell.share:g}: {cell.kind}: {cell.detail}", markup=False)
    for said in totals(cells):
        console.print(said, highlight=False)
    if as_json is not None:
        atomic.write_text(as_json, json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")
    if as_markdown is not None:
        atomic.write_text(as_markdown, markdown(cells))
    ours = [cell for cell in cells if cell.structure != PEER]
    sys.exit(1 if share_refused(ours) > MOST_REFUSED or any(cell.kind in ("raised", "wrong") for cell in ours) else 0)


if __name__ == "__main__":
    typer.run(main)
