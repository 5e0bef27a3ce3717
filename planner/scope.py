"""Which layers a plan may cut, in the words that users of other tools know."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from planner.blocks import Block
from planner.graph import Graph
from planner.widths import Width
from profiles.errors import PlanError

_LAYERS = frozenset(("Conv1d", "Conv2d", "Conv3d", "Linear"))


@dataclass(frozen=True)
class Scope:
    """What may be cut: of the widths that a layer makes, those of layers selected and not excluded.

    A width tied over several layers is cut only if all of them may be. Raises PlanError for a name that is no layer.
    """

    op_types: tuple[str, ...] = ()  # classes of layers, e.g. "Conv2d"; none given: all
    op_names: tuple[str, ...] = ()  # names of layers; none given: all
    op_names_re: tuple[str, ...] = ()  # regular expressions over names of layers
    exclude_op_names: tuple[str, ...] = ()
    ignored_layers: tuple[str | nn.Module, ...] = ()  # names or modules; what lies within one is ignored too
    min_width: int | Mapping[str, int] = 1  # channels that are kept at least: of every width, or by width
    lossy: bool = False  # cut also what a layer normalisation runs over, which changes the output
    force: bool = False  # cut also structures that do not pay on the device
    removes_blocks: bool = True  # whether whole residual blocks may leave

    def applied(self, graph: Graph, model: nn.Module) -> Graph:
        """Return the graph with what lies outside of the scope kept from being cut."""
        modules = dict(model.named_modules())
        self._check(modules)
        ignored = self._ignored(modules)

        widths = tuple(replace(w, frozen=w.frozen or self.reason(w.makers, modules)) for w in graph.widths)
        blocks = tuple(replace(b, frozen=b.frozen or self._keeps(b, ignored, modules)) for b in graph.blocks)
        return replace(graph, widths=widths, blocks=blocks)

    def reason(self, makers: Sequence[str], modules: Mapping[str, nn.Module]) -> str | None:
        """Return why layers lie outside of the scope, None if all lie within."""
        outside = [name for name in makers if not self._selects(name, modules.get(name))]
        if outside:
            return f"{outside[0]} is not selected"
        ignored = self._ignored(modules)
        inside = [name for name in makers if any(name == own or name.startswith(f"{own}.") for own in ignored)]
        return f"{inside[0]} is ignored" if inside else None

    def _keeps(self, block: Block, ignored: Sequence[str], modules: Mapping[str, nn.Module]) -> str | None:
        """Return why a block stays: all of its layers must be free to leave."""
        if not self.removes_blocks:
            return "blocks are kept"
        for name in sorted(block.modules):
            if not self._selects(name, modules.get(name)) and type(modules.get(name)).__name__ in _LAYERS:
                return f"its layer {name} is not selected"
            if any(name == own or name.startswith(f"{own}.") for own in ignored):
                return f"its layer {name} is ignored"
        return None

    def at_least(self, width: Width) -> int:
        """Return how many channels of a width are kept at least."""
        return self.min_width if isinstance(self.min_width, int) else self.min_width.get(width.name, 1)

    def _selects(self, name: str, module: nn.Module | None) -> bool:
        if name in self.exclude_op_names:
            return False
        if self.op_types and type(module).__name__ not in self.op_types:
            return False
        named = name in self.op_names or any(re.search(pattern, name) for pattern in self.op_names_re)
        return named or not (self.op_names or self.op_names_re)

    def _ignored(self, modules: Mapping[str, nn.Module]) -> list[str]:
        names = {id(module): name for name, module in modules.items()}
        return [own if isinstance(own, str) else names.get(id(own), "") for own in self.ignored_layers]

    def _check(self, modules: Mapping[str, nn.Module]) -> None:
        given = (*self.op_names, *self.exclude_op_names, *(own for own in self.ignored_layers if isinstance(own, str)))
        for name in given:
            if name not in modules:
                raise PlanError(f"the model has no layer {name!r}; `espalier groups` lists them")
        for own in self.ignored_layers:
            if not isinstance(own, str) and not any(own is module for module in modules.values()):
                raise PlanError(f"an ignored layer, {type(own).__name__}, is not in the model; give its name")
        types = {type(module).__name__ for module in modules.values()}
        for kind in self.op_types:
            if kind not in types:
                raise PlanError(f"the model has no layer of type {kind!r}; it has {', '.join(sorted(types))}")
