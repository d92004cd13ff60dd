"""SmolLM2-135M on State-of-the-Union addresses for qat_quality.py; test speeches from later years."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME, METRIC, BATCH = "SmolLM2-135M", "perplexity", "2 x 256 tokens"
STEPS, LEARNING_RATE = 40, 2e-5
FORMATS = {
    "int4": "int4 g32 weights, int8 dynamic inputs",
    "int3": "int3 g32 weights",
    "int2": "int2 g32 weights",
    "mxfp4": "MXFP4 weights and inputs",
    "nvfp4": "NVFP4 weights and inputs",
}
# The same for every format: the rungs gptq and qat of a recipe with these keys, on the training text alone.
RECOUP: dict[str, Any] = {
    "recipe": {"weight_ranges": "learned"},
    "settings": {"loss": {"task": 0.8, "logits-kl": 0.2}, "scale_learning_rate": 2e-4},
    "gptq samples": 80,
}
# Channels are balanced where inputs are quantized, too; weights alone fare better without (int2: 464 to 702).
SMOOTH = ("int4", "mxfp4", "nvfp4")
TRAIN_WINDOW, TEST_WINDOW, TEST_WINDOWS = 256, 512, 24


def scheme(format_: str) -> str:
    """recoup's name of it."""
    return {"int4": "w4a8", "int3": "w3a16", "int2": "w2a16"}.get(format_, format_)


def prepare(work: Path, steps: int) -> dict[str, str]:
    """The model's folder and the tokens, made once: train (blocks, 2, 256), test (24, 512)."""
    from transformers import AutoTokenizer

    from recoup.tasks.assets import fetch

    model, text = fetch("smollm2-135m"), fetch("sotu")
    tokens = work / f"tokens-{steps}.npz"
    if not tokens.is_file():
        tokenizer = AutoTokenizer.from_pretrained(model)

        def packed(part: str, window: int) -> np.ndarray:
            speeches = [json.loads(line)["text"] for line in (text / f"{part}.jsonl").open(encoding="utf-8")]
            ids = [
                i for speech in speeches for i in [*tokenizer(speech)["input_ids"], tokenizer.eos_token_id]
            ]
            return np.array(ids[: len(ids) // window * window]).reshape(-1, window)

        train, test = packed("train", TRAIN_WINDOW), packed("test", TEST_WINDOW)
        chosen = np.random.default_rng(0).permutation(len(train))[: 2 * steps]
        spread = np.linspace(0, len(test) - 1, TEST_WINDOWS).astype(int)
        work.mkdir(exist_ok=True)
        np.savez(tokens, train=train[chosen].reshape(steps, 2, -1), test=test[spread])
    return {"model": str(model), "data": str(tokens)}


def load(job: dict[str, Any]) -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Model, training batches and test batches."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model.config.use_cache = False
    tokens = np.load(job["data"])
    train, test = torch.from_numpy(tokens["train"]), torch.from_numpy(tokens["test"])
    batches = [{"input_ids": ids, "labels": ids} for ids in train[: job["steps"]]]
    return model, batches, [{"input_ids": ids} for ids in test.split(8)]


@torch.no_grad()
def measure(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Of every token but the first of each window."""
    model.eval()
    losses = [
        F.cross_entropy(
            model(**batch)["logits"][:, :-1].flatten(0, 1).float(),
            batch["input_ids"][:, 1:].flatten(),
            reduction="none",
        )
        for batch in batches
    ]
    return {"perplexity": math.exp(min(torch.cat(losses).double().mean().item(), 700.0))}
