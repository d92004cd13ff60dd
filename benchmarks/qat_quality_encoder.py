"""MiniLM for qat_quality.py: an encoder under a classifier of Reuters news that stays as it is.

The classifier was fitted on the float model's embeddings, as in `recoup.tasks.sentence_embedding`. Training
moves the encoder alone; counted is how often the classifier still finds the label of a test document.
"""

from pathlib import Path
from typing import Any

import numpy as np
import qat_quality_language_model
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME, METRIC, BATCH = "MiniLM", "cross-entropy", "16 texts of 64 tokens"
STEPS, LEARNING_RATE = 40, 1e-4
FORMATS = {
    "int4": "int4 g32 weights, int8 dynamic inputs",
    "int2": "int2 g32 weights",
    "mxfp4": "MXFP4 weights and inputs",
}
# What was chosen for the language model.
RECOUP = qat_quality_language_model.RECOUP | {"gptq samples": 256}
SMOOTH = ("int4", "mxfp4")
TOKENS, TEXTS = 64, 16
PROBE, TEST = 1000, 500


def scheme(format_: str) -> str:
    """recoup's name of it."""
    return {"int4": "w4a8", "int2": "w2a16", "mxfp4": "mxfp4"}[format_]


class Classified(nn.Module):
    """The classifier is no Parameter: it is neither quantized nor trained."""

    weight: Tensor
    bias: Tensor

    def __init__(self, encoder: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        summed = (states * attention_mask[..., None]).sum(dim=1)  # in the direction of the mean
        logits = F.linear(F.normalize(summed, dim=1), self.weight, self.bias)
        found = {"logits": logits, "last_hidden_state": states}
        return found if labels is None else found | {"loss": F.cross_entropy(logits, labels)}


def prepare(work: Path, steps: int) -> dict[str, str]:
    """The model's folder, and a file of tokens, labels and the classifier, made once."""
    from recoup.tasks import sentence_embedding
    from recoup.tasks.assets import fetch
    from recoup.tasks.documents import read, some, split
    from recoup.tasks.pretrained import load_encoder, load_tokenizer

    folder, texts = fetch("minilm"), fetch("reuters-r8")
    file = work / f"reuters-{steps}.npz"
    if not file.is_file():
        train, test = (read(texts / f"{part}.jsonl", "text", "label") for part in ("train", "test"))
        parts = split(train, test, probe=PROBE, calibration=0, seed=0, where=texts / "train.jsonl")
        encoder, _ = load_encoder(folder)
        tokenizer = load_tokenizer(folder, encoder.config)
        settings = sentence_embedding.Settings.model_validate(
            {
                "model": str(folder),
                "data": {"train": "train.jsonl", "test": "test.jsonl"},
                "max_tokens": TOKENS,
            }
        )
        in_batches = sentence_embedding.tokenized([d.text for d in parts.probe], tokenizer, settings)
        embeddings = sentence_embedding.embed(encoder, in_batches, "embedding the probe's documents")
        probe = sentence_embedding.fit(embeddings, parts.probe)
        number = {label: index for index, label in enumerate(probe.classes_)}
        arrays = {"weight": probe.coef_, "bias": probe.intercept_}
        chosen = {"train": parts.train[: steps * TEXTS], "test": some(test, TEST, texts / "test.jsonl")}
        for part, documents in chosen.items():
            found = tokenizer(
                [document.text for document in documents],
                padding="max_length",
                truncation=True,
                max_length=TOKENS,
                return_tensors="np",
            )
            arrays |= {f"{part} {key}": found[key] for key in ("input_ids", "attention_mask")}
            arrays[f"{part} labels"] = np.array([number[document.label] for document in documents])
        work.mkdir(exist_ok=True)
        np.savez(file, **arrays)
    return {"model": str(folder), "data": str(file)}


def load(job: dict[str, Any]) -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Model, training batches and test batches."""
    from transformers import AutoModel

    arrays = {name: torch.from_numpy(array) for name, array in np.load(job["data"]).items()}
    encoder = AutoModel.from_pretrained(job["model"], dtype=torch.float32, add_pooling_layer=False)

    def batches(part: str) -> list[dict[str, Tensor]]:
        keys = ("input_ids", "attention_mask", "labels")
        split = zip(*(arrays[f"{part} {key}"].split(TEXTS) for key in keys), strict=True)
        return [dict(zip(keys, tensors, strict=True)) for tensors in split]

    model = Classified(encoder, arrays["weight"].float(), arrays["bias"].float())
    return model, batches("train")[: job["steps"]], batches("test")


@torch.no_grad()
def measure(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Of all samples: how surprising their labels are, and the share of those that are found."""
    model.eval()
    logits = torch.cat([model(**batch)["logits"] for batch in batches]).double()
    labels = torch.cat([batch["labels"] for batch in batches])
    found = (logits.argmax(dim=1) == labels).double().mean()
    return {"cross-entropy": F.cross_entropy(logits, labels).item(), "accuracy": found.item()}
