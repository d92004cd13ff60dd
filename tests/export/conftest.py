"""Two exports that many tests look at: a table of schemes side by side, and a chain that tests damage."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from recoup import Recipe, Scheme, calibrate, convert, export, prepare, resolve
from recoup.export import Parity
from recoup.numerics import E5M2, IntFormat, per_block, per_channel, per_group
from recoup.schemes import PRESETS, preset

WIDTH, FEATURES, WORDS = 256, 24, 12
LARGEST = 127 * 2.0**-3


def _own() -> list[Scheme]:
    """Schemes that no preset has, of which onnxruntime runs each in another way."""
    grouped, static = PRESETS["w4a16"].weights, PRESETS["w8a8-ort-static"].inputs
    fp8 = PRESETS["fp8"]
    affine = replace(grouped, scale_rule="affine", format=IntFormat(4, signed=False))
    return [
        Scheme(name="affine-unsigned", weights=affine),
        Scheme(name="affine-signed", weights=replace(affine, format=IntFormat(4))),
        Scheme(name="affine-3-bits-per-token", weights=replace(affine, format=IntFormat(3, signed=False)),
               inputs=PRESETS["w8a8"].inputs),
        Scheme(name="affine-odd-groups", weights=replace(affine, granularity=per_group(256))),
        Scheme(name="5-bits", weights=replace(grouped, format=IntFormat(5))),
        Scheme(name="w8a16-channels", weights=PRESETS["w8a8"].weights),
        Scheme(name="4-bit-channels", weights=replace(grouped, granularity=per_channel)),
        Scheme(name="fp8-blocks", weights=replace(fp8.weights, granularity=per_block(8, 128)),
               inputs=replace(fp8.inputs, granularity=per_group(128)) if fp8.inputs else None),
        Scheme(name="e5m2", weights=replace(fp8.weights, format=E5M2)),
        Scheme(name="learned", weights=replace(grouped, ranges="learned")),
        Scheme(name="learned-both", weights=replace(PRESETS["w8a8"].weights, ranges="learned"),
               inputs=replace(static, ranges="learned") if static else None),
    ]  # fmt: skip


NAMES = [
    *("w8a16", "w4a16", "w3a16", "w2a16", "w4a8", "w3a8", "w2a8", "w4a8-ort", "w2a8-ort"),
    *("w8a8", "w8a8-static", "w8a8-ort", "w8a8-ort-static", "w7a8-ort", "w7a8-ort-static"),
    *("fp8", "fp8-static", "w4afp8"),
    *("w8a16-g16", "w4a16-g16", "w4a16-g64", "w4a16-g128", "w2a16-g16"),
    *("w3a16-g128", "w4a8-g64", "w2a8-g128"),
    *("w4a8-ort-g16", "w4a8-ort-g64", "w4a8-ort-g128", "w2a8-ort-g64", "w2a8-ort-g128"),
]
SCHEMES = {scheme.name: scheme for scheme in (*map(preset, NAMES), *_own())}
EMBEDDINGS = {f"embedding-{name}": SCHEMES[name] for name in ("w8a16", "w4a16", "w3a16", "w2a16-g16",
                                                              "affine-unsigned", "e5m2")}  # fmt: skip
LINEARS = {f"{name}{suffix}": scheme for name, scheme in SCHEMES.items() for suffix in ("", "-no-bias")}


def per_tensor_affine(scheme: Scheme) -> bool:
    return scheme.inputs is not None and not scheme.inputs.symmetric


class Branches(nn.Module):
    """Every scheme on the same inputs: `x` for symmetric input lattices, `u` for those with a zero point.

    The first output feature of every layer has the largest weight everywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.ModuleDict(
            {name: nn.Linear(WIDTH, FEATURES, bias=not name.endswith("-no-bias")) for name in LINEARS}
        )
        self.embedding = nn.ModuleDict({name: nn.Embedding(WORDS, WIDTH) for name in EMBEDDINGS})
        with torch.no_grad():
            for linear in self.linear.values():
                linear.weight[0] = 1.0

    def forward(self, x: Tensor, u: Tensor, ids: Tensor) -> dict[str, Tensor]:
        found = {
            name: linear(u if per_tensor_affine(LINEARS[name]) else x) for name, linear in self.linear.items()
        }
        return found | {name: embedding(ids) for name, embedding in self.embedding.items()}


def exact(batch: int, tokens: int) -> dict[str, Tensor]:
    """Inputs whose codes are beyond doubt: integers times a power of two, with the extrema of every range.

    Every 16 neighbours of `x` hold the largest value of their token, and so do tokens of nothing but it;
    the last token is zero. The range of `u` is 255 steps.
    """
    x = torch.randint(-127, 128, (batch, tokens, WIDTH)).float()
    x[..., ::16] = 127.0
    x[:, 0] = 127.0
    x = x * 2.0 ** -(3 + torch.arange(batch * tokens) % 3).reshape(batch, tokens, 1)
    x[0, 0] = LARGEST
    x[-1, -1] = 0.0
    u = torch.randint(-100, 156, (batch, tokens, WIDTH)).float()
    u[0, 0], u[-1, -1, 0] = 155.0, -100.0
    return {"x": x, "u": u / 16, "ids": torch.randint(0, WORDS, (batch, tokens))}


def noise(batch: int, tokens: int) -> dict[str, Tensor]:
    drawn = torch.randn(2, batch, tokens, WIDTH)
    return {"x": drawn[0], "u": drawn[1], "ids": torch.randint(0, WORDS, (batch, tokens))}


class Chain(nn.Module):
    """Layers one after another, each of another kind, and a head that stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Linear(64, 64)
        self.floats = nn.Linear(64, 64)
        self.again = nn.Linear(64, 64)
        self.tokens = nn.Linear(64, 64)
        self.integers = nn.Linear(64, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.blocks, self.floats, self.again, self.tokens, self.integers):
            x = torch.tanh(layer(x))
        return self.head(x)


CHAIN = {"blocks": "w4a8-ort", "floats": "w4a16", "again": "w4a16", "tokens": "w4a8", "integers": "w8a8-ort"}


@dataclass(frozen=True)
class Exported:
    """A prepared model, its copy converted, and its file."""

    model: nn.Module
    state: dict[str, Tensor]
    converted: nn.Module
    folder: Path
    file: onnx.ModelProto
    parity: Parity


def ready(model: nn.Module, rules: dict[str, Scheme | str], *batches: object) -> nn.Module:
    recipe = Recipe.model_validate(
        {"scheme": "w4a16", "rules": [{"match": match, "scheme": scheme} for match, scheme in rules.items()]}
    )
    prepare(model, resolve(model, recipe))
    calibrate(model, batches)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("quantizer.scale"):
                parameter *= 1.1  # as training would; x / 1.1 has no ties for integers x
    return model


def exported(model: nn.Module, folder: Path, example: object) -> Exported:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parity = export(model, folder, "onnx", example=example)
    converted = convert(copy.deepcopy(model)).eval()
    return Exported(model, state, converted, folder, onnx.load(folder / "model.onnx"), parity)


@pytest.fixture(scope="session")
def branches(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    rules = {f"linear.{name}": scheme for name, scheme in LINEARS.items()}
    rules |= {f"embedding.{name}": scheme for name, scheme in EMBEDDINGS.items()}
    model = ready(Branches(), rules, exact(2, 3))
    return exported(model, tmp_path_factory.mktemp("branches") / "out", noise(2, 3))


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    model = ready(Chain(), CHAIN, torch.randn(8, 64))
    return exported(model, tmp_path_factory.mktemp("chain") / "out", torch.randn(4, 64))
