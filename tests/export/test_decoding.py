"""Language models that decode in onnxruntime: past_key_values in, presents out, words as generated."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx import helper, numpy_helper
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from recoup import Recipe, calibrate, convert, export, prepare, resolve
from recoup.engines.onnxruntime import OnnxModel
from recoup.export import Parity, ParityError, verify
from recoup.export.onnx_cache import unpadded
from recoup.export.onnx_decoding import Generation, generation
from tests.export.gguf_models import WORDS, batch, small
from tests.export.llamas import Processor

decoding = importlib.import_module("recoup.export.onnx_decoding")
NEW = 12
Array = np.ndarray[Any, np.dtype[Any]]


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": WORDS, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64}
    config = GPT2Config(**sizes, initializer_range=0.1, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


@dataclass(frozen=True)
class Row:
    """A file that is written once.

    Args:
        recipe: what is quantized.
        padding: where the first batch has it, of each of its first samples.
        training: `config.use_cache` is off, as in training.
    """

    model: Callable[[], PreTrainedModel]
    recipe: dict[str, Any]
    padding: tuple[slice, ...] = ()
    training: bool = False


_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_tied = partial(small, "qwen3", tie_word_embeddings=True)
_KEPT = [{"match": "model.embed_tokens", "scheme": "none"}]  # Gemma's has no quantized form
_TABLES = [{"match": match, "scheme": "w8a16"} for match in ("model.embed_tokens", "lm_head")]
_MLP = [{"match": "*.mlp.*", "scheme": "w8a8-ort"}]
LEFT, RIGHT = (slice(0, 3), slice(0, 5)), (slice(5, 8), slice(3, 8))
FILES = {
    "llama w4a16": Row(small, {"scheme": "w4a16"}, training=True),
    "qwen3 tied w4a16": Row(_tied, {"scheme": "w4a16", "rules": _TABLES}),
    "gemma3 w4a16": Row(partial(small, "gemma3", **_LAYERS), {"scheme": "w4a16", "rules": _KEPT}, RIGHT),
    "gpt2 w4a16": Row(gpt2, {"scheme": "w4a16"}, LEFT),
    "phi3 w4a8-ort, w8a8-ort": Row(partial(small, "phi3"), {"scheme": "w4a8-ort", "rules": _MLP}),
}
FLOAT_INPUTS = [name for name in FILES if name.endswith("a16")]
PADDED = [name for name, row in FILES.items() if row.padding]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A file, the converted model it was written from, and what that says."""

    model: nn.Module
    folder: Path
    parity: Parity

    @property
    def file(self) -> onnx.ModelProto:
        return onnx.load(self.folder / "model.onnx")

    @cached_property
    def spoken(self) -> Generation:
        return generation(self.model, batch())


def made(row: Row, folder: Path) -> Made:
    torch.manual_seed(1)
    model: Any = row.model()
    first = batch(samples=3)
    if row.padding:
        first["attention_mask"] = torch.ones(3, 8, dtype=torch.int64)
        for sample, place in enumerate(row.padding):
            first["attention_mask"][sample, place] = 0
    if row.training:
        model.config.use_cache = False
    prepare(model, resolve(model, Recipe.model_validate(row.recipe)))
    calibrate(model, [first], observer="minmax")
    parity = export(model, folder, "onnx", processor=Processor())
    return Made(model=convert(model).eval(), folder=folder, parity=parity)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Every file, written when it is first asked for."""
    known: dict[str, Made] = {}
    folder = tmp_path_factory.mktemp("files")

    def of(name: str) -> Made:
        if name not in known:
            known[name] = made(FILES[name], folder / name.replace(" ", "-"))
        return known[name]

    return of


def prompts() -> tuple[Tensor, Tensor]:
    """Three of different lengths, padded on the left."""
    ids, mask = torch.randint(3, WORDS, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    for row, padding in enumerate((0, 3, 6)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


every_file = pytest.mark.parametrize("name", FILES)


@every_file
def test_inputs_and_outputs_have_the_names_and_axes_of_optimum(
    files: Callable[[str], Made], name: str
) -> None:
    config: Any = files(name).model.config
    session = onnxruntime.InferenceSession(files(name).folder / "model.onnx")
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pasts = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    inputs = {value.name: value.shape for value in session.get_inputs()}
    assert inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{past}": ["batch_size", heads, "past_sequence_length", width] for past in pasts},
    }
    outputs = {value.name: value.shape for value in session.get_outputs()}
    assert list(outputs) == ["logits", *(f"present.{past}" for past in pasts)]
    assert outputs["logits"] == ["batch_size", "sequence_length", WORDS]
    assert all(shape[:2] == ["batch_size", heads] for shape in list(outputs.values())[1:])


def greedy(file: Path, ids: Array, mask: Array, steps: int) -> Array:
    """As anybody writes it who has the file and onnxruntime."""
    session = onnxruntime.InferenceSession(file)
    pasts = {
        value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    read, tokens = ids, []
    for _ in range(steps):
        places = np.maximum(mask.cumsum(1) - 1, 0)[:, -read.shape[1] :]
        feeds = {"input_ids": read, "attention_mask": mask, "position_ids": places, **pasts}
        logits, *presents = session.run(None, feeds)
        pasts = dict(zip(pasts, presents, strict=True))
        read = logits[:, -1].argmax(axis=1)[:, None]
        mask = np.concatenate([mask, np.ones_like(read)], axis=1)
        tokens.append(read[:, 0])
    return np.stack(tokens, axis=1)


@every_file
def test_it_decodes_in_onnxruntime_alone_and_by_generate(files: Callable[[str], Made], name: str) -> None:
    ids, mask = prompts()
    alone = greedy(files(name).folder / "model.onnx", ids.numpy(), mask.numpy(), NEW)
    found = OnnxModel(files(name).folder).generate(ids, mask, max_new_tokens=NEW)
    assert found.tolist() == alone.tolist()
    assert len({tuple(row) for row in alone.tolist()}) > 1


@pytest.mark.parametrize("name", FLOAT_INPUTS)
def test_it_says_what_the_converted_model_generates(files: Callable[[str], Made], name: str) -> None:
    ids, mask = prompts()
    model: Any = files(name).model
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    said = model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    assert OnnxModel(files(name).folder).generate(ids, mask, max_new_tokens=NEW).tolist() == said.tolist()


@every_file
def test_it_is_called_as_the_model_was_and_answers_without_presents(
    files: Callable[[str], Made], name: str
) -> None:
    inputs = batch(3, 5)
    found = OnnxModel(files(name).folder)(**inputs)
    assert list(found) == ["logits"]
    with torch.no_grad():
        trained = files(name).model(**inputs).logits
    assert found.logits.shape == trained.shape
    if name in FLOAT_INPUTS:  # both are float32 sums, some hundred roundings deep
        assert torch.allclose(found.logits, trained, rtol=0, atol=1e-4 * float(trained.abs().max()))


@every_file
def test_parity_counts_the_words_that_were_decoded(files: Callable[[str], Made], name: str) -> None:
    parity = files(name).parity
    assert parity.decoded == 2 * decoding.NEW
    assert parity.ties is not None
    assert parity.ties <= parity.decoded // 4
    assert parity.to_json()["decoded"] == parity.decoded
    assert f"{parity.decoded} words decoded as generated" in str(parity)


def consumer(file: onnx.ModelProto, value: str, op: str) -> onnx.NodeProto:
    return next(node for node in file.graph.node if node.op_type == op and value in node.input)


def before(file: onnx.ModelProto, value: str, op: str, constant: Array) -> None:
    """`op` with a constant goes between an input of the graph and whatever reads it."""
    for node in file.graph.node:
        node.input[:] = [f"{value} broken" if name == value else name for name in node.input]
    file.graph.initializer.append(numpy_helper.from_array(constant, f"{value} constant"))
    file.graph.node.insert(0, helper.make_node(op, [value, f"{value} constant"], [f"{value} broken"]))


def forgets(file: onnx.ModelProto) -> None:
    before(file, "past_key_values.0.value", "Mul", np.zeros((), np.float32))


def reverses(file: onnx.ModelProto) -> None:
    concat = consumer(file, "past_key_values.0.key", "Concat")
    concat.input[:] = list(concat.input)[::-1]


def exchanges(file: onnx.ModelProto) -> None:
    key, value = (consumer(file, f"past_key_values.0.{kind}", "Concat").input for kind in ("key", "value"))
    key[0], value[0] = value[0], key[0]


def stays_at_the_first_place(file: onnx.ModelProto) -> None:
    before(file, "position_ids", "Mul", np.zeros((), np.int64))


def sees_padding(file: onnx.ModelProto) -> None:
    before(file, "attention_mask", "Max", np.ones((), np.int64))


def drops_the_newest(file: onnx.ModelProto) -> None:
    """Of the words of the past, the last one is the first again."""
    past = "past_key_values.0.key"
    for node in file.graph.node:
        if node.op_type == "Concat" and past in node.input:
            node.input[:] = [f"{past} broken" if name == past else name for name in node.input]
    for name, number in (("zero", 0), ("one", 1), ("minus", -1), ("end", 2**31), ("axis", 2)):
        file.graph.initializer.append(numpy_helper.from_array(np.array([number], np.int64), f"cut {name}"))
    nodes = [
        helper.make_node("Slice", [past, "cut one", "cut end", "cut axis"], ["late"]),
        helper.make_node("Slice", [past, "cut zero", "cut one", "cut axis"], ["early"]),
        helper.make_node("Concat", ["late", "early"], [f"{past} broken"], axis=2),
    ]
    for node in reversed(nodes):
        file.graph.node.insert(0, node)


BROKEN = (forgets, reverses, exchanges, stays_at_the_first_place, sees_padding, drops_the_newest)


@pytest.mark.parametrize("name", ["llama w4a16", "phi3 w4a8-ort, w8a8-ort"])
@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_a_past_that_is_wrong_is_no_parity(
    files: Callable[[str], Made], tmp_path: Path, breaks: Callable[[onnx.ModelProto], None], name: str
) -> None:
    file = files(name).file
    breaks(file)
    onnx.save(file, tmp_path / "model.onnx")
    with torch.no_grad(), pytest.raises(ParityError, match="decoding in onnxruntime, "):
        files(name).spoken.agree(OnnxModel(tmp_path))


def test_a_word_as_likely_as_the_trained_one_is_a_tie_and_another_is_no_parity(
    files: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = files("llama w4a16")
    engine, followed = OnnxModel(of.folder), Generation._followed_by

    def nudged(trained: Generation, engine: OnnxModel) -> Tensor:
        """The best word falls behind the second, at the first place."""
        logits = followed(trained, engine).clone()
        best, second = logits[0, 0].topk(2).indices
        logits[0, 0, best] = logits[0, 0, second] - 1
        return logits

    generated = decoding._generated

    def tied(model: nn.Module, ids: Tensor, mask: Tensor, new: int) -> Any:
        """The two best words of the first place are equally likely in the trained model, too."""
        tokens, logits = generated(model, ids, mask, new)
        best, second = logits[0, 0].topk(2).indices
        logits[0, 0, best] = logits[0, 0, second]
        return tokens, logits

    monkeypatch.setattr(Generation, "_followed_by", nudged)
    monkeypatch.setattr(decoding, "relative_rms", lambda *_: 0.0)  # words alone
    with torch.no_grad():
        with pytest.raises(ParityError, match=r"word 1 of prompt 1 is \d+, and \d+ in the trained model"):
            generation(of.model, batch()).agree(engine)
        monkeypatch.setattr(decoding, "_generated", tied)
        assert generation(of.model, batch()).agree(engine) == (2 * decoding.NEW, 1)


def test_a_tied_weight_is_stored_once_and_proven_twice(files: Callable[[str], Made]) -> None:
    of = files("qwen3 tied w4a16")
    names = {tensor.name for tensor in of.file.graph.initializer}
    assert "model.embed_tokens.codes" in names
    assert "lm_head.codes" not in names
    (embedding,) = (node for node in of.file.graph.node if node.op_type == "GatherBlockQuantized")
    assert embedding.input[2] == "model.embed_tokens.scale"
    head = [node for node in of.file.graph.node if "model.embed_tokens.codes" in node.input]
    assert {node.op_type for node in head} == {"Reshape", "MatMulNBits"}
    assert of.parity.modules == len([m for m in of.model.modules() if hasattr(m, "scheme")])


def test_kept_tensors_have_the_names_of_the_model(files: Callable[[str], Made]) -> None:
    of = files("llama w4a16")
    names = {tensor.name for tensor in of.file.graph.initializer}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= names


def test_training_without_a_cache_does_not_take_it_from_the_file(files: Callable[[str], Made]) -> None:
    of = files("llama w4a16")
    assert FILES["llama w4a16"].training
    assert of.parity.decoded
    assert OnnxModel(of.folder).presents


@pytest.mark.parametrize("name", PADDED)
def test_padding_in_the_first_batch_is_nobodys_answer(files: Callable[[str], Made], name: str) -> None:
    assert files(name).parity.same_word == 1
    assert verify(files(name).folder).same


def test_a_model_that_generates_without_cache_is_written_without(tmp_path: Path) -> None:
    """And padding on the left of whole sequences is nobody's answer, either."""
    row = Row(partial(small, use_cache=False), {"scheme": "w8a8-ort"}, LEFT)
    parity = made(row, tmp_path / "out").parity
    assert parity.decoded is None
    assert parity.same_word == 1
    assert verify(tmp_path / "out").same
    model = OnnxModel(tmp_path / "out")
    assert model.inputs == ["input_ids", "attention_mask"]
    with pytest.raises(ValueError, match="the file has no past_key_values, so it does not decode; export"):
        model.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=1)


_SIZES: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2}


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(**_SIZES, state_size=4, pad_token_id=0, eos_token_id=2))


def lfm2() -> PreTrainedModel:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 96}
    layers = ["conv", "full_attention"]
    return Lfm2ForCausalLM(Lfm2Config(**_SIZES, **heads, layer_types=layers))


@pytest.mark.parametrize("other", [mamba, lfm2])
def test_a_state_that_is_no_keys_and_values_is_not_written_as_such(
    other: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    cache = importlib.import_module("recoup.export.onnx_cache")
    model = other().eval()
    assert not cache.decodes(model, batch())
    with pytest.raises(ValueError, match=r"no cache: model\.config\.use_cache = False"):
        importlib.import_module("recoup.export.onnx").write(model, tmp_path, batch())
    assert not list(tmp_path.iterdir())


def test_a_file_does_not_tell_where_it_was_traced(files: Callable[[str], Made]) -> None:
    content = (files("llama w4a16").folder / "model.onnx").read_bytes()
    for path in (transformers.__file__, importlib.import_module("recoup.export.onnx").__file__):
        assert str(Path(path).parent).encode() not in content


def test_the_largest_batch_without_padding_is_compared() -> None:
    mask = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]])
    ids = torch.arange(20).reshape(4, 5)
    found = unpadded(gpt2(), {"input_ids": ids, "attention_mask": mask})
    assert isinstance(found, dict)
    assert found["input_ids"].tolist() == [[6, 7, 8, 9], [10, 11, 12, 13]]
    assert found["attention_mask"].all()
