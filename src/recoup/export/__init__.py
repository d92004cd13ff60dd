"""Writes files, and reads them back: what ships is what was trained."""

from recoup.export.export import TARGETS, export, preflight, target_named
from recoup.export.fused import share_global_scales
from recoup.export.parity import Parity, ParityError

__all__ = [
    "TARGETS",
    "Parity",
    "ParityError",
    "export",
    "preflight",
    "share_global_scales",
    "target_named",
]
