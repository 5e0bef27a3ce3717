"""The options that say which layers may be cut and what is limited: one set for every verb that plans."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from planner import Limits, Scope
from profiles.errors import EspalierError

RANKINGS = ("measured", "taylor", "magnitude", "batchnorm", "random")  # what --importance takes
_Names = list[str] | None
OPTIONS: dict[str, Any] = {
    "op_types": Annotated[_Names, typer.Option("--op-types", help="cut only layers of this class, e.g. Conv2d")],
    "op_names": Annotated[_Names, typer.Option("--op-names", help="cut only layers of this name")],
    "op_names_re": Annotated[_Names, typer.Option("--op-names-re", help="cut only layers whose name matches")],
    "exclude_op_names": Annotated[_Names, typer.Option("--exclude-op-names", help="do not cut layers of this name")],
    "ignored_layers": Annotated[_Names, typer.Option("--ignored-layers", help="nor what lies within this module")],
}
MIN_WIDTH = Annotated[int, typer.Option("--min-width", min=1, help="channels that every width keeps at least")]
FLAGS: dict[str, Any] = {
    "lossy": Annotated[bool, typer.Option("--lossy", help="cut also what a layer norm runs over: changes the output")],
    "force": Annotated[bool, typer.Option("--force", help="cut also structures that do not pay on the device")],
    "keep_blocks": Annotated[bool, typer.Option("--keep-blocks", help="no residual block leaves")],
}


def scoped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a Scope, and the Scope itself as its argument `scope`."""
    given = inspect.signature(command)
    kind = inspect.Parameter.KEYWORD_ONLY
    extra = [inspect.Parameter(name, kind, annotation=hint, default=None) for name, hint in OPTIONS.items()]
    extra.append(inspect.Parameter("min_width", kind, annotation=MIN_WIDTH, default=1))
    extra += [inspect.Parameter(name, kind, annotation=hint, default=False) for name, hint in FLAGS.items()]

    @wraps(command)
    def with_scope(**options: Any) -> None:
        said: dict[str, Any] = {name: tuple(options.pop(name) or ()) for name in OPTIONS}
        said |= {name: options.pop(name) for name in ("min_width", "lossy", "force")}
        scope = Scope(**said, removes_blocks=not options.pop("keep_blocks"))
        command(**options, scope=scope)

    own = [p.replace(kind=kind) for p in given.parameters.values() if p.name != "scope"]
    with_scope.__signature__ = given.replace(parameters=[*own, *extra])  # type: ignore[attr-defined]
    with_scope.__annotations__ = {p.name: p.annotation for p in (*own, *extra)}
    return with_scope


AMOUNTS: dict[str, Any] = {
    "parameters": Annotated[
        str | None, typer.Option("--parameters", help="at most so many: 0.5 (of dense) or '1.5 M'")
    ],
    "model_bytes": Annotated[str | None, typer.Option("--model-bytes", help="of weights: 0.5 or '2 MB'")],
    "activation_bytes": Annotated[
        str | None, typer.Option("--activation-bytes", help="peak over a run: 0.5, '256 KiB' or on-chip")
    ],
    "macs": Annotated[str | None, typer.Option("--macs", help="multiply-accumulates: 0.5 or '300 M'")],
}
TIED = Annotated[_Names, typer.Option("--tied", metavar="A=B", help="widths that keep the same share of channels")]
GAP = Annotated[float, typer.Option("--gap", min=0, help="relative gap of the loss at which the solver may stop")]


def limited(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of Limits, and the Limits itself as its argument `limits`."""
    given = inspect.signature(command)
    kind = inspect.Parameter.KEYWORD_ONLY
    extra = [inspect.Parameter(name, kind, annotation=hint, default=None) for name, hint in AMOUNTS.items()]
    extra.append(inspect.Parameter("tied", kind, annotation=TIED, default=None))
    extra.append(inspect.Parameter("gap", kind, annotation=GAP, default=0.0))

    @wraps(command)
    def with_limits(**options: Any) -> None:
        said = {name: options.pop(name) for name in AMOUNTS}
        tied = tuple(_pair(text) for text in options.pop("tied") or ())
        limits = Limits(**said, tied=tied, gap=options.pop("gap"))
        command(**options, limits=limits)

    own = [p.replace(kind=kind) for p in given.parameters.values() if p.name != "limits"]
    with_limits.__signature__ = given.replace(parameters=[*own, *extra])  # type: ignore[attr-defined]
    with_limits.__annotations__ = {p.name: p.annotation for p in (*own, *extra)}
    return with_limits


def _pair(text: str) -> tuple[str, str]:
    one, equal, other = text.partition("=")
    if not (one and equal and other):
        raise EspalierError(f"--tied {text!r} does not name two widths; write A=B, as `espalier groups` lists them")
    return one, other
