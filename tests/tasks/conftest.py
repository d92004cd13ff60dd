"""A BERT of two layers with a vocabulary of a few words, and documents about two topics."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recoup.schemes import Recipe

WORDS = {"sport": ["ball", "goal", "team", "win"], "trade": ["bank", "price", "ship", "tax"]}


def documents(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Different texts; one in four is about trade."""
    found = []
    for index in range(start, start + count):
        label = "trade" if index % 4 == 0 else "sport"
        digits = [int(digit) for digit in f"{index:04o}"]
        words = [WORDS[label][digit % 4] for digit in digits]
        found.append({"text": " ".join([*words, *(f"n{digit}" for digit in digits)]), "label": label})
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a saved model, made once; a test writes them where it may damage them."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = [word for topic in WORDS.values() for word in topic] + [f"n{digit}" for digit in range(8)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def model(tmp_path: Path, model_files: dict[str, bytes]) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in model_files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def settings(tmp_path: Path, model: Path) -> dict[str, Any]:
    """Of a task that works; a test changes what it is about."""
    write(tmp_path / "train.jsonl", documents(200))
    write(tmp_path / "test.jsonl", documents(40, start=400))
    return {
        "name": "sentence-embedding",
        "model": "./model",
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        "max_tokens": 16,
        "batch_size": 8,
        "probe_documents": 100,
        "rare_below": 0.3,
    }


def recipe(task: dict[str, Any], samples: int = 20, **changes: Any) -> Recipe:
    return Recipe.model_validate(
        {"scheme": "w8a8", "task": task, "calibration": {"samples": samples}} | changes
    )
