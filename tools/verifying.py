"""The verb `verify`: artifacts against PyTorch on inputs that they have not seen."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import NonNegativeFloat
from rich.table import Table
from torch import nn

from backends import Artifact, Samples, load, load_rebuilt
from backends.contract import Session
from backends.parity import CASES, parity_of, random_cases, tolerance_of
from backends.samples import Inputs
from planner import Plan
from planner.graph import random_input
from profiles.errors import BackendUnavailable, BuildError, EspalierError
from tools.batches import Data
from tools.outcome import Count, Plain
from tools.sources import load_model
from tools.targets import weights_of

Models = Mapping[str | None, nn.Module]  # by the digest of the plan; the dense one by None
REAL_CASES = 4 * CASES


class Verified(Plain):
    """The worst errors of one artifact over random and real inputs; `ok` is None where it cannot be run here."""

    record: str
    runtime: str
    dtype: str
    tolerance: NonNegativeFloat
    inputs: str
    cases: Count = 0
    max_abs: NonNegativeFloat | None = None
    max_rel: NonNegativeFloat | None = None
    ok: bool | None = None
    detail: str = ""


def models(
    model: str, plans: Sequence[Path], weights: Sequence[Path], dense: Path | None
) -> dict[str | None, nn.Module]:
    """Return the dense model of a factory, and the rebuilt one of each plan, by the plan's digest."""
    if not plans and len(weights) > 1:
        raise EspalierError("several --weights belong to several plans; give --plan once for each")
    found: dict[str | None, nn.Module] = {
        None: load_model(model, dense if plans else dense or next(iter(weights), None))
    }
    for path, own in zip(plans, weights_of(plans, weights) if plans else (), strict=True):
        plan = Plan.load(path)
        found[plan.sha256] = load_rebuilt(plan, load_model(model), own).eval()
    return found


def verified(record: Path, models: Models, data: Data | None, *, cases: int, seed: int) -> list[Verified]:
    """Return how far an artifact is from its model: on random inputs, and on the user's if there are any.

    int8 is judged on real inputs only: noise lies outside the ranges that it was calibrated for.
    """
    artifact = _artifact(record)
    model = _model(record, artifact, models)
    example = _example(artifact)
    samples = Samples.of(data.test, like=example, calibrated=REAL_CASES * len(example[0])) if data else Samples()
    if artifact.dtype == "int8" and not samples.calibration:
        raise EspalierError(f"{record} is int8, which is judged on real inputs; give --data")
    try:
        session = load(artifact.runtime).session(artifact, model=model)
    except BackendUnavailable as error:
        return [_said(record, artifact, "random").model_copy(update={"detail": str(error)})]
    except BuildError as error:
        return [_said(record, artifact, "random").model_copy(update={"detail": str(error), "ok": False})]
    drawn = random_cases((samples.calibration or (example,))[0], samples, count=cases, seed=seed)
    found = [_compared(_said(record, artifact, "random"), session, model, list(drawn))]
    if samples.calibration:
        found.append(_compared(_said(record, artifact, "real"), session, model, samples.calibration[:REAL_CASES]))
    return found


def _artifact(record: Path) -> Artifact:
    try:
        return Artifact.load(record)
    except BuildError as error:
        if error.__cause__ is None:  # the record was edited, or the file is another: the answer is no
            raise
        raise EspalierError(str(error)) from error  # there is no record or no file: wrong use


def _model(record: Path, artifact: Artifact, models: Models) -> nn.Module:
    if artifact.plan_sha256 in models:
        return models[artifact.plan_sha256]
    raise EspalierError(f"{record} was built from another plan than those given; give its --plan and --weights")


def _example(artifact: Artifact) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return tuple(random_input(spec.shape, spec.dtype, generator) for spec in artifact.inputs)


def _said(record: Path, artifact: Artifact, inputs: str) -> Verified:
    return Verified(
        record=str(record),
        runtime=f"{artifact.runtime} {artifact.runtime_version}",
        dtype=artifact.dtype,
        tolerance=tolerance_of(artifact.dtype),
        inputs=inputs,
    )


def _compared(said: Verified, session: Session, model: nn.Module, cases: Sequence[Inputs]) -> Verified:
    try:
        parity = parity_of(said.runtime, session, model=model, cases=cases)
    except BuildError as error:
        return said.model_copy(update={"cases": len(cases), "ok": False, "detail": str(error)})
    except Exception as error:  # a foreign runtime, or the model: whatever it raises, it does not take these inputs
        detail = f"inputs like those in the record are not taken: {error}"
        return said.model_copy(update={"cases": len(cases), "ok": False, "detail": detail})
    if not np.isfinite(parity.max_rel):
        detail = "NaN or infinity where PyTorch has numbers, or anything where it has 0"
        return said.model_copy(update={"cases": parity.cases, "ok": False, "detail": detail})
    judged = said.dtype != "int8" or said.inputs == "real"
    return said.model_copy(
        update={**parity.model_dump(), "ok": parity.max_rel <= said.tolerance or not judged}
        | ({} if judged else {"detail": "int8 is judged on real inputs"})
    )


def table(found: Sequence[Verified]) -> Table:
    """Return the errors for the terminal."""
    shown = Table("artifact", "runtime", "inputs", "max abs", "max rel", "tolerance", "right", box=None)
    for each in found:
        errors = ["-" if error is None else f"{error:.2e}" for error in (each.max_abs, each.max_rel)]
        verdict = {True: "yes", False: "NO", None: "not run"}[each.ok]
        what = f"{each.cases} {each.inputs}"
        shown.add_row(each.record, f"{each.runtime} {each.dtype}", what, *errors, f"{each.tolerance:g}", verdict)
    details = dict.fromkeys(f"{each.record}: {each.detail}" for each in found if each.detail)
    shown.caption, shown.caption_justify = "\n".join(details) or None, "left"
    return shown
