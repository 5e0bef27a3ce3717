"""Small networks, one per way in which people use tensors, and real ones from `transformers` in `public`."""

from . import branches, language, mobile, plain, residual, sequences, shapes, vision
from .net import Inputs, Net

__all__ = ["ZOO", "Inputs", "Net"]

THEMES = (plain, residual, mobile, branches, vision, language, sequences, shapes)

ZOO: dict[str, Net] = {net.name: net for theme in THEMES for net in theme.NETS}
