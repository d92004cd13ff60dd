"""The task causal-lm, on Llamas of two layers that read a few words."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recoup import Gate, cli, resolve
from recoup.schemes import Recipe, parse
from recoup.tasks import Task, load, load_model
from recoup.tasks import task as task_module
from recoup.tasks.assets import about
from recoup.tasks.causal_lm import Settings, score
from recoup.tasks.packing import PASSAGE
from recoup.tasks.pretrained import load_causal_lm

WORDS = 60
END = 0
CONTEXT = 16


def text(count: int, seed: int) -> str:
    """Words whose frequency falls with their number, as in a language."""
    shares = 1 / np.arange(1, WORDS + 1)
    drawn = np.random.default_rng(seed).choice(WORDS, size=count, p=shares / shares.sum())
    return " ".join(f"w{word}" for word in drawn)


def save_model(folder: Path, *, tied: bool = True, **changes: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": WORDS + 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
            "eos_token_id": END,
            "bos_token_id": None,
        }
        | changes
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_tokenizer(folder: Path, extra: int = 0) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": END, "<unk>": 1, **{f"w{index}": index + 2 for index in range(WORDS + extra)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def llama_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder)
    save_tokenizer(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def llama(tmp_path: Path, llama_files: dict[str, bytes]) -> Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    for name, data in llama_files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def settings(tmp_path: Path, llama: Path) -> dict[str, Any]:
    """Of a task that works; a test changes what it is about."""
    (tmp_path / "train.txt").write_text(text(2000, seed=1))
    (tmp_path / "test.txt").write_text(text(500, seed=2))
    return {
        "name": "causal-lm",
        "model": "./llama",
        "data": {"train": "train.txt", "test": "test.txt"},
        "context": CONTEXT,
        "batch_size": 4,
    }


def recipe(task: dict[str, Any], samples: int = 10, **changes: Any) -> Recipe:
    return Recipe.model_validate(
        {"scheme": "w4a8", "task": task, "calibration": {"samples": samples}} | changes
    )


@pytest.fixture
def task(tmp_path: Path, settings: dict[str, Any]) -> Task:
    return load(recipe(settings), tmp_path)


def sequences(batches: Any) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]


def ids_of(words: str) -> list[int]:
    return [int(word[1:]) + 2 for word in words.split()]


def test_perplexity_is_what_transformers_says(task: Task) -> None:
    samples = task.evaluate(task.model)
    ids = ids_of(text(500, seed=2))[: 500 // CONTEXT * CONTEXT]
    losses, right = [], []
    for start in range(0, len(ids), CONTEXT):
        block = torch.tensor([ids[start : start + CONTEXT]])
        with torch.no_grad():
            output: Any = task.model(input_ids=block, labels=block)
        losses.append(float(output.loss))
        right.append(float((output.logits[0, :-1].argmax(-1) == block[0, 1:]).double().mean()))
    assert samples.aggregate("perplexity") == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert samples.aggregate("top-1") == pytest.approx(np.mean(right), abs=1e-12)
    assert len(np.asarray(samples.values["perplexity"])) == 31 * (CONTEXT - 1)


def test_slices_follow_their_definition(tmp_path: Path, settings: dict[str, Any]) -> None:
    task = load(recipe(settings | {"deciles": True}), tmp_path)
    slices = {name: np.asarray(mask) for name, mask in task.evaluate(task.model).slices.items()}
    ids = np.array(ids_of(text(500, seed=2))[: 31 * CONTEXT]).reshape(-1, CONTEXT)[:, 1:].ravel()
    counts = Counter(ids_of(text(2000, seed=1)))
    frequency = np.array([counts[word] for word in ids])
    rare = slices["rare-tokens"]
    assert 0.1 <= rare.mean() < 0.1 + max(np.bincount(ids)) / len(ids)
    assert frequency[rare].max() <= frequency[~rare].min()
    places = np.tile(np.arange(1, CONTEXT), 31)
    assert np.array_equal(slices["long-context"], places >= 12)
    tenths = [mask for name, mask in slices.items() if name.startswith("decile-")]
    assert np.array_equal(slices["decile-1"], rare)
    assert (sum(mask.astype(int) for mask in tenths) == 1).all()


def test_a_model_that_diverged_gives_no_numbers(task: Task) -> None:
    with torch.no_grad():
        next(task.model.parameters()).fill_(torch.nan)
    samples = task.evaluate(task.model)
    assert np.isnan(np.asarray(list(samples.values.values()))).all()


def test_only_the_tokens_after_what_is_not_finite_have_no_value() -> None:
    logits = torch.randn(4, 8)
    logits[1, 5] = torch.inf
    found = score(logits, torch.tensor([1, 2, 3, 4]))
    assert found.isnan().tolist() == [[False, True, False]] * 2


def test_bfloat16_logits_are_scored_in_float32() -> None:
    logits, ids = torch.randn(5, 8).bfloat16(), torch.arange(5)
    assert torch.equal(score(logits, ids), score(logits.float(), ids))


def test_whatever_is_called_like_the_model_can_be_measured(task: Task) -> None:
    @dataclass
    class Output:
        logits: Tensor

    class Engine(nn.Module):
        def forward(self, **batch: Tensor) -> Output:
            assert set(batch) == {"input_ids"}
            return Output(task.model(**batch)["logits"])

    task.model.train()
    assert task.evaluate(Engine()).summary() == task.evaluate(task.model).summary()
    assert task.model.training


def test_a_gate_can_be_asked_of_the_samples(task: Task) -> None:
    before = task.evaluate(task.model)
    for name in (None, "rare-tokens", "long-context"):
        assert Gate("perplexity", max_increase="2%", slice=name).check(before, before).passed


def test_the_model_keeps_no_cache_and_its_task_loss_is_its_own(task: Task) -> None:
    batch = task.train[0]
    output: Any = task.model(**batch)
    assert output.past_key_values is None
    assert output.loss.item() == pytest.approx(math.log(WORDS), rel=0.1)
    assert {name: tensor.shape for name, tensor in batch.items()} == {
        "input_ids": (4, CONTEXT),
        "labels": (4, CONTEXT),
    }


@pytest.mark.parametrize("described", [True, False], ids=["generation_config.json", "config.json alone"])
@pytest.mark.parametrize("cache", [True, False], ids=["with cache", "without"])
def test_whether_it_generates_with_a_cache_is_what_the_folder_says(
    tmp_path: Path, cache: bool, described: bool
) -> None:
    save_model(tmp_path, use_cache=cache)
    if not described:
        (tmp_path / "generation_config.json").unlink()
    model: Any = load_causal_lm(tmp_path)[0]
    assert model.config.use_cache is False
    assert model.generation_config.use_cache is cache


def test_batches_are_counted_shuffled_by_seed_and_disjoint(tmp_path: Path, settings: dict[str, Any]) -> None:
    first, again, other = (load(recipe(settings, seed=seed), tmp_path) for seed in (1, 1, 2))
    calibration, train = sequences(first.calibration), sequences(first.train)
    assert (len(calibration), len(train)) == (10, 115)
    packed = [*ids_of(text(2000, seed=1)), END]
    assert sorted([*calibration, *train]) == sorted(
        tuple(packed[start : start + CONTEXT]) for start in range(0, 2000, CONTEXT)
    )
    assert (sequences(again.calibration), sequences(again.train)) == (calibration, train)
    assert sequences(other.train) != train
    assert other.evaluate(other.model).summary() == first.evaluate(first.model).summary()


def test_parts_of_the_texts(tmp_path: Path, settings: dict[str, Any]) -> None:
    small = settings | {"test_tokens": 100, "train_tokens": 330}
    first, other = (load(recipe(small, seed=seed), tmp_path) for seed in (1, 2))
    assert len(sequences(first.train)) == 20
    assert len(np.asarray(first.evaluate(first.model).values["top-1"])) == 6 * (CONTEXT - 1)
    assert first.evaluate(first.model).summary() == other.evaluate(other.model).summary()
    assert first.facts["test sequences"] == "6 of 31"
    assert first.facts["train sequences"] == "20 of 115"


def test_jsonl_parquet_and_patterns_are_the_same_text(tmp_path: Path, settings: dict[str, Any]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    halves = [text(300, seed=3), text(300, seed=4)]
    (tmp_path / "half-1.txt").write_text(halves[0])
    (tmp_path / "half-2.txt").write_text(halves[1])
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"body": half}) + "\n" for half in halves))
    parquet.write_table(pa.table({"body": halves}), tmp_path / "test.parquet")
    found = []
    for test in ("half-?.txt", ["half-1.txt", "half-2.txt"], "test.jsonl", "test.parquet"):
        task = load(
            recipe(settings | {"data": {"train": "train.txt", "test": test, "text": "body"}}), tmp_path
        )
        found.append(task.evaluate(task.model).summary())
        assert task.facts["tokens dropped at the end of the test text"] == str(602 % CONTEXT)
    assert found == [found[0]] * 4


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_blank_documents_are_left_out_and_counted(
    tmp_path: Path, settings: dict[str, Any], kind: str, task: Task
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = ["", text(500, seed=2), " \n"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    parquet.write_table(pa.table({"text": rows}), tmp_path / "test.parquet")
    found = load(recipe(settings | {"data": {"train": "train.txt", "test": f"test.{kind}"}}), tmp_path)
    assert found.facts["blank documents left out"] == "0 of train, 2 of test"
    assert found.evaluate(found.model).summary() == task.evaluate(task.model).summary()


def test_facts_name_files_and_counts(task: Task) -> None:
    assert {"sha256 model.safetensors", "sha256 tokenizer.json", "sha256 train.txt"} <= set(task.facts)
    assert task.facts["calibration sequences"] == "10"
    assert task.facts["tokens dropped at the end of the training text"] == str(2001 % CONTEXT)
    assert task.facts["share of the test text that also stands in the training text"] == "0 %"
    assert task.facts["test tokens measured"].startswith("465, of them ")


def test_overlapping_texts_are_a_warning_and_left_out_of_training(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    shared = text(500, seed=2).split()
    quotation = " ".join(shared[2 * PASSAGE : 4 * PASSAGE])
    (tmp_path / "train.txt").write_text(f"{text(1000, seed=1)} {quotation} {text(1000, seed=5)}")
    with pytest.warns(UserWarning, match=r"train and test overlap: 13 % of the test text also") as caught:
        task = load(recipe(settings), tmp_path)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    seen = {sequence for batches in (task.calibration, task.train) for sequence in sequences(batches)}
    tested = ids_of(" ".join(shared))
    assert not [s for s in seen for at in range(500 - CONTEXT) if tuple(tested[at : at + CONTEXT]) == s]
    assert task.facts["left out of the training text for that"] == "0 documents and 5 sequences"


def test_a_short_document_in_both_texts_is_found_too(tmp_path: Path, settings: dict[str, Any]) -> None:
    rows = [text(10, seed=seed) for seed in range(100)]
    for name, chosen in (("train.jsonl", [*rows[:80], rows[90]]), ("test.jsonl", rows[80:])):
        (tmp_path / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in chosen))
    data = {"train": "train.jsonl", "test": "test.jsonl"}
    with pytest.warns(
        UserWarning, match=r"overlap: 5 % of the test text .*; left out of training: 1 documents"
    ):
        load(recipe(settings | {"data": data}), tmp_path)


DATA = {
    "Latin-1": (b"caf\xe9", r"train\.txt: not UTF-8 text at byte 3; save it as UTF-8"),
    "empty": (b"", r"train\.txt: no text found; the file is empty"),
    "short": (
        b"w1 w2",
        r"task\.data\.train: 3 tokens found, one sequence has 16; give it more text, or lower",
    ),
    "few": (
        text(100, seed=1).encode(),
        r"calibration: 10 samples asked, 6 found in task\.data\.train, sequences of 16 tokens; give it more",
    ),
    "none to train": (
        text(160, seed=1).encode(),
        r"task\.data\.train: no sequences left to train on after 10 for calibration; lower",
    ),
    "the test text": (
        text(500, seed=2).encode(),
        r"task\.data\.train: every document of it also is in task\.data\.test; bring another text",
    ),
}


@pytest.mark.parametrize(("data", "message"), DATA.values(), ids=DATA)
def test_bad_data_is_one_line(tmp_path: Path, settings: dict[str, Any], data: bytes, message: str) -> None:
    (tmp_path / "train.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load(recipe(settings), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contxt": 3}, r"task: contxt: unknown key; did you mean 'context'"),
        ({"context": 65}, r"task\.context: 65 asked, the model takes 64 at most"),
        (
            {"test_tokens": 15},
            r"task\.test_tokens: 15 asked, that is 0 sequences; task\.data\.test has 31 of 16",
        ),
        ({"test_tokens": 600}, r"task\.test_tokens: 600 asked, that is 37 sequences; .* has 31"),
        ({"train_tokens": 9999}, r"task\.train_tokens: 9999 asked, that is 624 sequences; .* has 115 of 16"),
        ({"model": "./nothing"}, r"task\.model: \./nothing asked, no folder"),
        ({"data": {"train": "train.txt", "test": "*.jsonl"}}, r"no such file; task\.data\.test wants \.txt"),
    ],
)
def test_settings_are_checked(tmp_path: Path, settings: dict[str, Any], change: Any, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load(recipe(settings | change), tmp_path)
    assert "\n" not in str(error.value)


def configured(**changes: Any) -> Any:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without_a_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def with_gaps(model: Path) -> None:
    """As many words as the model, but one of them has a larger id."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["w59"] = 500
    path.write_text(json.dumps(tokenizer))


def added(**tokens: Any) -> Any:
    """As Gemma 3 has it: a special token of the tokenizer lies beyond the embedding."""

    def change(model: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        tokenizer.add_special_tokens(tokens)
        tokenizer.save_pretrained(model)

    return change


def without_end(model: Path) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))


def sharded(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    shards: list[dict[str, Tensor]] = [{}, {}]
    for index, (name, tensor) in enumerate(tensors.items()):
        shards[index % 2][name] = tensor
    names = [f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, model / name, metadata={"format": "pt"})
    where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_shard(model: Path) -> None:
    sharded(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def shard_elsewhere(model: Path) -> None:
    sharded(model)
    index = model / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002", "../model"))


def broken_index(model: Path) -> None:
    sharded(model)
    (model / "model.safetensors.index.json").write_text("[]")


MODELS = {
    "truncated": (truncate, r"model\.safetensors: no whole safetensors file \(.*incomplete metadata"),
    "a weight missing": (without_a_weight, r"1 weights are missing or misshapen, the first model\.layers\.1"),
    "no tokenizer": (without_tokenizer, r"no tokenizer in .*llama \(none of tokenizer\.json"),
    "a larger vocabulary": (
        lambda model: save_tokenizer(model, extra=5),
        r"llama: the tokenizer has 67 words, the model 62; they are not of the same model",
    ),
    "an id out of range": (
        with_gaps,
        r"llama: the tokenizer gives the text the id 500, the model's go up to 61; they are not of the same",
    ),
    "an added token out of range": (
        added(eos_token="<end>"),
        r"llama: the tokenizer gives the text the id 62, the model's go up to 61; they are not of the same",
    ),
    "no end of sequence": (without_end, r"the tokenizer has no end-of-sequence token .*; set eos_token"),
    "no causal model": (configured(model_type="vit"), r"llama: transformers cannot load it"),
    "unknown kind": (configured(model_type="nobody"), r"llama: transformers cannot load it"),
    "quantized": (
        configured(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"llama: its weights are quantized already \(gptq\); bring the float model",
    ),
    "own code": (
        configured(
            model_type="mine",
            auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "modeling.Model"},
        ),
        r"not part of transformers but code of its own \(mine\.py, modeling\.py\); read it, then give "
        r"the command --trust-remote-code to run it$",
    ),
    "own code in lists": (
        configured(model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoTokenizer": ["words.T", None]}),
        r"code of its own \(mine\.py, words\.py\); read it, then give",
    ),
    "own attention": (
        configured(attn_implementation="somebody/attention"),
        r"its attention is code of somebody/attention, not part of transformers; read it, then give",
    ),
    "a shard elsewhere": (shard_elsewhere, r"names \.\./model\.safetensors, which is no file of its folder"),
    "no such shard": (missing_shard, r"no model-00002-of-00002\.safetensors in .*llama, which model\.saf"),
    "broken index": (broken_index, r"index\.json: not an index of safetensors files; fetch it again"),
}


@pytest.mark.parametrize(("damage", "message"), MODELS.values(), ids=MODELS)
def test_a_bad_model_is_one_line(
    tmp_path: Path, llama: Path, settings: dict[str, Any], damage: Any, message: str
) -> None:
    damage(llama)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load(recipe(settings), tmp_path)
    assert "\n" not in str(error.value)


def test_an_added_token_that_no_text_has_may_lie_beyond_the_embedding(
    tmp_path: Path, llama: Path, settings: dict[str, Any], task: Task
) -> None:
    added(additional_special_tokens=["<image>"])(llama)
    again = load(recipe(settings), tmp_path)
    assert again.evaluate(again.model).summary() == task.evaluate(task.model).summary()


def test_a_model_in_several_files_is_the_same_model(
    tmp_path: Path, llama: Path, settings: dict[str, Any], task: Task
) -> None:
    sharded(llama)
    again = load(recipe(settings), tmp_path)
    assert again.evaluate(again.model).summary() == task.evaluate(task.model).summary()
    assert "sha256 model-00002-of-00002.safetensors" in again.facts


def test_an_untied_head_is_loaded(tmp_path: Path, llama: Path, settings: dict[str, Any]) -> None:
    save_model(llama, tied=False)
    model: Any = load(recipe(settings), tmp_path).model
    assert model.lm_head.weight is not model.model.embed_tokens.weight


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "mine"

class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_code_of_the_model_runs_only_where_it_is_trusted(
    tmp_path: Path, llama: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    classes = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    configured(model_type="mine", auto_map=classes)(llama)
    trace = tmp_path / "trace"
    (llama / "mine.py").write_text(f"{CODE}\nPath({str(trace)!r}).touch()\n")
    for load_it in (load, load_model):
        with pytest.raises(ValueError, match="--trust-remote-code"):
            load_it(recipe(settings), tmp_path)
    assert not trace.exists()
    with pytest.raises(
        ValueError, match=r"task\.trust_remote_code: a recipe cannot trust code; read it, then"
    ):
        load(recipe(settings | {"trust_remote_code": True}), tmp_path)
    assert not trace.exists()
    model = load_model(recipe(settings), tmp_path, trust_remote_code=True)
    assert trace.exists()
    assert type(model).__module__.startswith("transformers_modules")


def test_a_missing_package_names_the_extra(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_module, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"causal-lm needs transformers: pip install 'recoup\[transformers\]'"
    ):
        load(recipe(settings), tmp_path)


def test_a_group_that_does_not_divide_is_refused_before_any_work(
    tmp_path: Path, llama: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    save_model(llama, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=128)
    model = load_model(recipe(settings), tmp_path)
    assert resolve(model, "w4a8")  # 32 does
    written = recipe(settings, scheme="w4a8-g128", gates=[{"metric": "perplexity", "max_increase": "2%"}])
    (tmp_path / "recipe.yaml").write_text(written.dump())
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli._run(["run", "recipe.yaml"]) == cli.WRONG_INPUT
    line = capsys.readouterr().err.strip()
    assert "576 columns cannot be cut into groups of 128" in line
    assert "\n" not in line
    assert not (tmp_path / "runs").exists()


def test_the_published_recipe_is_whole() -> None:
    written = Recipe.load(Path(__file__).parents[2] / "recipes" / "smollm2-sotu.yaml")
    assert written.task is not None
    found = parse(Settings, written.task.settings, "task")
    assert set(about(found.model, found.data.train)) == {"asset:smollm2-135m", "asset:sotu"}
    assert found.train_tokens is not None
    batches = found.train_tokens // found.context // found.batch_size
    held_out = round(batches * written.train.held_out)
    assert batches - held_out >= written.train.steps * written.train.accumulate  # every batch at most once
