"""Is the file what was trained? Codes from its bytes, and words as llama.cpp finds them.

The decoder here is plain NumPy, from the bytes and the types in the file alone, and shares no line with what
packed them. llama.cpp does not show what a layer computes, so layers are compared by their codes, and the
whole model by the probabilities of the next word after every prefix of one sequence.
"""

import copy
from collections.abc import Callable, Mapping
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
from recoup.export.parity import Parity, ParityError, divergence, end_to_end
from recoup.nn import Batch, CodedLinear, Codes

Array = np.ndarray[Any, np.dtype[Any]]
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
def verify(model: nn.Module, folder: Path, example: Batch) -> Parity:
    """Compare a file with the converted model it was written from.

    Every code, scale and offset in the bytes equals the trained one; these tensors and no others are in
    blocks, and every other tensor is the model's, bit for bit. In llama.cpp texts are read as the tokenizer
    reads them, and the probabilities of the next word differ by no more than rounding explains.

    Raises:
        ParityError: one of these does not hold; names it.
    """
    coded, names = writer.coded_modules(model), architectures.names(model)
    tensors = {tensor.name: tensor for tensor in llama_cpp.read(folder).tensors}
    kinds = {
        names[f"{path}.weight"]: blocks.block_type(module.scheme, inputs=isinstance(module, CodedLinear))
        for path, module in coded.items()
    }
    for name, tensor in tensors.items():
        kind = tensor.tensor_type.name
        if kind != kinds.get(name, kind if kind in ("F32", "F16", "BF16") else "float"):
            raise ParityError(f"{name}: the file has it as {kind}, the plan as {kinds.get(name, 'float')}")
    codes = scales = 0
    for path, module in coded.items():
        heads = architectures.heads(model, f"{path}.weight")
        found = read_block(_tensor(tensors, names[f"{path}.weight"]), heads)
        for what, trained in _trained(module.weight).items():
            _equal(path, what, found[what], trained)
        codes, scales = codes + found["codes"].size, scales + found["scales"].size
    _same_kept_tensors(model, names, tensors)
    ids = _sequence(example)
    server = llama_cpp.Server(folder, context=len(ids), hidden=False, exact=True)
    _same_tokens(folder, server)
    config: Any = model.config
    words = config.vocab_size
    outputs = torch.stack([server.log_probabilities(ids[: end + 1], words=words) for end in range(len(ids))])
    outputs = outputs.clamp(min=_LEAST)
    reference, batch = _Words(_computing(model)), {"input_ids": torch.tensor([ids])}
    nats, agree = divergence(reference, outputs[None], batch, engine="llama.cpp", lattices=_LATTICES)
    return Parity(
        modules=len(coded),
        codes=codes,
        scales=scales,
        worst_module=None,
        end_to_end=end_to_end(reference, outputs[None], batch, engine="llama.cpp", lattices=_LATTICES),
        divergence=nats,
        same_word=agree,
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
    return {"scales": _float16(block[:, :2]), "codes": block[:, 2:].view(np.int8)}


def _q4_0(block: Array) -> dict[str, Array]:
    return {"scales": _float16(block[:, :2]), "codes": _nibbles(block[:, 2:]).astype(np.int8) - np.int8(8)}


def _q4_1(block: Array) -> dict[str, Array]:
    return {
        "scales": _float16(block[:, :2]),
        "offsets": _float16(block[:, 2:4]),
        "codes": _nibbles(block[:, 4:]),
    }


def _mxfp4(block: Array) -> dict[str, Array]:
    exponents = block[:, :1].astype(np.int32) - 127
    return {"scales": np.ldexp(np.float32(1), exponents), "codes": _nibbles(block[:, 1:])}


def _tq2_0(block: Array) -> dict[str, Array]:
    half = [np.concatenate([part // 4**place % 4 for place in range(4)], axis=1)
            for part in (block[:, :32], block[:, 32:64])]  # fmt: skip
    return {
        "scales": _float16(block[:, 64:]),
        "codes": np.concatenate(half, axis=1).astype(np.int8) - np.int8(1),
    }


_LAYOUTS: dict[str, tuple[int, Callable[[Array], dict[str, Array]]]] = {
    "Q8_0": (32, _q8_0),
    "Q4_0": (32, _q4_0),
    "Q4_1": (32, _q4_1),
    "MXFP4": (32, _mxfp4),
    "TQ2_0": (256, _tq2_0),
}


def _trained(weight: Codes) -> dict[str, Tensor]:
    found = {"codes": weight.codes, "scales": weight.scale}
    return found if weight.offset is None else found | {"offsets": weight.offset}


def _tensor(tensors: Mapping[str, Any], name: str) -> Any:
    if name not in tensors:
        raise ParityError(f"{name}: the file does not have it")
    return tensors[name]


def _equal(path: str, what: str, found: Array, trained: Tensor) -> None:
    expected = trained.detach().numpy()
    if found.shape != expected.shape or not np.array_equal(found, expected):
        place = np.argwhere(found != expected) if found.shape == expected.shape else []
        where = tuple(map(int, place[0])) if len(place) else "its shape"
        raise ParityError(
            f"{path}: the {what} read back from the file differ from the trained ones at {where}"
        )


def _same_kept_tensors(model: nn.Module, names: Mapping[str, str], tensors: Mapping[str, Any]) -> None:
    for name, expected in writer.kept(model).items():
        tensor = _tensor(tensors, names[name])
        stored = torch.from_numpy(np.array(tensor.data))
        stored = stored.view(torch.bfloat16) if tensor.tensor_type.name == "BF16" else stored
        heads = architectures.heads(model, name)
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
    """What a language model says of the next word: log-probabilities (samples, tokens, words)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Without a cache, which would be an output too."""
        logits = self.model(input_ids=input_ids, use_cache=False).logits
        return logits.float().log_softmax(dim=-1).clamp(min=_LEAST)


def _computing(model: nn.Module) -> nn.Module:
    """A copy that computes in float32, as llama.cpp does; the values that it computes with are the same."""
    copied = copy.deepcopy(model).float().eval()
    for module in copied.modules():
        if isinstance(module, Codes):
            module.dtype = torch.float32
    return copied
