"""transformers: a folder is loaded whole, as float32, and without a word."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from recoup.engines.transformers import load, size_bytes


def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model().to(torch.bfloat16).save_pretrained(path)
    return path


def test_it_computes_in_float32_and_in_eval_mode(folder: Path) -> None:
    loaded = load(folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert not loaded.training
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert loaded(input_ids=ids).logits.shape == (1, 3, 16)


def test_it_draws_no_bars(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(folder)
    assert capfd.readouterr() == ("", "")


def test_size_is_that_of_the_weights(folder: Path) -> None:
    assert size_bytes(folder) == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("change", "what"), [("lost", "missing"), ("new", "unexpected"), ("cut", "mismatched")]
)
def test_weights_of_another_model_are_refused(change: str, what: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    tensors, name = load_file(folder / "model.safetensors"), "model.norm.weight"
    if change == "new":
        tensors["model.norm.bias"] = tensors[name].clone()
    elif change == "lost":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:8]
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=rf"{what}|size mismatch"):
        load(tmp_path / "other")


def test_a_folder_without_config_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json; expected a folder of transformers"):
        load(tmp_path)


def test_a_class_that_transformers_does_not_know_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["MyModel"]
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="transformers has no class MyModel"):
        load(tmp_path / "other")
