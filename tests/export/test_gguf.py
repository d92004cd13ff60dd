"""Every type and every architecture: written, decoded by gguf's own code, run in llama.cpp, and damaged."""

import copy
import importlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import gguf
import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recoup import convert, export
from recoup.engines import llama_cpp
from recoup.export import ParityError
from recoup.export.answers import answers
from recoup.nn import CodedEmbedding, CodedLinear, Codes
from recoup.numerics import dequantize

from .gguf_models import MODELS, NAMES, TARGET, WORDS, Written, batch, quantized, small, whole, written

writer = importlib.import_module("recoup.export.gguf")
common = importlib.import_module("recoup.export.answers")
pytestmark = pytest.mark.filterwarnings("ignore:the artefact has no tokenizer")


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """The same draws for every test; no type checks of numerics, which cost more than the rest together."""
    torch.manual_seed(1)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Written]:
    """Of one scheme and one architecture each, written once."""
    made: dict[tuple[str, str], Written] = {}
    root = tmp_path_factory.mktemp("files")

    def get(scheme: str, model: str = "llama") -> Written:
        if (scheme, model) not in made:
            torch.manual_seed(0)
            made[scheme, model] = written(scheme, root / f"{scheme}-{model}", small(model))
        return made[scheme, model]

    return get


every_type = pytest.mark.parametrize("scheme", NAMES)
every_file = pytest.mark.parametrize(
    ("scheme", "model"), [*((s, "llama") for s in NAMES), *(("q4_0", m) for m in MODELS if m != "llama")]
)


def tensors(folder: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


def dense(module: CodedLinear | CodedEmbedding) -> Tensor:
    return dequantize(module.weight.codes, module.weight.qparams, module.weight.spec)


@every_file
def test_ggmls_own_decoder_reads_the_trained_weights(
    scheme: str, model: str, files: Callable[[str, str], Written]
) -> None:
    found = files(scheme, model)
    stored, names = tensors(found.folder), writer.architectures.names(found.model)
    coded = writer.coded_modules(found.model)
    for path, module in coded.items():
        tensor = stored[names[f"{path}.weight"]]
        assert tensor.tensor_type.name == NAMES[scheme]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        heads = writer.architectures.heads(found.model, f"{path}.weight")
        if heads is not None:  # both halves of a head in turn
            values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(values + 0.0, dense(module) + 0.0)
    quantized_ones = {t.name for t in stored.values() if t.tensor_type.name not in ("F32",)}
    assert quantized_ones == {names[f"{path}.weight"] for path in coded}
    assert found.parity.modules == len(coded)
    assert found.parity.codes == sum(module.weight.codes.numel() for module in coded.values())


@every_file
def test_llama_cpp_finds_the_words_that_were_trained(
    scheme: str, model: str, files: Callable[[str, str], Written]
) -> None:
    """Export has compared every prefix of one sequence; this is another one, as the tasks ask."""
    found, other = files(scheme, model), batch()
    assert found.parity.worst_module is None
    assert found.parity.divergence is not None
    engine = llama_cpp.LlamaCpp(found.folder, exact=True, threads=1)
    with torch.no_grad():
        outputs = engine(**other).logits
        assert outputs.shape == found.model(**other).logits.shape
        # Raises where rounding does not explain the difference.
        whole, _ = answers(Logits(found.model), other, lattices=2)
        whole.agree({"logits": outputs}, engine="llama.cpp")


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"": self.model(**batch, use_cache=False).logits}


@pytest.mark.parametrize("model", ["llama tied", "gemma2", "mistral"])
def test_the_logits_of_a_sequence_are_llama_cpps_own(
    model: str, files: Callable[[str, str], Written]
) -> None:
    """`LlamaCpp` multiplies by the output matrix itself: the same as llama.cpp's answer for the last word."""
    found, ids = files("q4_0", model), batch(1)["input_ids"]
    engine = llama_cpp.LlamaCpp(found.folder, exact=True, threads=1)
    last = engine(ids).logits[0, -1].log_softmax(dim=-1)
    server = llama_cpp.Server(found.folder, context=8, hidden=False, exact=True, threads=1)
    own = server.log_probabilities(ids[0].tolist(), words=WORDS)
    # Both are one float32 sum of 256 terms: 256 * 2^-24 of magnitudes, which are some tens here.
    torch.testing.assert_close(last, own, rtol=0, atol=1e-3)


@every_type
def test_embedding_and_output_have_their_own_schemes(scheme: str, tmp_path: Path) -> None:
    found = written(whole(scheme, "q8_0"), tmp_path / "out")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(found.folder).items()}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == NAMES[scheme]
    assert kinds["output_norm.weight"] == "F32"


@pytest.mark.parametrize("name", ["q8_0", "tq2_0"])
def test_a_tied_output_is_stored_once(name: str, tmp_path: Path) -> None:
    found = written(whole("q4_0", name), tmp_path / "out", small("llama tied"))
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(found.folder).items()}
    assert kinds["token_embd.weight"] == NAMES[name]
    assert "output.weight" not in kinds
    ids = batch(1)["input_ids"]
    server = llama_cpp.Server(found.folder, context=8, hidden=False, exact=True, threads=1)
    own = server.log_probabilities(ids[0].tolist(), words=WORDS)
    last = llama_cpp.LlamaCpp(found.folder, exact=True, threads=1)(ids).logits[0, -1].log_softmax(dim=-1)
    # The inputs of the output matrix are quantized on both sides; a code that flips moves a logit by a step.
    assert (last - own).abs().max() < 0.1


def test_several_schemes_are_several_types(tmp_path: Path) -> None:
    rules = [
        {"match": "*.mlp.down_proj", "scheme": "none"},
        {"match": "*.mlp.gate_proj", "scheme": "tq2_0"},
        {"match": "*.mlp", "scheme": "q8_0"},
        {"match": "*.k_proj", "scheme": "q4_1"},
    ]
    found = written({"scheme": "mxfp4-gguf", "rules": rules}, tmp_path / "out")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(found.folder).items()}
    layer = {name.removeprefix("blk.0."): kind for name, kind in kinds.items() if name.startswith("blk.0.")}
    assert layer["ffn_down.weight"] == "F32"
    assert layer["ffn_gate.weight"] == "TQ2_0"
    assert layer["ffn_up.weight"] == "Q8_0"
    assert layer["attn_k.weight"] == "Q4_1"
    assert layer["attn_q.weight"] == layer["attn_output.weight"] == "MXFP4"


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")], ids=str)
def test_kept_matrices_have_the_models_dtype(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    model = convert(quantized("q8_0")).to(dtype)
    export(model, tmp_path / "out", "gguf", example=batch())
    stored = tensors(tmp_path / "out")
    assert stored["token_embd.weight"].tensor_type.name == kind
    assert stored["output_norm.weight"].tensor_type.name == "F32"
    assert stored["blk.0.attn_q.weight"].tensor_type.name == "Q8_0"


def test_learned_scales_are_written(tmp_path: Path) -> None:
    model = quantized({"scheme": "q4_1", "weight_ranges": "learned"})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".scale", ".offset")):
                parameter.mul_(1.03)
    assert export(model, tmp_path / "out", "gguf").scales


@every_type
def test_writing_changes_nothing_in_the_model(scheme: str, tmp_path: Path) -> None:
    model = convert(quantized(scheme))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    writer.write(model, tmp_path, batch())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_float_model_is_written_as_it_is(tmp_path: Path) -> None:
    model, example = small("qwen3"), batch()
    TARGET.write(model, tmp_path, example)
    with torch.no_grad():
        logits = TARGET.load(tmp_path)(**example).logits
        # llama.cpp keeps keys and values in float16 by default: 2^-11 of each.
        torch.testing.assert_close(logits, model(**example).logits, rtol=0, atol=0.05)


def test_costs_are_measured_in_llama_cpp(tmp_path: Path, files: Callable[[str, str], Written]) -> None:
    TARGET.write(small(), tmp_path, batch())
    before, after = TARGET.costs((tmp_path, files("q4_0", "llama").folder), batch())
    assert before.bytes == (tmp_path / "model.gguf").stat().st_size
    assert after.bytes < before.bytes / 3
    for cost in (before, after):
        assert cost.seconds
        assert cost.peak_bytes
        assert cost.batch == "2 x 8"


@pytest.mark.parametrize("tokens", [64, 300])
def test_a_sequence_that_fills_the_context_is_timed(tokens: int, tmp_path: Path) -> None:
    TARGET.write(small("qwen2", max_position_embeddings=tokens), tmp_path, batch())
    example = batch(1, tokens)
    llama_cpp.Prompts(tmp_path)(**example)
    assert TARGET.load(tmp_path)(**example).logits.shape == (1, tokens, WORDS)
    assert llama_cpp.peak_bytes(tmp_path, example) > 0


# What verify finds

_UP = "model.layers.0.mlp.up_proj"
_QUERY = "model.layers.0.self_attn.q_proj"


def _code(model: nn.Module, path: str) -> None:
    codes = cast(Codes, model.get_submodule(f"{path}.weight")).codes
    codes[3, 5] = 1 if codes[3, 5] == 0 else 0


def _scale(model: nn.Module, path: str) -> None:
    cast(Codes, model.get_submodule(f"{path}.weight")).scale[2, 1] *= 2


def _offset(model: nn.Module, path: str) -> None:
    offset = cast(Codes, model.get_submodule(f"{path}.weight")).offset
    assert offset is not None
    offset[0, 0] += 1


def _bias(model: nn.Module, path: str) -> None:
    cast(Tensor, model.get_parameter(f"{path}.bias"))[1] += 1


DAMAGES: dict[str, tuple[str, Callable[[nn.Module, str], None], str, str]] = {
    **{f"code of {name}": (name, _code, _UP, r"the codes .* at \(3, 5\)") for name in NAMES},
    **{f"scale of {name}": (name, _scale, _UP, r"the scale .* at \(2, 1\)") for name in ("q8_0", "q4_0")},
    "exponent": ("mxfp4-gguf", _scale, _UP, r"the scale .* at \(2, 1\)"),
    "code of a query": ("q4_0", _code, _QUERY, r"the codes .* at \(3, 5\)"),
    "offset": ("q4_1", _offset, _UP, r"the offset .* at \(0, 0\)"),
    "bias of a query": ("q4_0", _bias, _QUERY, "the file does not have it as the model does"),
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "change", "path", "message"), DAMAGES.values(), ids=DAMAGES)
@torch.no_grad()
def test_a_file_of_another_model_is_found(
    scheme: str, change: Any, path: str, message: str, files: Callable[[str, str], Written]
) -> None:
    found = files(scheme, "llama")
    other = copy.deepcopy(found.model)
    change(other, path)
    with pytest.raises(ParityError, match=f"{path}.*{message}"):
        TARGET.verify(other, found.folder, batch())


def test_a_tensor_that_should_not_be_quantized_is_found(files: Callable[[str, str], Written]) -> None:
    folder = files("q8_0", "llama").folder
    model = convert(quantized({"scheme": "q8_0", "rules": [{"match": "*.0.mlp.up_proj", "scheme": "none"}]}))
    with pytest.raises(
        ParityError, match=r"blk\.0\.ffn_up\.weight: the file has it as Q8_0, the plan as float"
    ):
        TARGET.verify(model, folder, batch())


@pytest.mark.parametrize("which", ["end to end", "words"])
def test_a_file_that_llama_cpp_runs_in_another_way_is_found(
    which: str, files: Callable[[str, str], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the bytes cannot show."""
    found, original = files("q8_0", "llama"), llama_cpp.Server.log_probabilities

    def scaled(server: llama_cpp.Server, ids: list[int], *, words: int) -> Tensor:
        return (1.2 * original(server, ids, words=words)).log_softmax(dim=-1)

    monkeypatch.setattr(llama_cpp.Server, "log_probabilities", scaled)
    if which == "words":
        monkeypatch.setattr(common, "relative_rms", lambda *_: 0.0)
    message = "the outputs differ from" if which == "end to end" else r"the next words are .* nats from"
    with pytest.raises(ParityError, match=f"in llama.cpp {message}"):
        TARGET.verify(found.model, found.folder, batch())


# Damaged files

_COUNTS = struct.calcsize("<4sI")


def _cut(raw: bytes) -> bytes:
    return raw[: len(raw) - 100]


def _header(place: int, count: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:place] + struct.pack("<Q", count) + raw[place + 8 :]


def _long_list(raw: bytes) -> bytes:
    """The array of token types, of many more items than there is file."""
    place = raw.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    return _header(place, 2**60)(raw)


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut short": (_cut, "no whole GGUF file"),
    "cut in the header": (lambda raw: raw[:300], "no whole GGUF file"),
    "nothing": (lambda raw: b"", "no whole GGUF file"),
    "something else": (lambda raw: b"PK\3\4" + raw[4:], "it does not begin with GGUF"),
    "too many tensors": (_header(_COUNTS, 2**60), "its header counts 1152921504606846976 tensors in"),
    "too many values": (_header(_COUNTS + 8, 2**61), "its header counts .* metadata values in"),
    "a few tensors more": (_header(_COUNTS, 60), "no whole GGUF file"),
    "a long list": (_long_list, "a list of 1152921504606846976 items of 4 bytes in the header of a file of"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_file_is_one_clear_error(
    damage: Callable[[bytes], bytes], message: str, tmp_path: Path, files: Callable[[str, str], Written]
) -> None:
    raw = (files("q8_0", "llama").folder / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(damage(raw))
    with pytest.raises(ValueError, match=message) as error:
        TARGET.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'model.gguf'}: ")
    assert "\n" not in str(error.value)


def test_a_folder_without_a_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected an exported GGUF model"):
        TARGET.load(tmp_path)


def test_a_file_that_llama_cpp_does_not_load_is_an_error(
    tmp_path: Path, files: Callable[[str, str], Written]
) -> None:
    raw = (files("q8_0", "llama").folder / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(raw.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    with pytest.raises(ValueError, match=r"model.gguf: llama.cpp does not load it"):
        TARGET.load(tmp_path)


@pytest.mark.parametrize("after", [0, 5])
def test_a_full_disk_leaves_nothing_under_the_final_name(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, model = gguf.GGUFWriter.write_tensor_data, quantized("q8_0")
    calls: list[int] = []

    def full(self: Any, tensor: np.ndarray[Any, Any]) -> None:
        calls.append(1)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        write(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space left on device"):
        export(model, tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())


# What the engine is asked


def test_inputs_that_llama_cpp_does_not_take_are_refused(files: Callable[[str, str], Written]) -> None:
    engine = TARGET.load(files("q8_0", "mistral").folder)
    ids = batch(1, 4)["input_ids"]
    assert engine(ids, attention_mask=torch.ones(1, 4), labels=ids).logits.shape == (1, 4, WORDS)
    with pytest.raises(ValueError, match="whole sequences of input_ids; given padding in attention_mask"):
        engine(ids, attention_mask=torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="whole sequences of input_ids; given position_ids"):
        engine(ids, position_ids=ids)
    with pytest.raises(ValueError, match="33 tokens asked, a sequence of it has at most 32"):
        engine(batch(1, 33)["input_ids"])


@pytest.mark.parametrize(
    "example",
    [torch.randn(2, 8), (torch.zeros(2, 8),), {"pixel_values": torch.randn(1, 3)}],
    ids=["floats", "a tuple", "pixels"],
)
def test_an_example_without_ids_is_refused(example: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"llama\.cpp reads token ids; bring an example"):
        export(quantized("q8_0"), tmp_path / "out", "gguf", example=example)
    assert not list(tmp_path.iterdir())


def test_padding_is_left_out_of_the_proof(tmp_path: Path) -> None:
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    export(quantized("q8_0"), tmp_path / "out", "gguf", example=batch() | {"attention_mask": mask})
