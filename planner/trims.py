"""Trims: what a single layer can lose beside its widths, as a number to keep like that of a width."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from planner.structures import NM, Channel, Kernel, Structure, of_width
from planner.widths import Width

Needs = Mapping[str, frozenset[int]]  # numbers that widths or other trims may keep


@dataclass(frozen=True)
class Trim:
    """How many inputs a layer reads, how many positions of its kernel stay, or how many of every M weights."""

    groups: Channel | Kernel | NM
    size: int  # all inputs, all positions, or M
    counts: tuple[int, ...]  # what is considered, `size` the last
    needs: Needs  # what must hold where it keeps fewer than all
    block: None = None  # its layer may lie in one, but it costs nothing to keep what leaves

    @property
    def name(self) -> str:
        """The weight's name and what is trimmed, as `Operation.trimmed` asks for it."""
        return f"{self.groups.tensor} channel" if isinstance(self.groups, Channel) else self.groups.name

    @property
    def structure(self) -> Literal["channel", "kernel", "nm"]:
        """What plans call it."""
        return "channel" if isinstance(self.groups, Channel) else "kernel" if self.thins else "nm"

    def pool(self, keep: int) -> tuple[str, float]:
        """Return the name and the budget of the pool that trains a layer to it: of a kernel's border nothing stays."""
        if isinstance(self.groups, Kernel):
            return replace(self.groups, inner=keep).name, 0.0
        return self.groups.name, float(keep)

    @property
    def thins(self) -> bool:
        """Whether there are fewer weights afterwards."""
        return not isinstance(self.groups, NM)


def structure_of(part: Width | Trim) -> Structure:
    """Return the structure whose groups a width or a trim keeps a number of."""
    return part.groups if isinstance(part, Trim) else of_width(part)
