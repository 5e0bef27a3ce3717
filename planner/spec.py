"""The plan: plain data that says what is kept, why, and with which WGSEF groups, weights and budgets it is trained."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from planner.graph import Graph, random_input, trace
from planner.operations import Choice
from profiles import atomic
from profiles.errors import PlanError

T = TypeVar("T", bound=BaseModel)
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Basis = Literal["measured here", "measured elsewhere", "estimated by the compiler", "documented"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class InputSpec(_Part):
    """One input of the model."""

    shape: tuple[Annotated[int, Field(gt=0)], ...]
    dtype: str


class WidthPlan(_Part):
    """What becomes of one width."""

    name: str
    dense: Annotated[int, Field(gt=0)]
    keep: Count  # 0: the block around it leaves
    considered: tuple[int, ...]
    structure: Literal["filter", "hidden", "head", "embedding"] = "filter"
    lossless: bool = True  # removing channels whose weights are zero changes no output
    cost_s: Annotated[float, Field(ge=0)]  # of a channel: its share of the device's next step, or of the last
    quantum: Annotated[int, Field(gt=0)] = 1  # the step of the device for all layers that the width touches
    losses: tuple[float, ...] = ()  # of each candidate considered, alone
    fractions: tuple[float, ...] = ()  # latency of dense with each candidate, all else as planned

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.keep > self.dense:
            raise ValueError(f"width {self.name} keeps {self.keep} of {self.dense} channels")
        return self


class TrimPlan(_Part):
    """What becomes of one layer beside its widths: of its inputs, of its kernel's border, or of every M weights."""

    name: str  # the weight, and "channel", "kernel" or "n:m"
    structure: Literal["channel", "kernel", "nm"]
    dense: Annotated[int, Field(gt=0)]  # all inputs, all positions of the kernel, or M
    keep: Annotated[int, Field(gt=0)]
    considered: tuple[int, ...]
    losses: tuple[float, ...]  # of each number considered, alone
    fractions: tuple[float, ...]  # latency of dense with each, all else as planned

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.keep > self.dense:
            raise ValueError(f"{self.name} keeps {self.keep} of {self.dense}")
        return self

    @property
    def layer(self) -> str:
        """The name of the layer."""
        return self.name.rpartition(" ")[0].rpartition(".")[0]


class BlockPlan(_Part):
    """What becomes of one residual block."""

    name: str
    removed: bool


class Pool(_Part):
    """One WGSEF pool: the groups of some structures that share a budget.

    The budget and the costs are in one unit: 1 per group for a pool of one width, seconds for a pool over several.
    """

    name: str
    structure: Literal[
        "filter", "hidden", "head", "embedding", "depth", "block", "channel", "filter_shape", "kernel", "nm"
    ]
    members: tuple[str, ...]  # widths, blocks, "width/quantum" of runs, weights, "weight 1x1" of kernels, "weight 2:4"
    weights: tuple[Positive, ...]  # a_j, the same for all groups of a member
    costs: tuple[Positive, ...]  # d_j, the same for all groups of a member
    budget: Annotated[float, Field(ge=0)]


class Prediction(_Part):
    """What the planner expects of a network, what that rests on, and how far to trust it."""

    basis: Basis  # a table measured on this device, or on another, or of its compiler's estimates; or documented rules
    fraction: Positive  # of the dense latency
    low: Annotated[float, Field(ge=0)]  # of the 95 % interval of a table; of what the rules leave open
    high: Positive
    expected_error: Annotated[float, Field(ge=0)] | None  # mean relative; None: never held against other networks
    dense_s: float | None  # None: the rules know ratios only
    latency_s: float | None
    macs: Count
    dense_macs: Count
    table_sha256: str | None = None

    @property
    def trust(self) -> str:
        """What it rests on and how far it is off on average, in words."""
        error = "unknown" if self.expected_error is None else f"{self.expected_error:.1%}"
        return f"{self.basis}, expected error {error}"


class Proof(_Part):
    """How far the integer program was solved."""

    status: str
    objective: float
    bound: float
    gap: float
    solved_s: Annotated[float, Field(ge=0)] = 0.0


class LimitPlan(_Part):
    """One constraint of the plan: in its unit, or in fractions of the dense model where only ratios are known."""

    name: str  # "latency on PROFILE", "parameters", "model_bytes", "activation_bytes" or "macs"
    given: str
    unit: Literal["s", "B", "", "of dense"]
    dense: Positive
    budget: Positive
    planned: Annotated[float, Field(ge=0)]


class Strength(_Part):
    """How WGSEF's step sizes rise in training, as planner.prox states it; the strength follows the optimizer's rate."""

    total: Positive = 6.0  # the sum of the step sizes
    shrinking: Annotated[float, Field(gt=0, le=1)] = 0.5  # the share of the steps in which groups shrink
    anneal: Annotated[float, Field(ge=0, le=1)] = 0.0  # the share of those in which budgets fall to the target


class Plan(_Part):
    """The group spec: reviewable, versioned, bound to one model by its fingerprint and to its content by a digest."""

    schema_version: Literal[1] = 1
    profile: str
    fingerprint: str
    inputs: tuple[InputSpec, ...]
    target_fraction: Positive
    widths: tuple[WidthPlan, ...]
    blocks: tuple[BlockPlan, ...]
    pools: tuple[Pool, ...]
    trims: tuple[TrimPlan, ...] = ()
    limits: tuple[LimitPlan, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()  # widths that keep the same share of their channels
    strength: Strength = Strength()
    profile_sha256: str | None = None
    debiased: bool = True
    lossy: bool = False  # widths that a layer normalisation runs over were offered too
    forced: bool = False  # structures are cut, and gathers made, although the profile does not say that it pays
    importance: str
    predicted: Prediction
    proof: Proof
    notes: tuple[str, ...] = ()

    @property
    def choice(self) -> Choice:
        """What the plan keeps of the widths and trims that it names, and the blocks that it removes."""
        removed = frozenset(block.name for block in self.blocks if block.removed)
        trims = {trim.name: trim.keep for trim in self.trims}
        return Choice({**{width.name: width.keep for width in self.widths}, **trims}, removed)

    @property
    def lossless(self) -> bool:
        """Whether removing what the plan cuts changes no output once its weights are zero."""
        return all(width.lossless for width in self.widths if width.keep < width.dense)

    @property
    def sha256(self) -> str:
        """The digest of the content."""
        return hashlib.sha256(canonical(self.model_dump(mode="json"))).hexdigest()

    def from_elsewhere(self, reasons: tuple[str, ...]) -> Self:
        """Return the plan that says why its latency table does not belong to this machine or to these conditions."""
        found = self.predicted.basis
        basis = found if found == "estimated by the compiler" else "measured elsewhere"
        predicted = self.predicted.model_copy(update={"basis": basis})
        return self.model_copy(update={"predicted": predicted, "notes": (*self.notes, *reasons)})

    def diff(self, other: "Plan") -> tuple[str, ...]:
        """Return what `other` decides differently, a line each; empty if both keep the same."""
        kept, removed = other.choice.keep, other.choice.removed
        lines = [
            f"{name}: {count or 'removed'} -> {kept[name] or 'removed'}"
            for name, count in self.choice.keep.items()
            if name in kept and kept[name] != count
        ]
        lines += [f"{name}: only in this plan" for name in self.choice.keep if name not in kept]
        lines += [f"{name}: only in the other plan" for name in kept if name not in self.choice.keep]
        lines += [f"block {name} leaves" for name in sorted(removed - self.choice.removed)]
        lines += [f"block {name} stays" for name in sorted(self.choice.removed - removed)]
        for what, own, others in (
            ("profile", self.profile, other.profile),
            ("model", self.fingerprint, other.fingerprint),
            ("importance", self.importance, other.importance),
            ("latency of dense", f"{self.predicted.fraction:.3f}", f"{other.predicted.fraction:.3f}"),
        ):
            lines += [f"{what}: {own} -> {others}"] if own != others else []
        return tuple(lines)

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON with its digest, atomically."""
        content = {**self.model_dump(mode="json"), "sha256": self.sha256}
        atomic.write_text(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a plan; raises PlanError if the file is not a whole, unedited plan of this version."""
        return read(cls, path, "espalier plan")

    def inputs_like(self, *, seed: int = 0) -> tuple[Tensor, ...]:
        """Return fresh random inputs of the plan's shapes."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(random_input(spec.shape, spec.dtype, generator) for spec in self.inputs)

    def graph(self, model: nn.Module) -> Graph:
        """Trace `model`; raises PlanError if the plan was made for another one."""
        device = next(model.parameters()).device
        graph = trace(model, tuple(x.to(device) for x in self.inputs_like()), lossy=self.lossy)
        if graph.fingerprint != self.fingerprint:
            raise PlanError(
                f"the plan was made for another model: its fingerprint is {self.fingerprint}, this model's is "
                f"{graph.fingerprint}; run `espalier plan` on this model"
            )
        return graph


def read(cls: type[T], path: Path | str, remedy: str) -> T:
    """Read a document that carries its own digest; raises PlanError naming the file, what is wrong and `remedy`."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}; make it with `{remedy}`") from error
    except ValueError as error:
        raise PlanError(f"{path} is truncated or not JSON ({error}); make it again with `{remedy}`") from error
    digest = content.pop("sha256", None) if isinstance(content, dict) else None
    try:
        document = cls.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PlanError(f"{path}: {where or 'document'}: {first['msg']}; make it again with `{remedy}`") from error
    if digest != hashlib.sha256(canonical(content)).hexdigest():
        raise PlanError(f"{path} was edited after it was written (its sha256 differs); make it again with `{remedy}`")
    return document


def canonical(content: object) -> bytes:
    """Return the bytes that digests are made of."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
