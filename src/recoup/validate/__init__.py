"""Is the quantized model as good as the float one? Validate never changes the model.

A number is believed only with its uncertainty: `samples.py` keeps the per-sample values, `gates.py`
compares them in pairs and gives a verdict, `report.py` and `plots.py` show a whole run to its reader.
"""

from recoup.validate.gates import Gate, Outcome, Verdict, outcome_of
from recoup.validate.report import Cost, Report, Rung, html, markdown, write
from recoup.validate.samples import AGGREGATES, Samples

__all__ = [
    "AGGREGATES",
    "Cost",
    "Gate",
    "Outcome",
    "Report",
    "Rung",
    "Samples",
    "Verdict",
    "html",
    "markdown",
    "outcome_of",
    "write",
]
