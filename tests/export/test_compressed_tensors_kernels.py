"""What vLLM does not compute as it was trained on the GPU that is named is refused before any work.

The sets and names are those that vLLM's parser answered (`python -m tests.export.vllm_parser VENV VERSION`).
"""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from recoup import explain, resolve
from recoup.export import compressed_tensors_config as schema
from recoup.export import preflight
from recoup.export.compressed_tensors_consumers import CONSUMERS, check_consumer
from recoup.export.compressed_tensors_kernels import GPUS, KERNELS, OLDEST, Kernel, kernel_for
from recoup.nn import CodedLinear
from recoup.schemes import Scheme, preset

from .llamas import SCHEMES, llama

FP8 = {"fp8", "fp8-static", "fp8-mixed", "fp8-tensor"}
FLOAT4 = {"mxfp4", "nvfp4"}
EVERYWHERE = {"w2a8", "w3a8", "w4a8", "w4afp8", "mxfp8a16", "mxfp4a16", "fp8-block"}
REFUSED: dict[tuple[str, str], set[str]] = {
    ("vllm", "ampere"): EVERYWHERE | FP8 | FLOAT4 | {"mxfp8", "w4afp8-g128"},
    ("vllm", "ada"): EVERYWHERE | FLOAT4 | {"mxfp8", "w4afp8-g128"},
    ("vllm", "hopper"): EVERYWHERE | FLOAT4 | {"mxfp8"},
    ("vllm", "blackwell"): EVERYWHERE
    | {"w8a8", "w8a8-static", "w8a8-tensor", "w3a8-channels", "w4afp8-g128"},
    ("vllm==0.29", "hopper"): EVERYWHERE - {"w2a8", "w3a8"} | FLOAT4 | {"mxfp8"},
    ("vllm==0.24", "ada"): EVERYWHERE - {"fp8-block"}
    | FLOAT4
    | {"mxfp8", "w4afp8-g128", "w3a8-channels"}
    | {f"w{bits}a16" for bits in (2, 3, 5, 6, 7)},
}


def one(rows: int, columns: int) -> nn.Module:
    model: Any = nn.ModuleDict({"proj": nn.Linear(columns, rows, device="meta")})
    model.config = SimpleNamespace()
    return model


def asked(scheme: Scheme, consumer: str, gpu: str, *, rows: int = 512, columns: int = 512) -> str:
    """The kernel, or the refusal."""
    try:
        return check_consumer(one(rows, columns), {"proj": (scheme, CodedLinear)}, consumer, gpu)["proj"]
    except ValueError as error:
        return f"refused: {error}"


@pytest.mark.parametrize(("consumer", "gpu"), REFUSED)
def test_a_gpu_is_refused_exactly_what_it_does_not_compute(consumer: str, gpu: str) -> None:
    refused = {n for n, scheme in SCHEMES.items() if asked(scheme, consumer, gpu).startswith("refused")}
    assert refused == REFUSED[consumer, gpu]


@pytest.mark.parametrize("gpu", GPUS)
def test_what_to_take_instead_is_computed_as_trained(gpu: str) -> None:
    for name in ("w4a16", *GPUS[gpu]):
        assert asked(preset(name), "vllm>=0.22", gpu).endswith(f"on {gpu} (vllm 0.33)"), name


@pytest.mark.parametrize(
    "row", KERNELS, ids=lambda row: f"{row.name or 'none'}: {row.source}, {row.versions}"
)
def test_every_kernel_takes_a_layer_of_a_release(row: Kernel) -> None:
    schemes = [*SCHEMES.values(), *(preset(f"{name}-g256") for name in ("w4a16", "w8a16"))]
    schemes += [Scheme(name=f"w{bits}a8-channels", weights=SCHEMES[f"w{bits}a16-channels"].weights,
                       inputs=preset("w8a8").inputs) for bits in (4,)]  # fmt: skip
    releases = [max(row.versions[0], OLDEST)]
    taken = (
        kernel_for(schema.layout(scheme), part, gpu, release)
        for scheme, part, gpu, release in product(schemes, ((512, 512), (48, 48)), GPUS, releases)
    )
    assert any(found is row for found in taken)
    assert row.versions[1] > OLDEST
    assert row.versions[0] <= CONSUMERS["vllm"][1]


# scheme, consumer, GPU, rows and columns of the part -> what vLLM takes
SHAPES: dict[str, tuple[str, str, str, int, int, str]] = {
    "Machete's tile": ("w4a16-g128", "vllm", "hopper", 128, 640, "Machete on hopper (vllm 0.33)"),
    "not Machete's rows": ("w4a16-g128", "vllm", "hopper", 64, 512, "Humming on hopper"),
    "nor before Humming": ("w4a16-g128", "vllm==0.29", "hopper", 64, 512, "Marlin on hopper (vllm 0.29)"),
    "groups of 32": ("w4a16", "vllm==0.29", "hopper", 512, 512, "Marlin on hopper"),
    "Marlin pads": ("w4a16", "vllm==0.24", "ampere", 24, 480, "Marlin on ampere (vllm 0.24)"),
    "Humming does": ("w4a16", "vllm==0.23", "ampere", 24, 480, "Humming or TritonW4A16 on ampere"),
    "Marlin's tile": ("w4a16", "vllm==0.22", "ampere", 64, 128, "Marlin on ampere"),
    "not its rows": ("w4a16", "vllm==0.22", "ampere", 96, 128, "refused: proj: vllm 0.22 has no kernel"),
    "not its columns": ("w4a16", "vllm>=0.20", "ada", 64, 576, "refused: proj: vllm 0.20 has no kernel"),
    "AllSpark's": ("w8a16-channels", "vllm==0.22", "ada", 48, 48, "AllSpark on ada"),
    "a group of another size": ("w4a16-g256", "vllm==0.22", "ampere", 512, 512, "refused: proj: vllm 0.22"),
    "CUTLASS' tile": ("w4afp8-g128", "vllm", "hopper", 128, 128, "CUTLASS W4A8 on hopper"),
    "not CUTLASS' tile": ("w4afp8-g128", "vllm", "hopper", 192, 128, "refused: proj: vllm 0.33 multiplies"),
    "blocks that no row is for": ("fp8-block", "vllm==0.27", "ada", 512, 512, "unknown on ada (vllm 0.27)"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_a_kernel_takes_parts_of_its_tiles(case: str) -> None:
    scheme, consumer, gpu, rows, columns, expected = SHAPES[case]
    found = SCHEMES.get(scheme) or preset(scheme)
    assert asked(found, consumer, gpu, rows=rows, columns=columns).startswith(expected)


def test_a_part_without_a_kernel_is_refused_without_a_gpu() -> None:
    modules = {"proj": (preset("w4a16"), CodedLinear)}
    with pytest.raises(
        ValueError, match=r"vllm 0\.20 has no kernel in bfloat16 .* \(96 x 128 on every GPU\)"
    ):
        check_consumer(one(96, 128), modules, "vllm>=0.20")
    assert check_consumer(one(96, 128), modules, "vllm>=0.23") == {}
    modules = {"proj": (preset("w4afp8-g128"), CodedLinear)}
    with pytest.raises(ValueError, match=r"in parts of whole tiles of 128 x 128 only .*; take fewer devices"):
        check_consumer(one(192, 128), modules, "vllm")


SENTENCES: dict[str, tuple[str, str | None, str, str]] = {
    "float inputs": (
        "fp8", "vllm", "ampere",
        r"^model\.layers\.0\.self_attn\.q_proj: vllm 0\.33 leaves in float the inputs that training "
        r"quantized \(384 x 128 on ampere\) \(scheme 'fp8', vllm/.*w8a16_fp8\.py\); take w4a16 or w8a8$"),
    "four bits": ("nvfp4", "vllm>=0.32", "hopper", r"vllm 0\.32 leaves in float .* take w4a16 or w8a8 or"),
    "other inputs": ("mxfp4", "vllm", "hopper", "rounds the inputs to fp8 with one scale per token"),
    "no scheme": ("w4afp8-g128", "vllm", "ampere", "has no scheme of packed weights with fp8 inputs"),
    "no product": ("w8a8", "vllm", "blackwell", r"ends at its first product of int8, .* take w4a16 or fp8"),
    "other codes": ("fp8-block", "vllm", "blackwell", "powers of two where DeepGEMM is installed, unless"),
    "a tile": ("w4a16", "vllm==0.20", "ampere",
        r"down_proj: vllm 0\.20 has no kernel .* \(128 x 96 on ampere\).*take vllm>=0\.23, fewer"),
    "no reader": ("fp8", None, "ampere", r"^export\.gpu: ampere asked without a reader; name one"),
    "no GPU": ("fp8", "vllm", "hoper", r"^export\.gpu: no GPU 'hoper'; did you mean 'hopper'\?"),
    "no GPU alike": ("fp8", "vllm", "x", "known are ampere, ada, hopper, blackwell"),
    "another reader": ("fp8", "sglang", "ada", r"^export\.gpu: ada asked, of sglang no kernels are known"),
    "too old": ("fp8", "vllm==0.15", "ada", r"known from 0\.16, not of 0\.15; name a newer one as consumer"),
}  # fmt: skip


@pytest.mark.parametrize("case", SENTENCES)
def test_preflight_says_what_the_gpu_does_and_what_to_take(case: str) -> None:
    scheme, consumer, gpu, message = SENTENCES[case]
    model = llama()
    if case == "a tile":
        model.get_submodule("model.layers.0.mlp").down_proj = nn.Linear(96, 128)
    with pytest.raises(ValueError, match=message) as error:
        preflight(model, resolve(model, scheme), "compressed-tensors", consumer=consumer, gpu=gpu)
    assert "\n" not in str(error.value)


def test_explain_shows_the_kernel() -> None:
    model = llama()
    plan = resolve(model, "w4a16-g128")
    kernels = preflight(model, plan, "compressed-tensors", consumer="vllm", gpu="hopper")
    shown = str(explain(model, plan, kernels))
    assert shown.count("pack-quantized, Machete on hopper (vllm 0.33)") == 7


def test_without_a_gpu_no_kernel_is_named() -> None:
    model = llama()
    plan = resolve(model, "w4a16")
    assert set(preflight(model, plan, "compressed-tensors", consumer="vllm").values()) == {"pack-quantized"}
