"""Writes files, and reads them back: what ships is what was trained."""

from recoup.export.export import export, preflight
from recoup.export.fused import share_global_scales
from recoup.export.parity import Parity, ParityError
from recoup.export.targets import TARGETS, target_named, usable
from recoup.export.verification import Check, Verification
from recoup.export.verify import verify

__all__ = [
    "TARGETS",
    "Check",
    "Parity",
    "ParityError",
    "Verification",
    "export",
    "preflight",
    "share_global_scales",
    "target_named",
    "usable",
    "verify",
]
