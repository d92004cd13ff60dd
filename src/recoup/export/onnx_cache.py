"""A causal language model as one step of decoding: keys and values of the past come in, and go out longer.

    in    input_ids, position_ids                            (batch, sequence)
          attention_mask                                     (batch, past + sequence)
          past_key_values.L.key, past_key_values.L.value     (batch, heads, past, features), for every layer L
    out   logits                                             (batch, sequence, words)
          present.L.key, present.L.value                     (batch, heads, past + sequence, features)

These are the names of Hugging Face's optimum, which onnxruntime-genai and transformers.js read, too. With a
past of length 0 it is the model on a whole sequence, so one file reads the prompt and decodes.

torch.onnx takes tensors only, and a cache of transformers is none: the traced module makes one of the tensors
that it is given. Its layers keep everything, also where a layer attends to a window: the mask cuts that, and
all pasts have one length.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recoup.export.tracing import Traced, positional
from recoup.nn import Batch

PAST, PRESENT = "past_key_values", "present"
BATCH, SEQUENCE, PAST_LENGTH, TOTAL = (
    "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length",
)  # fmt: skip
_AXES = {
    "input_ids": {0: BATCH, 1: SEQUENCE},
    "attention_mask": {0: BATCH, 1: TOTAL},
    "position_ids": {0: BATCH, 1: SEQUENCE},
}
_PAST_AXES = {0: BATCH, 2: PAST_LENGTH}
_SAMPLES, _TOKENS, _PAST = 2, 4, 3  # to trace with: two lengths that are equal would be traced as one


@torch.no_grad()
def decodes(model: nn.Module, example: Batch) -> bool:
    """Does it generate with a cache of keys and values, and nothing else that it remembers?

    That is for its `generation_config` to say, because `config.use_cache` is off in training. A model whose
    state is something else (state-space layers, convolutions, an encoder's output), or that has inputs beside
    its tokens, is traced as any other model is.

    Args:
        model: any.
        example: one batch.
    """
    settings: Any = getattr(model, "generation_config", None)
    if settings is None or settings.use_cache is False or PAST not in _parameters(model):
        return False
    given = _named(model, example)
    if "input_ids" not in given or not set(given) <= set(_AXES):
        return False
    return bool(_pasts(model, given))


@torch.no_grad()
def traced(model: nn.Module, example: Batch) -> Traced:
    """The step of decoding, traced with other tokens than the example's, and with a past.

    Args:
        model: one that `decodes`.
        example: one batch.
    """
    known = {
        "input_ids": torch.zeros(_SAMPLES, _TOKENS, dtype=torch.int64),
        "attention_mask": torch.ones(_SAMPLES, _PAST + _TOKENS, dtype=torch.int64),
        "position_ids": torch.arange(_PAST, _PAST + _TOKENS).repeat(_SAMPLES, 1),
    }
    given = {name: value for name, value in known.items() if name in _parameters(model)}
    pasts = {
        f"{PAST}.{layer}.{kind}": torch.zeros(_SAMPLES, heads, _PAST, features)
        for layer, shapes in enumerate(_pasts(model, _named(model, example)))
        for kind, (heads, features) in zip(("key", "value"), shapes, strict=True)
    }
    return Traced(
        module=Step(model, list(given)),
        args=(*given.values(), *pasts.values()),
        kwargs={},
        free=((*(_AXES[name] for name in given), *[_PAST_AXES] * len(pasts)),),
        inputs=[*given, *pasts],
        outputs=["logits", *(name.replace(PAST, PRESENT) for name in pasts)],
        prefix="model.",
    )


def unpadded(model: nn.Module, example: Batch) -> Batch:
    """The largest batch without padding that a language model's example has: beginnings of longer sequences.

    What is computed at places of padding is nobody's answer, and hangs on how a mask is written that hides
    everything before it.

    Args:
        model: any; what is no language model keeps its example.
        example: one batch.
    """
    given = _named(model, example)
    mask: Any = given.get("attention_mask")
    speaks = getattr(model, "generation_config", None) is not None and {"input_ids"} < set(given) <= set(
        _AXES
    )
    if not speaks or mask is None or mask.ndim != 2 or bool((mask > 0).all()):
        return example
    real = mask > 0
    lengths = real.sum(dim=1)
    tokens = max((int(length) for length in lengths), key=lambda n: n * int((lengths >= n).sum()))
    rows = [ids[seen][:tokens] for ids, seen in zip(given["input_ids"], real, strict=True)]
    ids = torch.stack([row for row in rows if len(row) == tokens])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Step(nn.Module):
    """A language model whose cache goes in and out as tensors.

    Args:
        model: of transformers.
        names: of what it is given before the pasts.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The model's tensors under its names, then key and value of every layer; logits, then the same."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        given = dict(zip(self.names, tensors, strict=False))
        pasts = tensors[len(self.names) :]
        cache: Any = DynamicCache()
        for keys, values in zip(pasts[::2], pasts[1::2], strict=True):
            layer: Any = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        outputs = self.model(**given, past_key_values=cache, use_cache=True)
        return (
            outputs.logits,
            *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)),
        )


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _named(model: nn.Module, example: Batch) -> dict[str, Any]:
    """A batch by the names of the model's parameters."""
    if isinstance(example, Mapping):
        return dict(example)
    return dict(zip(_parameters(model), positional(example), strict=False))


def _pasts(model: nn.Module, given: Mapping[str, Any]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Heads and features of the keys and values of every layer; none if its state is something else."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache: Any = getattr(model(**given, use_cache=True), PAST, None)
    layers: list[Any] = cache.layers if isinstance(cache, DynamicCache) else []
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    if not all(type(layer) in kinds and layer.is_initialized for layer in layers):
        return []
    return [
        ((layer.keys.shape[1], layer.keys.shape[3]), (layer.values.shape[1], layer.values.shape[3]))
        for layer in layers
    ]
