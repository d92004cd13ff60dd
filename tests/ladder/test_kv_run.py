"""A whole run with keys and values in fp8: trained, measured, exported, proved."""

import json
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

from recoup import Recipe, recover
from recoup.tasks.causal_lm import Evaluation

WORDS = 40


def model() -> Qwen3ForCausalLM:
    set_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=WORDS,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    ).eval()


@pytest.mark.filterwarnings("ignore:the artefact has no tokenizer")
def test_a_run_trains_and_ships_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(jaxtyping.config.__dict__, "jaxtyping_disable", True)
    with torch.no_grad():
        start = torch.randint(0, WORDS, (8, 1))
        text = torch.as_tensor(model().generate(start, max_length=24, do_sample=True, top_k=0))
    evaluate = Evaluation(sequences=text.numpy().astype(np.int64), batch_size=4, slices={})
    recipe = Recipe.model_validate(
        {
            "scheme": "w4a16",
            "kv": "fp8",
            "rungs": ["qat"],
            "train": {"steps": 4, "evaluate_every": 2, "checkpoint_every": 2, "held_out": 0.5},
            "gates": [{"metric": "perplexity", "max_increase": "20%"}],
            "calibration": {"samples": 4},
            "export": {"target": "compressed-tensors", "consumer": "vllm>=0.27"},
        }
    )
    batches = [{"input_ids": ids, "labels": ids} for ids in text.split(4)]
    result = recover(
        model(), recipe, calibration=batches, train=batches, evaluate=evaluate, folder=tmp_path / "run"
    )
    assert (result.outcome, result.rung) == ("passed", "qat")
    standing = json.loads((tmp_path / "run" / "run.json").read_text())
    (rung,), artefact = standing["rungs"], standing["artefact"]
    # transformers computes the same products in the same order; a mean over fewer than 2^10 words is left.
    assert artefact["metrics"]["perplexity"] == pytest.approx(rung["metrics"]["perplexity"], rel=2**-13)
    stored = load_file(tmp_path / "run" / "artefact" / "model.safetensors")
    assert sum(name.endswith(("k_scale", "v_scale")) for name in stored) == 4
    assert "w4a16, keys and values e4m3 per tensor, static" in (tmp_path / "run" / "report.md").read_text()
