"""gguf: a converted model becomes a folder with model.gguf, which llama.cpp runs.

Blocks are packed from the trained codes and scales; no number is rounded again. What is not quantized stays
as it is: vectors in float32, matrices in the dtype of the model. Rows move where llama.cpp wants them in
another order, whole blocks at a time.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recoup.engines.llama_cpp import FILE, ids_of, read
from recoup.export import gguf_architectures as architectures
from recoup.export import gguf_blocks as blocks
from recoup.export import gguf_vocabulary as vocabulary
from recoup.nn import Batch, CodedEmbedding, CodedLinear
from recoup.schemes import Scheme

Array = np.ndarray[Any, np.dtype[Any]]
FREQUENCIES = "rope_freqs.weight"


def check(model: nn.Module, modules: Mapping[str, tuple[Scheme, type]]) -> None:
    """Can llama.cpp run this model?

    Args:
        model: float, or converted.
        modules: what is quantized: the scheme and the type of the converted module, by name.

    Raises:
        ValueError: it cannot; says what to do.
        ImportError: the extra is not installed.
    """
    import gguf  # pyright: ignore[reportUnusedImport]  # noqa: F401 (the writer needs it)
    import transformers  # pyright: ignore[reportUnusedImport]  # noqa: F401 (reads the tokenizer)
    import xllamacpp  # pyright: ignore[reportUnusedImport]  # noqa: F401 (runs the file)

    architectures.check(model)
    for path, (scheme, kind) in modules.items():
        blocks.check(path, scheme, kind)


def write(model: nn.Module, folder: Path, example: Batch) -> None:
    """Write `model` as folder/model.gguf, with the vocabulary of the tokenizer that lies in the folder.

    A float model is written as it is. Without a tokenizer the file has a vocabulary of placeholders: it runs
    on token ids.

    Args:
        model: converted, or float.
        folder: exists.
        example: one batch of token ids; it is only looked at, so that a wrong one is told before the work.

    Raises:
        ValueError: no token ids, or a tokenizer that llama.cpp does not have.
        OSError: the file cannot be written as a whole.
    """
    import gguf

    ids_of(example)
    writer: Any = gguf.GGUFWriter(folder / FILE, architectures.architecture(model).name)
    writer.add_type("model")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(model))
    architectures.describe(model, writer)
    vocabulary.describe(folder, model, writer)
    entries = list(_entries(model))
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.kind]
        size, width = gguf.GGML_QUANT_SIZES[kind]
        nbytes = math.prod(entry.shape) // size * width
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.make())
    finally:
        writer.close()
    try:
        read(folder)
    except ValueError as error:  # NumPy says nothing of last bytes that found no room
        raise OSError(f"{FILE} is not whole after writing") from error


def coded_modules(model: nn.Module) -> dict[str, CodedLinear | CodedEmbedding]:
    """What the file has in blocks, by name; of a tied pair the embedding."""
    tied = architectures.is_tied(model)
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (CodedLinear, CodedEmbedding)) and not (tied and path == architectures.HEAD)
    }


def kept(model: nn.Module) -> dict[str, Tensor]:
    """What is not quantized, by the model's names and in its order of rows, with the values of the file."""
    coded, state = coded_modules(model), model.state_dict()
    whole = [name for name in architectures.names(model) if name.removesuffix(".weight") not in coded]
    return {name: _kept(state[name].detach(), architectures.shift(model, name)) for name in whole}


def _kept(tensor: Tensor, shift: float) -> Tensor:
    # llama.cpp multiplies matrices in float16 and bfloat16, and has norms and biases in float32 only.
    low = tensor.ndim > 1 and tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor if low else tensor.float() + shift if shift else tensor.float()


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor of the file: its name and type there, its shape in elements, and what makes its bytes."""

    name: str
    kind: str
    shape: Sequence[int]
    make: Callable[[], Array]


def _entries(model: nn.Module) -> Iterator[_Entry]:
    names, coded = architectures.names(model), coded_modules(model)
    for path, module in coded.items():
        name, weight = f"{path}.weight", module.weight
        kind = blocks.block_type(module.scheme, inputs=isinstance(module, CodedLinear))
        order = _order(len(weight.codes), architectures.heads(model, name))
        yield _Entry(
            name=names[name],
            kind=kind,
            shape=weight.codes.shape,
            make=partial(blocks.packed, weight, kind, order),
        )
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for name, tensor in kept(model).items():
        order = _order(len(tensor), architectures.heads(model, name))
        make = partial(_bytes, tensor, order)
        yield _Entry(name=names[name], kind=types[tensor.dtype], shape=tensor.shape, make=make)
    if (factors := architectures.frequency_factors(model)) is not None:
        yield _Entry(name=FREQUENCIES, kind="F32", shape=factors.shape, make=partial(_bytes, factors, None))


def _bytes(tensor: Tensor, order: Tensor | None) -> Array:
    return (tensor if order is None else tensor[order]).contiguous().view(torch.uint8).numpy()


def _order(rows: int, heads: int | None) -> Tensor | None:
    """The model's rows in the file's order: both halves of a head, row by row in turn."""
    if heads is None:
        return None
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()


def _file_type(model: nn.Module) -> int:
    """The type of most matrices, which llama.cpp shows."""
    import gguf

    kinds = Counter(
        blocks.block_type(module.scheme)
        for module in coded_modules(model).values()
        if isinstance(module, CodedLinear)
    )
    if not kinds:
        return gguf.LlamaFileType.ALL_F32
    (name, _), *_ = kinds.most_common(1)
    return gguf.LlamaFileType[{"MXFP4": "MOSTLY_MXFP4_MOE"}.get(name, f"MOSTLY_{name}")]
