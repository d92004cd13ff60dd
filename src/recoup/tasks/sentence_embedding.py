"""Sentence embeddings: an encoder under a classifier that stays as it is.

What is measured is what happens in production when an encoder is quantized: the classifier that was
fitted on the float model's embeddings is still there, and now sees other embeddings. A linear probe plays
the classifier; it is fitted once, before the weights move, and never again.

    accuracy            per test document 1 or 0: the probe on the candidate's embedding finds the label
    embedding-cosine    per test document, between the candidate's embedding and the float model's

No document is in two of: probe, calibration, training, test.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from recoup.progress import watched
from recoup.schemes import Recipe, parse
from recoup.tasks.assets import about, locate
from recoup.tasks.documents import Document, read, some, split
from recoup.tasks.pretrained import (
    check,
    check_context,
    check_ids,
    files_of,
    load_encoder,
    load_tokenizer,
    model_folder,
)
from recoup.tasks.task import Batch, Task, asking, need, sha256_of
from recoup.validate import Samples

NEEDS = ("the task sentence-embedding", "demo", "sklearn", "transformers")


class Data(BaseModel):
    """Files of JSON lines (or "asset:NAME/FILE"), and the keys of text and label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str
    test: str
    text: str = "text"
    label: str = "label"


class Settings(BaseModel):
    """What the recipe says under `task`.

    Args:
        model: a folder, a hub id or "asset:NAME".
        data: train and test documents; training does not see the labels, the probe does.
        pooling: the mean of the token states under the attention mask, then L2 normalization.
        max_tokens: longer texts are cut.
        batch_size: of every batch; padded to its longest text.
        probe_documents: train documents that the probe is fitted on.
        test_documents: drawn from the test file; all of them where absent.
        rare_below: labels with less than this share of the test documents are the slice "rare-labels".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)
    data: Data
    pooling: Literal["mean"] = "mean"
    max_tokens: int = Field(default=64, ge=3)
    batch_size: int = Field(default=32, ge=1)
    probe_documents: int = Field(default=1500, ge=2)
    test_documents: int | None = Field(default=None, ge=2)
    rare_below: float = Field(default=0.1, ge=0, lt=1)


def load(recipe: Recipe, folder: Path, trust_remote_code: bool = False) -> Task:
    """Model, batches and measurement of a recipe; embeds probe and test documents once with the float model.

    Raises:
        ValueError: model or data cannot be used; one line that says what was found and what to do.
        FileNotFoundError: a file is not there.
        ImportError: transformers or scikit-learn is not installed.
    """
    assert recipe.task is not None
    settings = parse(Settings, recipe.task.settings, "task")
    need(*NEEDS)
    train_file, test_file = locate(settings.data.train, folder), locate(settings.data.test, folder)
    train_documents = read(train_file, settings.data.text, settings.data.label)
    in_test_file = read(test_file, settings.data.text, settings.data.label)
    test = some(in_test_file, settings.test_documents, test_file)
    parts = split(
        train_documents,
        in_test_file,
        probe=settings.probe_documents,
        calibration=recipe.calibration.samples,
        seed=recipe.seed,
        where=train_file,
    )
    labels = {document.label for document in parts.probe}
    if len(labels) < 2:
        raise ValueError(
            f"{train_file}: one label, {min(labels)!r}, found in the {len(parts.probe)} documents of the "
            "probe; it needs two"
        )
    if not parts.train and "qat" in recipe.rungs:
        raise ValueError(
            f"{train_file}: no documents left to train on after {len(parts.probe)} for the probe and "
            f"{len(parts.calibration)} for calibration; lower those, or take qat out of rungs"
        )

    source = model_folder(settings.model, folder)
    check(source)
    model, unused = load_encoder(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, model.config, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        raise ValueError(f"{source}: the tokenizer has no padding token; set pad_token and save it again")
    check_context(model.config, settings.max_tokens, "task.max_tokens")

    def batched(documents: Sequence[Document]) -> list[Batch]:
        batches = tokenized([document.text for document in documents], tokenizer, settings)
        check_ids(max((int(batch["input_ids"].max()) for batch in batches), default=0), source, model.config)
        return batches

    shortest_first = sorted(range(len(test)), key=lambda index: len(test[index].text))
    test_batches = batched([test[index] for index in shortest_first])
    reference = embed(model, test_batches, "embedding the test documents")
    if not reference.isfinite().all():
        raise ValueError(f"{source}: the float model's embeddings are not finite; its weights are damaged")
    probe = fit(embed(model, batched(parts.probe), "embedding the probe's documents"), parts.probe)
    shares = Counter(document.label for document in test)
    rare = sorted(label for label, count in shares.items() if count / len(test) < settings.rare_below)
    is_rare = np.array([document.label in rare for document in test])
    files = {path.name: path for path in files_of(source)}
    files |= {settings.data.train: train_file, settings.data.test: test_file}
    evaluate = Evaluation(
        batches=test_batches,
        order=np.argsort(shortest_first),
        reference=reference,
        predict=probe.predict,
        labels=np.array([document.label for document in test]),
        slices={"rare-labels": is_rare} if rare else {},
    )
    return Task(
        model=model,
        calibration=batched(parts.calibration),
        train=batched(parts.train),
        evaluate=evaluate,
        baseline=evaluate.of(reference),
        facts={
            "model": settings.model,
            **about(settings.model, settings.data.train, settings.data.test),
            **{f"sha256 {name}": sha256_of(path) for name, path in files.items()},
            "stored weights without use": ", ".join(unused) or "none",
            "test documents": f"{len(test)} of {len(in_test_file)}",
            "probe documents": str(len(parts.probe)),
            "calibration documents": str(len(parts.calibration)),
            "train documents": str(len(parts.train)),
            "train documents left out, text also in the test file": str(parts.also_in_test),
            "train documents left out, text twice in the train file": str(parts.twice_in_train),
            "rare labels": f"{', '.join(rare) or 'none'}: {is_rare.sum()} documents",
            "test labels unknown to the probe": ", ".join(sorted(set(shares) - labels)) or "none",
        },
    )


def load_model(recipe: Recipe, folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """The float model of a recipe, without data. Raises as `load` does."""
    assert recipe.task is not None
    settings = parse(Settings, recipe.task.settings, "task")
    need(*NEEDS)
    source = model_folder(settings.model, folder)
    check(source)
    return load_encoder(source, trust_remote_code=trust_remote_code)[0]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`evaluate` of the task: everything but the model is fixed.

    Args:
        batches: the test documents, sorted by length.
        order: where each document of the file is among them.
        reference: the float model's embeddings, in the order of the batches.
        predict: the probe, from embeddings to labels.
        labels: the true ones, in file order.
        slices: masks over the documents, in file order.
    """

    batches: Sequence[Batch]
    order: NDArray[np.intp]
    reference: Float[Tensor, "documents features"]
    predict: Callable[[NDArray[Any]], NDArray[Any]]
    labels: NDArray[Any]
    slices: dict[str, NDArray[np.bool_]]

    def __call__(self, model: nn.Module) -> Samples:
        """Per test document, in file order; NaN where the model's embedding is not finite."""
        return self.of(embed(model, self.batches, "embedding the test documents"))

    def of(self, found: Float[Tensor, "documents features"]) -> Samples:
        """The same for embeddings that are there already, in the order of the batches."""
        cosine = cosine_similarity(found.double(), self.reference.double()).numpy()[self.order]
        embeddings = found.numpy()[self.order]
        finite = np.isfinite(embeddings).all(axis=1)
        accuracy = np.full(len(self.labels), np.nan)
        if finite.any():
            accuracy[finite] = self.predict(embeddings[finite]) == self.labels[finite]
        return Samples({"accuracy": accuracy, "embedding-cosine": cosine}, slices=self.slices)


def mean_pooling(
    states: Float[Tensor, "batch tokens features"], mask: Tensor
) -> Float[Tensor, "batch features"]:
    """The mean of the states that the mask keeps, at length 1. In float32 whatever the states are.

    Sentence-BERT (Reimers and Gurevych 2019, sec. 3), then L2 normalization as all-MiniLM-L6-v2 does.
    """
    kept = mask.to(states.device)[..., None].float()
    return normalize((states.float() * kept).sum(dim=1) / kept.sum(dim=1), dim=1)


def embed(
    model: nn.Module, batches: Sequence[Batch], description: str
) -> Float[Tensor, "documents features"]:
    """Embeddings of every document, on the CPU; `model(**batch)` needs to give `last_hidden_state`."""
    with asking(model) as device:
        return torch.cat(
            [
                mean_pooling(
                    model(**{name: tensor.to(device) for name, tensor in batch.items()}).last_hidden_state,
                    batch["attention_mask"],
                ).cpu()
                for batch in watched(batches, description)
            ]
        )


def tokenized(texts: Sequence[str], tokenizer: Any, settings: Settings) -> list[Batch]:
    """Batches in the order of the texts, each padded to its longest."""
    size = settings.batch_size
    return [
        dict(
            tokenizer(
                list(texts[start : start + size]),
                padding=True,
                truncation=True,
                max_length=settings.max_tokens,
                return_tensors="pt",
            )
        )
        for start in range(0, len(texts), size)
    ]


def fit(embeddings: Float[Tensor, "documents features"], documents: Sequence[Document]) -> Any:
    """The linear probe: logistic regression, fitted until it stands still.

    Raises:
        ValueError: it does not converge.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return LogisticRegression(max_iter=10_000).fit(
                embeddings.numpy(), [document.label for document in documents]
            )
        except ConvergenceWarning as warning:
            raise ValueError(
                f"the probe does not converge ({str(warning).splitlines()[0]}); change probe_documents"
            ) from None
