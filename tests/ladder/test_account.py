"""The notes of a report."""

import pytest
from torch import nn

from recoup import Recipe, explain, resolve
from recoup.ladder.account import notes_of


@pytest.mark.parametrize(
    ("rules", "note"),
    [
        ((), "Nothing stays in float."),
        (({"match": "1", "scheme": "none"},), "In float stay: rule '1' (0.04 MB)."),
    ],
    ids=["nothing", "one layer"],
)
def test_a_report_says_what_stays_in_float(rules: tuple[object, ...], note: str) -> None:
    model = nn.Sequential(*(nn.Linear(96, 96, bias=False) for _ in range(3)))
    plan = resolve(model, Recipe.model_validate({"scheme": "w8a8", "rules": rules}))
    assert notes_of(explain(model, plan), None, None, smoothed=False)[1] == note
