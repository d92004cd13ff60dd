"""Writes files, and reads them back: what ships is what was trained."""

from recoup.export.export import export, preflight
from recoup.export.fused import share_global_scales
from recoup.export.parity import Parity, ParityError
from recoup.export.targets import TARGETS, target_named, usable

__all__ = [
    "TARGETS",
    "Parity",
    "ParityError",
    "export",
    "preflight",
    "share_global_scales",
    "target_named",
    "usable",
]
