"""Is the file what was trained? Codes from its bytes, and words as llama.cpp finds them.

The decoder here is plain NumPy, from the bytes and the types in the file alone, and shares no line with what
packed them. llama.cpp does not show what a layer computes, so layers are compared by their codes, and the
whole model by the probabilities of the next word after every prefix of one sequence.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recoup.engines import llama_cpp
from recoup.export import gguf as writer
from recoup.export import gguf_architectures as architectures
from recoup.export import gguf_blocks as blocks
from recoup.export import gguf_vocabulary as vocabulary
from recoup.export.answers import WORDS, answers
from recoup.export.parity import Array, Parity, ParityError
from recoup.export.trained import Layer, Stored, Trained, check_stored
from recoup.nn import Batch, CodedLinear, Codes

_FLOATS = ("F32", "F16", "BF16")
_LEAST = -80.0  # llama.cpp takes the logarithm of a float32 probability, which ends at exp(-87)
# ggml decides a code of an input with the scale before that is rounded to float16, recoup with the one after;
# near the middle of two codes they part.
_LATTICES = 2
PREFIXES = 12  # of the example's first sequence; each is one answer with every word
# Contractions, figures, spaces, capitals, other scripts, emoji: where the rules of tokenizers part.
PROBE = (
    "Hello world, it's 1234567 o'clock; we'LL see.",
    "two  spaces,\ttabs\t\tand\n\nlines \n end ",
    "x=3.14*(y_2+z)**-2 # caf\u00e9 na\u00efve CamelCase snake_case",
    "\u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439, \u4f60\u597d\u4e16\u754c12\u4e2a, "
    "\u0645\u0631\u062d\u0628\u0627, \U0001f999\U0001f680!!",
)
LEADING = "  spaces first"


@torch.no_grad()
def trained(model: nn.Module, folder: Path, example: Batch) -> Trained:
    """What folder/model.gguf is compared with, from the converted model: its words after every prefix."""
    del folder
    batch = {"input_ids": torch.tensor([_sequence(example)])}
    answered = answers(_Words(_computing(model)), batch, lattices=_LATTICES)
    return Trained.of(model, batch, answered, held=writer.coded_modules(model), kept=writer.kept(model))


def stored(folder: Path, layers: Mapping[str, Layer]) -> dict[str, Stored]:
    """Codes, scales and offsets of every quantized module, by the model's order of rows, from the bytes.

    Raises:
        ParityError: other tensors are in blocks, or in blocks of another type.
    """
    reader = llama_cpp.read(folder)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = _names(reader, [f"{path}.weight" for path in layers])
    kinds = {
        names[f"{path}.weight"]: blocks.block_type(layer.scheme, inputs=issubclass(layer.kind, CodedLinear))
        for path, layer in layers.items()
    }
    for name, tensor in tensors.items():
        kind = tensor.tensor_type.name
        if kind != kinds.get(name, kind if kind in _FLOATS else "float"):
            raise ParityError(f"{name}: the file has it as {kind}, the plan as {kinds.get(name, 'float')}")
    return {
        path: read_block(_tensor(tensors, names[f"{path}.weight"]), _heads(reader, f"{path}.weight"))
        for path in layers
    }


@torch.no_grad()
def compare(trained: Trained, folder: Path) -> Parity:
    """Compare folder/model.gguf with what was trained.

    Every code, scale and offset in the bytes equals the trained one; these tensors and no others are in
    blocks, and every other tensor is the model's, bit for bit. In llama.cpp texts are read as the tokenizer
    reads them, and the probabilities of the next word differ by no more than rounding explains.

    Raises:
        ParityError: one of these does not hold; names it.
    """
    codes, scales = check_stored(trained.modules, stored(folder, trained.layers))
    if trained.kept is not None:
        _same_kept_tensors(trained, folder)
    ids = _sequence(trained.example)
    server = llama_cpp.Server(folder, context=len(ids), hidden=False, exact=True)
    _same_tokens(folder, server)
    words = trained.answers.values[WORDS].shape[-1]
    outputs = torch.stack([server.log_probabilities(ids[: end + 1], words=words) for end in range(len(ids))])
    found = trained.answers.agree({WORDS: outputs.clamp(min=_LEAST)}, "llama.cpp")
    return Parity(
        modules=len(trained.modules),
        codes=codes,
        scales=scales,
        worst_module=None,
        end_to_end=found.drift,
        divergence=found.nats,
        same_word=found.same_word,
    )


def read_block(tensor: Any, heads: int | None) -> dict[str, Array]:
    """Codes (rows, columns), scales and, in Q4_1, offsets (rows, blocks), from the bytes alone.

    Args:
        tensor: a `gguf.ReaderTensor`.
        heads: how many heads the rows are, if each holds its halves in turn; they come out one after the
            other.
    """
    size, layout = _LAYOUTS[tensor.tensor_type.name]
    rows = np.asarray(tensor.data)
    fields = layout(rows.reshape(-1, rows.shape[1] * size // int(tensor.shape[0])))
    found = {what: values.reshape(len(rows), -1) for what, values in fields.items()}
    if heads is None:
        return found
    place = np.arange(len(rows))
    width = len(rows) // heads
    head, within = place // width, place % width
    stored = head * width + 2 * (within % (width // 2)) + within // (width // 2)
    return {what: values[stored] for what, values in found.items()}


def _float16(pairs: Array) -> Array:
    return np.ascontiguousarray(pairs).view("<f2").astype(np.float32)


def _nibbles(pairs: Array) -> Array:
    return np.concatenate([pairs % 16, pairs // 16], axis=1)


def _q8_0(block: Array) -> dict[str, Array]:
    return {"scale": _float16(block[:, :2]), "codes": block[:, 2:].view(np.int8)}


def _q4_0(block: Array) -> dict[str, Array]:
    return {"scale": _float16(block[:, :2]), "codes": _nibbles(block[:, 2:]).astype(np.int8) - np.int8(8)}


def _q4_1(block: Array) -> dict[str, Array]:
    return {
        "scale": _float16(block[:, :2]),
        "offset": _float16(block[:, 2:4]),
        "codes": _nibbles(block[:, 4:]),
    }


def _mxfp4(block: Array) -> dict[str, Array]:
    exponents = block[:, :1].astype(np.int32) - 127
    return {"scale": np.ldexp(np.float32(1), exponents), "codes": _nibbles(block[:, 1:])}


def _tq2_0(block: Array) -> dict[str, Array]:
    half = [np.concatenate([part // 4**place % 4 for place in range(4)], axis=1)
            for part in (block[:, :32], block[:, 32:64])]  # fmt: skip
    return {
        "scale": _float16(block[:, 64:]),
        "codes": np.concatenate(half, axis=1).astype(np.int8) - np.int8(1),
    }


_LAYOUTS: dict[str, tuple[int, Callable[[Array], dict[str, Array]]]] = {
    "Q8_0": (32, _q8_0),
    "Q4_0": (32, _q4_0),
    "Q4_1": (32, _q4_1),
    "MXFP4": (32, _mxfp4),
    "TQ2_0": (256, _tq2_0),
}


def _names(reader: Any, paths: Iterable[str]) -> dict[str, str]:
    """The file's names of a model's tensors, by llama.cpp's table for the file's own architecture."""
    import gguf

    name, layers = _field(reader, "general.architecture"), _field(reader, "{}.block_count")
    kind = next((kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == name), None)
    if kind is None:
        raise ParityError(f"gguf knows no architecture {name!r}")
    table = gguf.get_tensor_name_map(kind, min(layers, len(reader.tensors)))
    return {path: table.get_name(path, try_suffixes=(".weight", ".bias")) or path for path in paths}


def _heads(reader: Any, path: str) -> int | None:
    """How many heads the rows of a tensor are, if the file has them in another order than the model."""
    name = _field(reader, "general.architecture")
    if not any(each.name == name and each.interleaved for each in architectures.ARCHITECTURES.values()):
        return None
    keys = {"q_proj": "{}.attention.head_count", "k_proj": "{}.attention.head_count_kv"}
    key = keys.get(path.rpartition(".")[0].rpartition(".")[2])
    return None if key is None else _field(reader, key)


def _field(reader: Any, key: str) -> Any:
    return llama_cpp.field(reader, key.format(llama_cpp.field(reader, "general.architecture")))


def _tensor(tensors: Mapping[str, Any], name: str) -> Any:
    if name not in tensors:
        raise ParityError(f"{name}: the file does not have it")
    return tensors[name]


def _same_kept_tensors(trained: Trained, folder: Path) -> None:
    reader = llama_cpp.read(folder)
    tensors, kept = {tensor.name: tensor for tensor in reader.tensors}, trained.kept or {}
    names = _names(reader, [*kept, *(f"{path}.weight" for path in trained.modules)])
    for name, expected in kept.items():
        tensor = _tensor(tensors, names[name])
        stored = torch.from_numpy(np.array(tensor.data))
        stored = stored.view(torch.bfloat16) if tensor.tensor_type.name == "BF16" else stored
        heads = _heads(reader, name)
        if heads is not None:
            stored = stored.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        if stored.dtype != expected.dtype or not torch.equal(stored, expected):
            raise ParityError(f"{name}: the file does not have it as the model does")
    extra = set(tensors) - set(names.values()) - {writer.FREQUENCIES}
    if extra:
        raise ParityError(f"{min(extra)}: the file has it, the model does not")


def _same_tokens(folder: Path, server: llama_cpp.Server) -> None:
    tokenizer: Any = vocabulary.load(folder)
    if tokenizer is None:
        return
    for text in PROBE if vocabulary.joins_leading_spaces(tokenizer) else (*PROBE, LEADING):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = server.tokenize(text)
        if found != expected:
            place = next(
                (i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1
            )
            raise ParityError(
                f"llama.cpp reads {text!r} as other tokens than the tokenizer, from place {place} on: it has "
                "no such tokenizer; export without one and use token ids"
            )


def _sequence(example: Batch) -> list[int]:
    """The first tokens of the first sequence of a batch that are no padding."""
    ids = llama_cpp.ids_of(example)[0]
    mask = example.get("attention_mask") if isinstance(example, Mapping) else None
    return (ids if mask is None else ids[mask[0] != 0])[:PREFIXES].tolist()


class _Words(nn.Module):
    """What a language model says of the next word: log-probabilities, as `logits`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Without a cache, which would be an output too."""
        logits = self.model(input_ids=input_ids, use_cache=False).logits
        return {WORDS: logits.float().log_softmax(dim=-1).clamp(min=_LEAST)}


def _computing(model: nn.Module) -> nn.Module:
    """A copy that computes in float32, as llama.cpp does; the values that it computes with are the same."""
    copied = copy.deepcopy(model).float().eval()
    for module in copied.modules():
        if isinstance(module, Codes):
            module.dtype = torch.float32
    return copied
