"""How far quantized weights are from a float model's, layer by layer, and what that does to outputs.

A measurement and no proof: training moves weights on purpose. Only a weight that is not nearer to the float
one than zeros are is taken for another model's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recoup.engines import transformers
from recoup.engines.safetensors_file import Shards
from recoup.export.answers import WORDS, named_rows, nats, relative_rms, same_word
from recoup.export.checkpoints import quantization_config
from recoup.nn import call

Weights = Iterable[tuple[str, Tensor]]  # the path of a module, and its weight, flattened to a matrix
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far quantized weights are from a float model's.

    Args:
        layers: root mean square of the difference of every quantized weight, over that of the float one.
        total: of all of them together.
        absent: quantized modules that the float model does not have, or has in another shape.
    """

    layers: Mapping[str, float]
    total: float
    absent: tuple[str, ...]

    @property
    def foreign(self) -> tuple[str, ...]:
        """Layers that are not nearer to the float ones than zeros are."""
        return tuple(path for path, distance in self.layers.items() if not distance < 1)

    def __str__(self) -> str:
        if problems := (*self.absent, *self.foreign):
            more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            return f"not of this model: {', '.join(problems[:_SHOWN])}{more}"
        worst = sorted(self.layers.items(), key=lambda found: -found[1])[:_SHOWN]
        named = ", ".join(f"{path} {distance:.3g}" for path, distance in worst)
        return f"{len(self.layers)} layers, {self.total:.3g} away (relative, RMS); farthest: {named}"


def distance(weights: Weights, folder: Path) -> Distance:
    """Compare quantized weights with those in the safetensors files of a float model.

    Args:
        weights: one by one; nothing keeps them.
        folder: of the float model.

    Raises:
        ValueError: the float model is quantized itself, or a file is damaged.
        FileNotFoundError: it has no safetensors files.
    """
    if method := quantization_config(folder).get("quant_method"):
        raise ValueError(f"{folder}: quantized itself ({method}); --model takes the float model")
    tensors = Shards(folder)
    layers: dict[str, float] = {}
    absent: list[str] = []
    difference = whole = 0.0
    for path, matrix in weights:
        found = _weight(path, matrix, tensors)
        if found is None:
            absent.append(path)
            continue
        apart, length = (float(part.double().square().sum()) for part in (matrix - found, found))
        layers[path] = (apart / max(length, torch.finfo(torch.float32).tiny)) ** 0.5
        difference, whole = difference + apart, whole + length
    total = (difference / max(whole, torch.finfo(torch.float32).tiny)) ** 0.5
    return Distance(layers=layers, total=total, absent=tuple(absent))


def _weight(path: str, matrix: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The float weight of a module as a matrix; None if there is none of that shape.

    A checkpoint of the inner model leaves out the first part of a name, or has one more.
    """
    wanted = f"{path}.weight"
    names = [wanted] if wanted in tensors else [
        name for name in tensors if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")
    ]  # fmt: skip
    if len(names) != 1:
        return None
    found = tensors[names[0]]
    found = found.float().flatten(1) if found.ndim > 1 else found
    return found if found.shape == matrix.shape else None


def outputs_apart(reference: Any, other: Any) -> str:
    """How far outputs are from the float model's, in words.

    Raises:
        ValueError: they are not outputs of the same shapes.
    """
    plain, found = named_rows(reference), named_rows(other)
    if WORDS in plain and WORDS in found:  # an engine may answer less than the model does
        plain, found = {WORDS: plain[WORDS]}, {WORDS: found[WORDS]}
    if [value.shape for value in plain.values()] != [value.shape for value in found.values()]:
        raise ValueError("the float model answers other outputs")
    said = f"{relative_rms(plain, found):.3g} from the float model's (relative, RMS)"
    if WORDS in plain:
        apart, same = float(nats(plain[WORDS], found[WORDS]).mean()), same_word(plain[WORDS], found[WORDS])
        said += f"; next words {apart:.3g} nats apart, {same:.0%} the same"
    return said


@torch.no_grad()
def outputs_of_weights(folder: Path, weights: Weights, tokens: int = 64) -> str:
    """What the float model answers with these weights in place of its own; inputs stay in float.

    Args:
        folder: of the float model.
        weights: quantized ones.
        tokens: of the one sequence that is asked, spread over the vocabulary.

    Raises:
        ValueError: transformers has no class for the model, or it takes no token ids.
    """
    model: Any = transformers.load(folder)
    words = getattr(model.config, "vocab_size", None)
    longest = getattr(model.config, "max_position_embeddings", None) or tokens
    if not words:
        raise ValueError("the float model takes no token ids")
    ids = torch.arange(min(tokens, longest))[None] * 7919 % words  # a prime: all over the vocabulary
    batch = {"input_ids": ids}
    plain = call(model, batch)
    for path, matrix in weights:
        weight = model.get_submodule(path).weight
        weight.copy_(matrix.reshape(weight.shape))
    return outputs_apart(plain, call(model, batch))
