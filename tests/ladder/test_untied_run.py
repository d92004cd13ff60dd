"""A run that unties: rules that would be refused are carried out, and the report says what it cost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recoup import Recipe, recover
from recoup.export import verify
from tests.models import Tied, ids

from .stand_in import SLOWER, alone

RECIPE: dict[str, Any] = {
    "scheme": "w8a16",
    "rules": [{"match": "model.lm_head", "scheme": "w8a16"}],
    "untie": True,
    "rungs": ["rtn"],
    "gates": [{"metric": "right", "max_decrease": "50%"}],
    "calibration": {"samples": 4},
    "export": {"target": "onnx"},
}


class Words(nn.Module):
    """With a name for what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Tied()

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(input_ids)}


@pytest.mark.filterwarnings(SLOWER)
def test_a_run_unties_before_its_rules_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    torch.manual_seed(0)
    model, batches = Words().eval(), [ids(4) for _ in range(2)]
    with torch.no_grad():
        best = [model(**batch)["logits"].argmax(-1) for batch in batches]

    def evaluate(model: nn.Module) -> dict[str, Any]:
        with torch.no_grad():
            found = [torch.as_tensor(model(**batch)["logits"]).argmax(-1) for batch in batches]
        return {
            "right": torch.cat([a == b for a, b in zip(found, best, strict=True)]).float().flatten().tolist()
        }

    result = recover(
        model, Recipe.model_validate(RECIPE), calibration=batches, evaluate=evaluate, folder=tmp_path / "run"
    )
    assert result.outcome == "passed"
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert set(plan["modules"]) == {"model.block", "model.lm_head"}
    (note,) = (note for note in result.record.notes if note.startswith("Untied: "))
    assert note.startswith(
        "Untied: model.lm_head.weight from model.tokens.weight. Of the bytes above, these copies are 0.02 MB "
        "in float and 0.00 MB in the formats of the plan"
    )
    assert result.artefact is not None
    assert verify(result.artefact).same


def test_a_run_with_nothing_to_untie_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    recipe = Recipe.model_validate(RECIPE | {"rules": []})
    with pytest.raises(ValueError, match=r"^untie: no two modules share"):
        recover(
            model, recipe, calibration=[torch.randn(4, 32)], evaluate=lambda _: {}, folder=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()
