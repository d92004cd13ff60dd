"""The task that the demo runs, on a model of two layers."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recoup.tasks import Task, load, sentence_embedding
from recoup.tasks import task as task_module

from .conftest import documents, recipe, write


def rows_of(batches: Any) -> list[tuple[int, ...]]:
    """The token ids of every document, without padding."""
    return [
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.fixture
def task(tmp_path: Path, settings: dict[str, Any]) -> Task:
    return load(recipe(settings), tmp_path)


def test_the_float_model_is_its_own_reference(task: Task) -> None:
    samples = task.evaluate(task.model)
    assert np.allclose(samples.values["embedding-cosine"], 1.0, atol=1e-12)
    assert set(np.unique(samples.values["accuracy"])) <= {0.0, 1.0}
    assert samples.aggregate("accuracy") > 0.75  # which is the share of the larger label
    expected = [document["label"] == "trade" for document in documents(40, start=400)]
    assert np.asarray(samples.slices["rare-labels"]).tolist() == expected  # in the order of the file


def test_another_model_is_measured_with_the_probe_of_the_float_model(task: Task) -> None:
    before = task.evaluate(task.model)
    task.model.train().register_forward_hook(negated)
    after = task.evaluate(task.model)
    assert task.model.training
    assert np.allclose(after.values["embedding-cosine"], -1.0, atol=1e-12)
    assert after.aggregate("accuracy") < before.aggregate("accuracy")  # fitted again, it would be the same


def negated(model: nn.Module, inputs: Any, output: Any) -> Any:
    output.last_hidden_state = -output.last_hidden_state
    return output


def test_a_model_that_diverged_gives_no_numbers(task: Task) -> None:
    with torch.no_grad():
        next(task.model.parameters()).fill_(torch.nan)
    samples = task.evaluate(task.model)
    assert np.isnan(np.asarray(list(samples.values.values()))).all()


def test_whatever_is_called_like_the_model_can_be_measured(task: Task) -> None:
    @dataclass
    class Output:
        last_hidden_state: Tensor

    class Runtime(nn.Module):
        def forward(self, **batch: Tensor) -> Output:
            return Output(task.model(**batch)["last_hidden_state"])

    assert task.evaluate(Runtime()).summary() == task.evaluate(task.model).summary()


def test_batches_are_counted_shuffled_by_seed_and_disjoint(tmp_path: Path, settings: dict[str, Any]) -> None:
    first, again, other = (load(recipe(settings, seed=seed), tmp_path) for seed in (1, 1, 2))
    calibration, train = rows_of(first.calibration), rows_of(first.train)
    assert (len(calibration), len(train)) == (20, 80)
    assert len({*calibration, *train}) == 100
    assert set(first.train[0]) == {"input_ids", "attention_mask", "token_type_ids"}
    assert (rows_of(again.calibration), rows_of(again.train)) == (calibration, train)
    assert rows_of(other.train) != train
    assert other.evaluate(other.model).summary() == first.evaluate(first.model).summary()


def test_duplicates_are_left_out_and_counted(tmp_path: Path, settings: dict[str, Any]) -> None:
    rows = documents(200)
    write(tmp_path / "train.jsonl", [*rows, *documents(3, start=400), *rows[:2]])
    facts = load(recipe(settings), tmp_path).facts
    assert facts["train documents left out, text also in the test file"] == "3"
    assert facts["train documents left out, text twice in the train file"] == "2"
    assert facts["train documents"] == "80"


def test_facts_name_files_and_counts(task: Task) -> None:
    assert {"sha256 model.safetensors", "sha256 config.json", "sha256 train.jsonl"} <= set(task.facts)
    assert task.facts["test documents"] == "40 of 40"
    assert task.facts["rare labels"] == "trade: 10 documents"
    assert task.facts["stored weights without use"] == "pooler.dense.bias, pooler.dense.weight"
    assert not hasattr(task.model.pooler, "dense")


def test_a_part_of_the_test_file(tmp_path: Path, settings: dict[str, Any]) -> None:
    task = load(recipe(settings | {"test_documents": 10, "rare_below": 0.0}), tmp_path)
    samples = task.evaluate(task.model)
    assert len(np.asarray(samples.values["accuracy"])) == 10
    assert not samples.slices
    with pytest.raises(ValueError, match=r"test_documents: 50 asked, 40 found in .*test\.jsonl"):
        load(recipe(settings | {"test_documents": 50}), tmp_path)


def test_mean_pooling_ignores_what_is_masked() -> None:
    states = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]])
    pooled = sentence_embedding.mean_pooling(states.bfloat16(), torch.tensor([[1, 1, 0]]))
    assert torch.equal(pooled, torch.tensor([[0.6, 0.8]]))


DATA = {
    "empty": (b"", r"train\.jsonl: 0 documents found"),
    "one line": (b'{"text": "a", "label": "b"}\n', r"train\.jsonl: 1 documents found"),
    "not JSON": (b'{"text": "a", "label": "b"}\nplain\n', r"train\.jsonl:2: not JSON at column 1"),
    "no object": (b"[1]\n", r"train\.jsonl:1: list found"),
    "no key": (
        b'{"body": "a", "label": "b"}\n',
        r"train\.jsonl:1: no key 'text', there are 'body', 'label'; set",
    ),
    "no text": (b'{"text": " ", "label": "b"}\n', r"train\.jsonl:1: 'text' is ' ', expected a text"),
    "no label": (b'{"text": "a", "label": null}\n', r"train\.jsonl:1: 'label' is None"),
    "Latin-1": (
        b'{"text": "a", "label": "b"}\n{"text": "\xe9"}',
        r"train\.jsonl:2: not UTF-8 text at byte 10",
    ),
    "one label": (
        b"".join(b'{"text": "goal n%d", "label": "sport"}\n' % i for i in range(200)),
        r"one label, 'sport', found in the 100 documents",
    ),
    "few": (
        b"".join(b'{"text": "goal n%d", "label": %d}\n' % (i, i % 2) for i in range(60)),
        r"probe_documents: 100 asked, 60 found in .*train\.jsonl besides 0 duplicates",
    ),
    "few to calibrate": (
        b"".join(b'{"text": "goal n%d", "label": %d}\n' % (i, i % 2) for i in range(110)),
        r"calibration: 20 samples asked, 10 found in .*train\.jsonl after 100 for the probe; give it more",
    ),
    "none to train": (
        b"".join(b'{"text": "goal n%d", "label": %d}\n' % (i, i % 2) for i in range(120)),
        r"no documents left to train on after 100 for the probe and 20 for calibration",
    ),
}


@pytest.mark.parametrize(("data", "message"), DATA.values(), ids=DATA)
def test_bad_data_is_one_line(tmp_path: Path, settings: dict[str, Any], data: bytes, message: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load(recipe(settings), tmp_path)
    assert "\n" not in str(error.value)


def test_a_line_separator_inside_of_a_text_is_no_new_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    rows = [json.dumps(row | {"text": f"{row['text']}\u2028"}, ensure_ascii=False) for row in documents(200)]
    (tmp_path / "train.jsonl").write_bytes("\r\n\r\n".join(rows).encode("utf-8-sig"))
    assert load(recipe(settings), tmp_path).facts["train documents"] == "80"


def test_no_data_file(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl: no such file"):
        load(recipe(settings), tmp_path)


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without_a_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def not_finite(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, model / "model.safetensors")


def configured(**changes: Any) -> Any:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def no_padding(model: Path) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))


def with_gaps(model: Path) -> None:
    """As many words as the model, but one of them has a larger id."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["ball"] = 500
    path.write_text(json.dumps(tokenizer))


MODELS = {
    "truncated": (truncate, r"model\.safetensors: no whole safetensors file \(.*incomplete metadata"),
    "no safetensors": (
        lambda model: (model / "model.safetensors").write_bytes(
            b"version https://git-lfs.github.com/spec/v1\n"
        ),
        r"model\.safetensors: no whole safetensors file \(.*git-lfs pointer needs `git lfs pull`",
    ),
    "empty": (
        lambda model: (model / "model.safetensors").write_bytes(b""),
        r"model\.safetensors: no whole safetensors file \(",
    ),
    "no config": (
        lambda model: (model / "config.json").unlink(),
        r"no config in .*model \(none of config\.json",
    ),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), r"no tokenizer in .*model \(none of"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), r"no weights in .*model \(none of"),
    "a weight missing": (
        without_a_weight,
        r"1 weights are missing or misshapen, the first encoder\.layer\.0\.out",
    ),
    "another shape": (configured(hidden_size=48), r"transformers cannot load it|missing or misshapen"),
    "unknown kind": (configured(model_type="nobody"), r"transformers cannot load it"),
    "own code": (
        configured(model_type="mine", auto_map={"AutoModel": "modeling.Model"}),
        r"code of its own \(modeling\.py\); read it, then give the command --trust-remote-code",
    ),
    "an id out of range": (
        with_gaps,
        r"the tokenizer gives the text the id 500, the model's go up to 20; they are not of the same model",
    ),
    "a broken tokenizer": (
        lambda model: (model / "tokenizer.json").write_text("{}"),
        r"transformers cannot load its tokenizer",
    ),
    "not finite": (not_finite, r"the float model's embeddings are not finite"),
    "no padding": (no_padding, r"the tokenizer has no padding token"),
}


@pytest.mark.parametrize(("damage", "message"), MODELS.values(), ids=MODELS)
def test_a_bad_model_is_one_line(
    tmp_path: Path, model: Path, settings: dict[str, Any], damage: Any, message: str
) -> None:
    damage(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load(recipe(settings), tmp_path)
    assert "\n" not in str(error.value)


def test_tokenizer_and_model_belong_together(tmp_path: Path, model: Path, settings: dict[str, Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"][:9].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    configured(vocab_size=9)(model)
    with pytest.raises(ValueError, match=r"the tokenizer has 21 words, the model 9"):
        load(recipe(settings), tmp_path)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def snapshot_download(name: str, **_: Any) -> str:
        asked.append(name)
        raise FileNotFoundError("ConnectError: no route\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize(
    "name", ["./none", "/none/at/all", "~/none", "a/b/c", "there/none", "..", r"C:\none"]
)
def test_a_path_never_asks_the_network(
    tmp_path: Path, settings: dict[str, Any], no_hub: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    name = "../none" if name == ".." else name
    with pytest.raises(FileNotFoundError, match=r"task\.model: .* asked, no folder .*none|a/b/c"):
        load(recipe(settings | {"model": name}), tmp_path)
    assert not no_hub


def test_a_hub_id_without_the_hub(tmp_path: Path, settings: dict[str, Any], no_hub: list[str]) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"task\.model: owner/name is no folder in .* \(ConnectError"
    ) as error:
        load(recipe(settings | {"model": "owner/name"}), tmp_path)
    assert "\n" not in str(error.value)
    assert no_hub == ["owner/name"]


def test_a_hub_id_is_loaded_from_its_snapshot(
    tmp_path: Path, model: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(model))
    assert load(recipe(settings | {"model": "owner/name"}), tmp_path).facts["model"] == "owner/name"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, r"task: modle: unknown key; did you mean 'model'"),
        ({"pooling": "max"}, r"task: pooling: input should be 'mean'"),
        ({"data": {"train": "train.jsonl"}}, r"task: data\.test: missing"),
        ({"max_tokens": 64}, r"task\.max_tokens: 64 asked, the model takes 32 at most"),
    ],
)
def test_settings_are_checked(tmp_path: Path, settings: dict[str, Any], change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(recipe(settings | change), tmp_path)


def test_a_probe_that_does_not_converge_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.linear_model

    real = sklearn.linear_model.LogisticRegression
    monkeypatch.setattr(sklearn.linear_model, "LogisticRegression", lambda max_iter: real(max_iter=1))
    rows = [sentence_embedding.Document(text="", label=str(index % 3)) for index in range(60)]
    with pytest.raises(ValueError, match=r"the probe does not converge \(lbfgs"):
        sentence_embedding.fit(torch.randn(60, 8), rows)


@pytest.mark.parametrize("package", ["transformers", "sklearn"])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, settings: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = task_module.find_spec
    monkeypatch.setattr(task_module, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'recoup\[demo\]'"):
        load(recipe(settings), tmp_path)


def test_tasks_are_imported_without_the_heavy_packages() -> None:
    import subprocess

    code = (
        "import sys, recoup.tasks; print({'transformers', 'sklearn', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
