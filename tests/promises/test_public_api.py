"""The snippets of the design's "Public API", as they stand there, on a small language model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import recoup
from recoup.engines.onnxruntime import OnnxModel

WORDS = 16


def text(samples: int) -> Tensor:
    """Sentences that count upwards: a small model can learn them."""
    return (torch.randint(0, WORDS, (samples, 1)) + torch.arange(12)) % WORDS


def language_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        ids = text(16)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_snippets_work_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, unseen = language_model(), text(64)
    batches = [{"input_ids": ids} for ids in text(64).split(16)]
    loader = DataLoader([{"input_ids": ids, "labels": ids} for ids in text(64)], batch_size=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # before anything is prepared

    @torch.no_grad()
    def evaluate(model: nn.Module) -> recoup.Samples:
        logits = model(input_ids=unseen).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), unseen[:, 1:], reduction="none")
        return recoup.Samples({"perplexity": loss.mean(dim=1).numpy()})

    baseline = evaluate(model)
    plan = recoup.resolve(model, recoup.Recipe(scheme="w4a8"))
    print(recoup.explain(model, plan))
    recoup.prepare(model, plan)
    recoup.calibrate(model, batches, observer="mse")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    verdict = recoup.Gate("perplexity", max_increase="2%").check(baseline, evaluate(model))
    assert verdict.passed, verdict

    with pytest.warns(UserWarning, match="no tokenizer"):
        recoup.export(model, "out/", target="onnx")
    shipped = evaluate(OnnxModel("out"))
    assert recoup.Gate("perplexity", max_increase="2%").check(baseline, shipped).passed


def test_ptq_is_one_call() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 32)
    before = model(x)
    recoup.ptq(model, "nvfp4", [x])
    assert not torch.equal(model(x), before)


def test_the_public_names_are_there_and_no_others() -> None:
    assert len(recoup.__all__) == len(set(recoup.__all__))
    assert all(hasattr(recoup, name) for name in recoup.__all__)
    snippets = "ptq export resolve explain prepare calibrate Recipe Gate Samples recover param_groups train"
    assert set(snippets.split()) <= set(recoup.__all__)
