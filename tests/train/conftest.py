"""Tests over models run without type checks of numerics."""

from tests.models import unchecked_tables

__all__ = ["unchecked_tables"]
