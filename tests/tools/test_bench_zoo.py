"""The table of networks and structures tells right from wrong, says why nothing is cut, and goes on where it was."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer import Typer
from typer.testing import CliRunner

from backends.rebuild import cut
from tools import bench_zoo, zoo_cases
from tools.bench_zoo import PEER, Cell, judged, logged, main, markdown, share_refused, totals, version
from tools.zoo_cases import STRUCTURES, Subject, cases, residual_sums

from ..zoo import ZOO
from ..zoo.net import Net, images, net

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
]


class Residual(nn.Module):
    """Enough to have every structure but heads and a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.hidden, self.last = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = x + self.body(x)
        return self.last(self.hidden(x.mean((2, 3))).relu())  # type: ignore[no-any-return]


class Hidden(Residual):
    """The same where no rule follows the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x).sort(1).values[:, :3])


class Sorted(nn.Conv2d):
    """A convolution whose weights are computed in a way that no rule follows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.weight.sort(0).values, self.bias)


PIXELS = images(3, 8, 8, other=(3, 10, 10))
RESIDUAL = net("residual", Residual, PIXELS, "")


def layers(*modules: nn.Module) -> Net:
    """Return a net of layers one after the other."""
    return net("layers", lambda: nn.Sequential(*modules), images(6), "")


def kind_of(made: Net, structure: str, share: float = 0.5) -> tuple[str, str]:
    """Return the kind and detail of one case."""
    found = judged(Subject(made), structure, share)
    assert found is not None
    return found[:2]


@pytest.mark.parametrize("share", bench_zoo.SHARES)
@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s not in ("head", "embedding")])
def test_every_structure_of_a_net_is_cut_and_right(structure: str, share: float) -> None:
    pytest.importorskip("onnxruntime")
    kind, detail, cut, of = judged(Subject(RESIDUAL), structure, share) or ("", "", 0, 0)
    assert (kind, detail) == ("graph" if structure == "depth" else "own class", "")  # the block is the net itself
    assert cut == of > 0


@pytest.mark.parametrize("structure", ["head", "embedding"])
def test_what_a_net_does_not_have_is_no_case(structure: str) -> None:
    assert judged(Subject(ZOO["plain_cnn"]), structure, 0.5) is None
    assert judged(Subject(layers(nn.Linear(6, 5))), "hidden", 0.5) is None  # an output is none


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_case_zeroes_the_share(structure: str) -> None:
    subject = Subject(RESIDUAL)
    for case in cases(subject, structure, 0.5):
        masked, _ = case.make(case.names)
        zeros = [int((p == 0).sum()) / p.numel() for p in masked.parameters() if p.dim() > 1]
        assert max(zeros) >= 0.5 - 1e-2
        assert not any((p == 0).any() for p in subject.model.parameters())


def wrong(model: nn.Module) -> nn.Module:
    """Return a model that computes something else."""
    with torch.no_grad():
        for parameter in list(model.parameters())[-2:]:
            parameter.mul_(1.01)
    return model


def forgetful(model: nn.Module) -> nn.Module:
    """Return a model that does not train."""
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (wrong, "wrong", r"on other sizes: differs by 0\.0.*in float64 or its own precision: "),
        (forgetful, "raised", "^in training: raises RuntimeError"),
    ],
)
def test_a_rebuilt_model_that_is_wrong_is_found_out(
    spoil: Callable[[nn.Module], nn.Module], kind: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cut
    monkeypatch.setattr(zoo_cases, "cut", lambda *args, **kwargs: spoil(right(*args, **kwargs)))
    found, detail = kind_of(RESIDUAL, "filter")
    assert found == kind
    assert re.search(said, detail), detail


def test_what_the_dense_net_cannot_is_not_asked() -> None:
    fixed = net("fixed", Residual, images(3, 8, 8, other=(4, 8, 8)), "")  # no net takes its second inputs
    assert set(Subject(fixed).checks) == {"in training", "in ONNX Runtime"}
    assert kind_of(fixed, "filter")[0] == "own class"


def test_nothing_that_can_be_cut_is_refused_with_the_place() -> None:
    kind, detail = kind_of(net("hidden", Hidden, PIXELS, ""), "filter")
    assert kind == "refused"
    assert re.search(r"first: reaches sort at tests/tools/test_bench_zoo\.py:\d+", bench_zoo._short(detail)), detail
    assert kind_of(net("sorted", lambda: Sorted(3, 8, 3), PIXELS, ""), "filter") == (
        "refused",
        "the weights of its convolutions are computed",
    )


def test_a_width_that_is_normalised_over_is_lossy_by_its_statistics_alone() -> None:
    kind, detail = kind_of(layers(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)), "hidden")
    assert kind == "lossy"
    assert re.fullmatch(r"changes the output by \d\S*", detail)


def test_a_lossy_cut_that_changes_more_than_statistics_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_cases, "cut", lambda *args, **kwargs: wrong(cut(*args, **kwargs)))
    made = layers(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5))
    kind, detail = kind_of(made, "hidden")
    assert kind == "wrong"
    assert detail.endswith("and not by the statistics of norms alone")


def test_residual_sums_are_counted_without_the_trace() -> None:
    assert residual_sums(Subject(RESIDUAL).program) == 1
    assert residual_sums(Subject(layers(nn.Linear(6, 5))).program) == 0
    assert residual_sums(Subject(ZOO["gpt2"]).program) == 4


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_borders_leave_a_block_of_a_kernel(share: float) -> None:
    inside = zoo_cases._border(torch.ones(1, 1, 5, 3), share, Random(0))
    rows, columns = inside.any(1), inside.any(0)
    assert torch.equal(inside.bool(), rows[:, None] & columns)
    assert 0 < inside.mean() <= 1 - share


def cell(kind: str, structure: str = "filter", **fields: Any) -> Cell:
    return Cell(**{"zoo": "z", "theme": "t", "net": kind, "share": 0.5, **fields}, structure=structure, kind=kind)


def test_totals_count_each_kind_once() -> None:
    cells = [cell("own class", cut=1, of=2), cell("graph"), cell("refused"), cell("lossy"), cell("raised", PEER)]
    ours, peer = totals(cells)
    assert (
        "2 right (1 of the user's own class, 1 as a graph; 0 take inputs of one size alone, 1 are cut in part)" in ours
    )
    assert "1 refused (25.0 %), 0 raised, 0 wrong, of 4 cases" in ours
    assert "0 right" in peer
    assert "1 raised, of 1" in peer
    assert share_refused(cells[:4]) == 0.25
    text = markdown(cells)
    assert "| **all** | 2 | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 1 |" in text
    assert "raises on raised" in text
    assert "refuses refused: filter" in text


def app() -> Typer:
    made = Typer()
    made.command()(main)
    return made


def test_a_log_is_continued_and_its_last_word_counts(tmp_path: Path) -> None:
    log, out = tmp_path / "log.jsonl", tmp_path / "all.json"
    known = {"zoo": "tests.zoo:ZOO", "theme": "plain", "net": "plain_cnn", "structure": "filter"}
    known["version"] = version("tests.zoo:ZOO", "filter")
    lines = [{**known, "share": 0.25, "kind": kind} for kind in ("own class", "wrong")]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["tests.zoo:ZOO", "--only", "^plain_cnn$", "--structures", "filter", "--log", str(log), "--json", str(out)]
    result = CliRunner().invoke(app(), asked)
    assert [(c.share, c.kind) for c in logged(log)[0]] == [(0.25, "wrong"), (0.5, "own class")]
    assert [c["kind"] for c in json.loads(out.read_text())] == ["wrong", "own class"]
    assert result.exit_code == 1  # one is wrong
    log.write_text(log.read_text().replace(known["version"], "another"))
    assert logged(log) == ([], 2)  # what other versions made is neither shown nor kept from being run again
    assert CliRunner().invoke(app(), [*asked, "--jobs", "2"]).exit_code == 0
    assert [(c.share, c.kind) for c in logged(log)[0]] == [(0.25, "own class"), (0.5, "own class")]
    log.write_text("")
    assert CliRunner().invoke(app(), asked).exit_code == 0
    assert len(log.read_text().splitlines()) == 2
