"""The comparison of training methods runs each once, ends all on one budget, and goes on where it was interrupted."""

import json
from pathlib import Path

import pytest
import torch

from planner import Recipe
from profiles.errors import EspalierError
from tools import bench_training as bench
from tools.examples.resnet import ResNet


def run(cifar: dict[str, Path], **options: object) -> None:
    bench.main(**{"seeds": 1, "epochs": 2, "keep": 0.5, "lr": 0.01, "as_json": True, **cifar, **options})


def test_every_method_starts_alike_and_ends_on_the_budget(
    cifar: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run(cifar, bfloat16=True)
    results = json.loads(capsys.readouterr().out)
    assert [result["method"] for result in results] == [method.name for method in bench.METHODS]
    assert {result["kept_groups"] for result in results} == {4 + 4 + 8}
    assert len({result["dense"] for result in results}) == 1
    assert {result["cut_groups"] for result in results[3:]} == {16}
    assert [json.loads(line)["result"] for line in cifar["log"].read_text().splitlines()] == results


def test_an_interrupted_comparison_goes_on_with_what_is_missing(
    cifar: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cifar)
    whole, lines = json.loads(capsys.readouterr().out), cifar["log"].read_text().splitlines()
    cifar["log"].write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    trained, ran = bench.trained, []

    def counted(method: bench.Method, start: bench.Start, recipe: Recipe) -> bench.Result:
        ran.append(method.name)
        return trained(method, start, recipe)

    monkeypatch.setattr(bench, "trained", counted)
    run(cifar)
    assert ran == [bench.METHODS[2].name]
    results = json.loads(capsys.readouterr().out)
    assert sorted(results, key=str) == sorted(whole, key=str)
    run(cifar, epochs=3)
    assert len(ran) == 6  # runs of another setting do not count
    run(cifar, as_json=False)
    assert len(ran) == 6
    table = capsys.readouterr().out
    assert all(method.name in table for method in bench.METHODS)


@pytest.mark.parametrize("line", ["{", "{}", '{"setting": 1}', "[]"])
def test_another_file_is_no_log(line: str, cifar: dict[str, Path]) -> None:
    cifar["log"].write_text(line + "\n")
    with pytest.raises(EspalierError, match=r"log.jsonl:1 is not a run of this benchmark .*; remove the line"):
        run(cifar)


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.01])
def test_a_uniform_plan_keeps_a_share_of_every_inner_width_and_at_least_one(keep: float) -> None:
    plan = bench.uniform(ResNet(1, (16, 32, 64)), (torch.ones(1, 3, 8, 8),), keep=keep)
    assert [(width.dense, width.keep) for width in plan.widths] == [
        (size, max(1, round(size * keep))) for size in (16, 32, 64)
    ]


def test_the_convex_form_trains_without_weight_decay_on_what_it_penalises(
    cifar: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decays: dict[str, list[float]] = {}
    for method in bench.METHODS:

        class Looking(torch.optim.SGD):
            def __init__(self, *args: object, own: str = method.name, **options: object) -> None:
                super().__init__(*args, **options)  # type: ignore[arg-type]
                decays[own] = [group["weight_decay"] for group in self.param_groups]

        monkeypatch.setattr(bench, "METHODS", (method,))
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim, "SGD", Looking)
            run({**cifar, "log": cifar["log"].with_name(f"{len(decays)}.jsonl")})
    assert decays.pop("WGSEF convex") == [5e-4, 0.0]
    assert set(map(tuple, decays.values())) == {(5e-4,)}
