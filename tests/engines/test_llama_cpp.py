"""llama.cpp: a file goes on with a prompt."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recoup.engines.llama_cpp import Prompts, Server
from tests.export.gguf_models import WORDS, batch, small, written

pytestmark = pytest.mark.filterwarnings("ignore:the artefact has no tokenizer")
END, NEW = 2, 6


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(model: str) -> Path:
        if model not in made:
            torch.manual_seed(0)
            made[model] = written("q8_0", tmp_path_factory.mktemp("files") / "out", small(model)).folder
        return made[model]

    return of


def step_by_step(folder: Path, ids: list[int]) -> list[int]:
    """The same words, each asked for by the probabilities of all."""
    server = Server(folder, context=32, hidden=False, threads=1)
    said: list[int] = []
    for _ in range(NEW):
        found: Tensor = server.log_probabilities([*ids, *said], words=WORDS)
        found[END] = -torch.inf
        said.append(int(found.argmax()))
    return said


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_it_says_the_most_likely_words(files: Callable[[str], Path], model: str) -> None:
    ids = batch(2, 5)["input_ids"]
    found = Prompts(files(model), threads=1).generate(ids, max_new_tokens=NEW)
    assert found.tolist() == [step_by_step(files(model), row) for row in ids.tolist()]


def test_it_generates_up_to_the_models_last_place_and_refuses_more(files: Callable[[str], Path]) -> None:
    engine, ids = Prompts(files("llama"), threads=1), batch(1, 60)["input_ids"]
    assert engine.generate(ids, max_new_tokens=4).shape == (1, 4)
    with pytest.raises(ValueError, match="65 tokens asked, a sequence of it has at most 64"):
        engine.generate(ids, max_new_tokens=5)
