"""Composition: the whole path from a float model to a proven artefact."""

from recoup.ladder.ladder import Result, recover
from recoup.ladder.ptq import ptq
from recoup.ladder.run_folder import outcome_of_part
from recoup.ladder.standing import Part

__all__ = ["Part", "Result", "outcome_of_part", "ptq", "recover"]
