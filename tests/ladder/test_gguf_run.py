"""A whole run for llama.cpp: the exported file is measured where it ships, by the task's own `evaluate`."""

import json
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from recoup import Recipe, recover
from recoup.tasks.causal_lm import Evaluation

from .stand_in import SLOWER, alone

WORDS = 40


@pytest.mark.filterwarnings("ignore:the artefact has no tokenizer", SLOWER)
def test_a_run_measures_quality_and_cost_in_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(monkeypatch)
    monkeypatch.setitem(jaxtyping.config.__dict__, "jaxtyping_disable", True)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        start = torch.randint(0, WORDS, (8, 1))
        text = torch.as_tensor(model.generate(start, max_length=24, do_sample=True, top_k=0))
    evaluate = Evaluation(sequences=text.numpy().astype(np.int64), batch_size=4, slices={})
    recipe = Recipe.model_validate(
        {
            "scheme": "q8_0",
            "rungs": ["rtn"],
            "gates": [{"metric": "perplexity", "max_increase": "5%"}],
            "calibration": {"samples": 4},
            "export": {"target": "gguf"},
        }
    )
    batches = [{"input_ids": ids, "labels": ids} for ids in text.split(4)]
    said: list[str] = []
    result = recover(
        model, recipe, calibration=batches, evaluate=evaluate, folder=tmp_path / "run", say=said.append
    )
    assert (result.outcome, result.rung) == ("passed", "rtn")
    standing = json.loads((tmp_path / "run" / "run.json").read_text())
    rung, artefact = standing["rungs"][0]["metrics"], standing["artefact"]["metrics"]
    # The same model in another engine: a small part of what the gate allows.
    assert artefact["perplexity"] == pytest.approx(rung["perplexity"], rel=0.01)
    costs = [line for line in said if " for 4 x 24, peak " in line]
    assert [line.partition(":")[0] for line in costs] == ["float file", "exported file"]
