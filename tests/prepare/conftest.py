"""Tables without type checks: see there."""

from tests.models import unchecked_tables

__all__ = ["unchecked_tables"]
