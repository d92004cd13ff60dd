"""Composition: the whole path from a float model to a proven artefact."""

from recoup.ladder.ladder import Result, ptq, recover
from recoup.ladder.run_folder import finished

__all__ = ["Result", "finished", "ptq", "recover"]
