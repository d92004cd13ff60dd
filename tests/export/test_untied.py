"""Every target writes two matrices for weights that were untied, and proves both."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from safetensors.torch import load_file
from torch import nn

from recoup import Recipe, calibrate, export, prepare, resolve
from recoup.export import verify
from recoup.transforms import untie
from tests.models import Tied, ids, recipe

from .gguf_models import small, table, written
from .llamas import Processor, batch, llama

pytestmark = pytest.mark.filterwarnings("ignore:the artefact has no tokenizer")


def ready(model: nn.Module, example: Any, asked: Recipe) -> nn.Module:
    """Untied, prepared and calibrated."""
    return calibrate(prepare(untie(model), resolve(model, asked)), [example], observer="minmax")


@pytest.mark.parametrize(
    "rules",
    [(("lm_head", "w8a16"),), (("tokens", "w4a16"),), (("lm_head", "w8a16"), ("tokens", "w4a16"))],
    ids=["the head", "the embedding", "both, differently"],
)
@pytest.mark.parametrize("target", ["onnx", "onnx-qdq", "pytorch"])
def test_one_of_them_is_quantized_or_each_in_its_own_way(
    target: str, rules: tuple[tuple[str, str], ...], tmp_path: Path
) -> None:
    example = ids()
    model = ready(Tied().eval(), example, recipe("w4a16", *rules))
    assert export(model, tmp_path / "out", target, example=example).modules == 1 + len(rules)  # and the block
    assert verify(tmp_path / "out").same


def test_a_folder_of_transformers_has_both_and_a_config_that_says_so(tmp_path: Path) -> None:
    model = ready(llama(tied=True), batch(), recipe("w4a16", ("lm_head", "w8a16")))
    export(model, tmp_path / "out", "compressed-tensors", processor=Processor())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {"model.embed_tokens.weight", "lm_head.weight_packed"} <= set(tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert verify(tmp_path / "out").same


def test_a_gguf_has_an_output_matrix_of_its_own(tmp_path: Path) -> None:
    rules = [{"match": "model.embed_tokens", "scheme": table("q4_0")}, {"match": "lm_head", "scheme": "q8_0"}]
    model = untie(small("llama tied"))
    found = written({"scheme": "q8_0", "rules": rules, "untie": True}, tmp_path / "out", model)
    file = gguf.GGUFReader(found.folder / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q8_0", "Q4_0")
    assert verify(found.folder).same
