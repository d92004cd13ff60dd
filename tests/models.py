"""Tiny models, one of each kind that users bring. Every width is one that every preset can cut.

`MODELS` is a table: a row is a function that builds a float model, and a function that makes a batch for it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

from recoup.nn import Batch, call
from recoup.numerics import IntFormat, per_tensor
from recoup.schemes import PRESETS, Recipe, Scheme

WIDTH = 256  # the blocks of tq2_0, the longest of all presets
WORDS = 16


class MLP(nn.Module):
    """Two hidden layers, a norm and a head; with a name for every reason to keep a parameter but two."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.norm(self.up(x)))))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.positions = nn.Embedding(4, WIDTH)
        self.block = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[-1], device=input_ids.device)
        return self.lm_head(torch.relu(self.block(self.tokens(input_ids) + self.positions(places))))


class Shared(nn.Module):
    """One Linear at two places, once under a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.later = nn.ModuleList([nn.Linear(WIDTH, WIDTH), self.first])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.later:
            x = torch.tanh(layer(torch.tanh(self.first(x))))
        return x


class Residual(nn.Module):
    """A small CNN as those for phones: depthwise and grouped convolutions, BatchNorm, ReLU6, a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 1, groups=2)
        self.classifier = nn.Linear(16, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        x = x + self.grouped(nn.functional.relu6(self.norm(self.depthwise(x))))
        return self.classifier(x.mean(dim=(2, 3)))


class Signal(nn.Module):
    """Convolutions along one axis, of widths that groups divide, with the paddings that torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(WIDTH, WIDTH, 3, padding="same", dilation=2, padding_mode="circular")
        self.second = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1, padding_mode="reflect")
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x))).mean(dim=2))


class Volume(nn.Module):
    """A convolution along three axes and a transposed one of two groups; whatever cuts sums divides them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(32, 64, 2, bias=False)
        self.norm = nn.BatchNorm3d(64)
        self.second = nn.ConvTranspose3d(64, 16, 2, stride=(1, 2, 1), output_padding=(0, 1, 0), groups=2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.norm(self.first(x)))).mean(dim=(2, 3, 4)))


def gpt2() -> nn.Module:
    """transformers' GPT-2 with one layer; its linear layers are of a type of their own, and transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=8,
        n_embd=WIDTH,
        n_layer=1,
        n_head=2,
        n_inner=2 * WIDTH,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    """transformers' Llama with one layer, whose head is its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    """transformers' BertModel with one layer."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=WIDTH,
        max_position_embeddings=8,
    )
    return BertModel(config)


def features(samples: int = 2) -> Tensor:
    return torch.randn(samples, WIDTH)


def images(samples: int = 2) -> Tensor:
    return torch.randn(samples, 3, 8, 8)


def signals(samples: int = 2) -> Tensor:
    return torch.randn(samples, WIDTH, 7)


def volumes(samples: int = 2) -> Tensor:
    return torch.randn(samples, 32, 4, 3, 4)


def ids(samples: int = 2) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, WORDS, (samples, 4))}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A kind of model, what becomes of its modules by default, and a batch for it.

    `refused` is the error of a scheme that the model cannot have; None for one that it can.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[..., Batch]
    quantized: frozenset[str]
    refused: Callable[[Scheme], str | None] = lambda scheme: None


def no_scales_per_token(first: str) -> Callable[[Scheme], str | None]:
    """What convolutions refuse, the first of them by this name."""

    def refused(scheme: Scheme) -> str | None:
        per = {"w4a8-ort": "g32", "w2a8-ort": "g32", "fp8-block": "g128", "nvfp4": "g16"}
        per |= dict.fromkeys(("mxfp8", "mxfp6", "mxfp4", "mxint8"), "g32")
        per |= dict.fromkeys(("nvfp4-2d", "nvfp4-4over6"), "g16")
        per |= dict.fromkeys(("q8_0", "q4_0", "q4_1", "mxfp4-gguf"), "g32") | {"tq2_0": "g256"}
        per |= dict.fromkeys(("w2a8", "w3a8", "w4a8", "w4afp8", "w8a8", "fp8"), "row")
        if scheme.name not in per:
            return None
        return (
            f"{first}: {scheme.name!r} has input scales per {per[scheme.name]}, but a convolution's input "
            "has one for all; use w8a8-static, w8a8-ort, w8a8-ort-static or a weight-only scheme"
        )

    return refused


ORT = ("w8a8-ort", "w8a8-ort-static", "w7a8-ort", "w7a8-ort-static")


def no_groups_either(first: str, columns: int) -> Callable[[Scheme], str | None]:
    """What convolutions refuse whose sums are too short for groups."""

    def refused(scheme: Scheme) -> str | None:
        size = {"nvfp4a16": 16, "nf4": 64}.get(scheme.name, 32)
        if message := no_scales_per_token(first)(scheme):
            return message
        if scheme.name in ("w8a8-static", "fp8-static", *ORT):
            return None
        if scheme.name.endswith("-seq"):
            return None
        return f"{first}: {columns} columns cannot be cut into groups of {size}; use per_channel"

    return refused


_BERT_LAYER = "encoder.layer.0"
MODELS = (
    Row(name="mlp", build=MLP, batch=features, quantized=frozenset({"up", "down"})),
    Row(
        name="bert",
        build=bert,
        batch=ids,
        quantized=frozenset(
            {
                *(f"{_BERT_LAYER}.attention.self.{name}" for name in ("query", "key", "value")),
                f"{_BERT_LAYER}.attention.output.dense",
                f"{_BERT_LAYER}.intermediate.dense",
                f"{_BERT_LAYER}.output.dense",
                "pooler.dense",
            }
        ),
    ),
    Row(name="tied", build=Tied, batch=ids, quantized=frozenset({"block"})),
    Row(name="shared", build=Shared, batch=features, quantized=frozenset({"first", "later.0"})),
    Row(
        name="gpt2",
        build=gpt2,
        batch=ids,
        quantized=frozenset(
            f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ),
    ),
    Row(
        name="cnn",
        build=Residual,
        batch=images,
        quantized=frozenset({"stem.0", "depthwise", "grouped"}),
        refused=no_groups_either("stem.0", 27),
    ),
    Row(
        name="conv1d",
        build=Signal,
        batch=signals,
        quantized=frozenset({"first", "second"}),
        refused=no_scales_per_token("first"),
    ),
    Row(
        name="conv3d",
        build=Volume,
        batch=volumes,
        quantized=frozenset({"first", "second"}),
        refused=no_scales_per_token("first"),
    ),
)


def _affine_weights() -> Scheme:
    # No preset has weights with a zero point; a scheme of one's own may.
    weights = replace(PRESETS["w4a16"].weights, scale_rule="affine", format=IntFormat(4, signed=False))
    inputs = replace(PRESETS["w8a8-static"].inputs, format=IntFormat(8), granularity=per_tensor)
    return Scheme(name="affine-weights", weights=weights, inputs=inputs)


SCHEMES = (*PRESETS.values(), _affine_weights())


def name_of(row: Any) -> str:
    """A test id: what is in the row, never its position."""
    return str(getattr(row, "name", row))


PAIRS = [(row, scheme) for row in MODELS for scheme in SCHEMES if row.refused(scheme) is None]
REFUSED = [(row, scheme) for row in MODELS for scheme in SCHEMES if row.refused(scheme) is not None]

every_model = pytest.mark.parametrize("row", MODELS, ids=name_of)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
every_pair = pytest.mark.parametrize(("row", "scheme"), PAIRS, ids=name_of)
every_refused_pair = pytest.mark.parametrize(("row", "scheme"), REFUSED, ids=name_of)


@pytest.fixture(autouse=True)
def unchecked_tables(request: pytest.FixtureRequest) -> Iterator[None]:
    """No type checks of numerics inside the tables: they cost ten times what they check.

    A room's conftest asks for it. `tests/nn` does not, and runs over every scheme too.
    """
    tables = {"row", "scheme"} & set(request.fixturenames)
    jaxtyping.config.update("jaxtyping_disable", bool(tables))
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def recipe(scheme: Scheme | str, *rules: tuple[str, Any], **fields: Any) -> Recipe:
    """A recipe in few words; a rule is (match, scheme)."""
    written = [{"match": match, "scheme": given} for match, given in rules]
    return Recipe.model_validate({"scheme": scheme, "rules": written, **fields})


def built(row: Row) -> nn.Module:
    """The float model, as ready for use."""
    return row.build().eval()


def tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor that a model returned."""
    if isinstance(output, Tensor):
        yield output
    else:
        yield from (value for value in output.values() if isinstance(value, Tensor))


@torch.no_grad()
def run(model: nn.Module, batch: Batch) -> list[Tensor]:
    """What the model returns for a batch."""
    found = list(tensors(call(model, batch)))
    assert found, "the model returned no tensor"
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Bit for bit, in the same dtype."""
    return all(
        a.dtype == b.dtype and a.isfinite().all() and torch.equal(a, b)
        for a, b in zip(first, second, strict=True)
    )
