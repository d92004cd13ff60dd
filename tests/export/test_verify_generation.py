"""What the trained model said is in the folder: a file that says something else later is found."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

from recoup.engines.onnxruntime import OnnxModel
from recoup.export import ParityError, verify
from recoup.export.artefact import TENSORS, generation_of
from recoup.export.migrations import read
from recoup.export.onnx_decoding import NEW, Generation

from .artefacts.write import HERE

FOLDER = HERE / "format-1" / "onnx-decoding"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Without sums of its files, so that they are not what finds it."""
    folder = shutil.copytree(FOLDER, tmp_path / "copy")
    record = json.loads((folder / "artefact.json").read_text())
    (folder / "artefact.json").write_text(json.dumps(record | {"files": {}}))
    return folder


def spoken(folder: Path = FOLDER) -> Generation:
    _, found = read(folder)
    assert found is not None
    generation = generation_of(found, load_file(folder / TENSORS))
    assert generation is not None
    return generation


def test_an_intact_file_says_what_was_recorded() -> None:
    found = verify(FOLDER)
    assert found.same
    assert found.parity is not None
    assert found.parity.decoded == 2 * NEW
    assert f"generation same         {2 * NEW} words, each after its past" in str(found)


def exchanges_presents(file: onnx.ModelProto) -> None:
    """The values come out as keys, and the keys as values."""
    other = {"present.0.key": "present.0.value", "present.0.value": "present.0.key"}
    for node in file.graph.node:
        node.input[:] = [other.get(name, name) for name in node.input]
        node.output[:] = [other.get(name, name) for name in node.output]


def doubles_cached_keys(file: onnx.ModelProto) -> None:
    past = "past_key_values.0.key"
    for node in file.graph.node:
        node.input[:] = ["doubled" if name == past else name for name in node.input]
    file.graph.initializer.append(numpy_helper.from_array(np.array(2, np.float32), "two"))
    file.graph.node.insert(0, helper.make_node("Mul", [past, "two"], ["doubled"]))


@pytest.mark.parametrize("breaks", [exchanges_presents, doubles_cached_keys], ids=lambda each: each.__name__)
def test_a_past_that_broke_later_is_found_though_the_prompt_is_answered(
    breaks: Callable[[onnx.ModelProto], None], copied: Path
) -> None:
    breaks(file := onnx.load(copied / "model.onnx"))
    onnx.save(file, copied / "model.onnx")
    (different,) = (check for check in verify(copied).checks if check.outcome == "different")
    assert different.what == "engine"
    named, _, rest = different.found.removeprefix("decoding in onnxruntime, word ").partition(" of prompt ")
    assert int(named) > 1  # the first is said by the prompt alone
    assert "in the trained model, whose logits for them are further apart than the " in rest


def test_a_file_that_does_not_decode_any_more_is_found(copied: Path) -> None:
    file = onnx.load(copied / "model.onnx")
    del file.graph.output[1:]
    onnx.save(file, copied / "model.onnx")
    found = verify(copied)
    assert not found.same
    assert "in onnxruntime the file does not decode, and what the trained model says is known" in str(found)


def test_a_folder_without_the_words_says_so(copied: Path) -> None:
    """As those that were written before words were recorded."""
    record = json.loads((copied / "artefact.json").read_text())
    del record["example"]["allowed_decoding"]
    (copied / "artefact.json").write_text(json.dumps(record))
    found = verify(copied)
    assert found.same
    assert "generation not checked  the words that the trained model said are not recorded" in str(found)


@pytest.mark.parametrize("name", ["reach", "words"])
def test_words_that_do_not_belong_together_are_one_line(name: str, copied: Path) -> None:
    tensors = load_file(copied / TENSORS)
    tensors[f"generation.{name}"] = tensors[f"generation.{name}"][:1].clone()
    save_file(tensors, copied / TENSORS)
    message = r"artefact\.tensors: not the words that were generated for artefact\.json; export it again$"
    with pytest.raises(ValueError, match=message):
        verify(copied)
    del tensors[f"generation.{name}"]
    save_file(tensors, copied / TENSORS)
    with pytest.raises(ValueError, match=message):
        verify(copied)


def test_the_logits_of_some_words_are_enough() -> None:
    """Of a large vocabulary; a word without them is below all that may be found."""
    whole, engine = spoken(), OnnxModel(FOLDER)
    kept = torch.cat([whole.tokens.unique(), torch.tensor([0])]).unique()
    part = replace(whole, words=whole.words[kept], logits=whole.logits[..., kept])
    assert part.agree(engine) == whole.agree(engine) == (2 * NEW, 0)
    swapped = replace(part, tokens=part.tokens.flip(0), logits=part.logits.flip(0), reach=part.reach.flip(0))
    with pytest.raises(ParityError, match=r"word \d+ of prompt \d is \d+, and \d+ in the trained model"):
        swapped.agree(engine)


def test_words_that_may_be_found_and_every_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from recoup.export import onnx_decoding

    logits = torch.zeros(1, 2, 8)
    logits[0, 0, 3], logits[0, 0, 6], logits[0, 1, 5], logits[0, 1, 1] = 9.0, 8.5, 9.0, 7.0
    tokens, reach = torch.tensor([[3, 5]]), torch.tensor([[1.0, 1.0]])
    monkeypatch.setattr(onnx_decoding, "_RECORDED_BYTES", logits.nbytes // 4)
    assert onnx_decoding._kept(tokens, logits, reach).tolist() == [0, 3, 4, 5, 6]
    monkeypatch.setattr(onnx_decoding, "_RECORDED_BYTES", logits.nbytes)
    assert onnx_decoding._kept(tokens, logits, reach).tolist() == list(range(8))
