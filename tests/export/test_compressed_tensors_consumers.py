"""What a named reader of the folder would not compute as it was trained is refused before any work.

The sets are those that vLLM's parser answered (`python -m tests.export.vllm_parser VENV VERSION`).
"""

from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from torch import nn

from recoup import Recipe, Scheme, resolve
from recoup.export import compressed_tensors_config as schema
from recoup.export import preflight
from recoup.export.compressed_tensors_consumers import BREAKAGES, CONSUMERS, Breakage, check_consumer
from recoup.nn import CodedLinear

from .llamas import SCHEMES, llama

ODD = {f"w{bits}a16" for bits in (2, 3, 5, 6, 7)}
INT8_IN_GROUPS = {"w2a8", "w3a8", "w4a8"}
INT8 = INT8_IN_GROUPS | {"w3a8-channels"}
REFUSED: dict[str, set[str]] = {
    "vllm==0.15": ODD | INT8 | {"w4afp8", "mxfp8", "mxfp8a16", "mxfp4"},
    "vllm==0.20": ODD | INT8 | {"w4afp8", "mxfp8a16", "mxfp4"},
    "vllm==0.22": ODD | INT8 | {"w4afp8", "mxfp8a16", "mxfp4a16"},
    "vllm==0.25": INT8 | {"w4afp8", "mxfp8a16", "mxfp4a16"},
    "vllm==0.27.1": {"w4a8", "w4afp8", "mxfp8a16", "mxfp4a16"},
    "vllm>=0.27": INT8_IN_GROUPS | {"w4afp8", "mxfp8a16", "mxfp4a16"},
    "vllm>=0.32": INT8_IN_GROUPS | {"w4afp8", "mxfp8a16", "mxfp4a16"},
    "vllm": INT8_IN_GROUPS | {"w4afp8", "mxfp8a16", "mxfp4a16"},
    "sglang": ODD | INT8 | {"w4afp8", "w4afp8-g128", "mxfp8", "mxfp8a16", "mxfp4", "mxfp4a16"},
    "transformers": set(),
    "compressed-tensors": set(),
    "compressed-tensors>=0.17": ODD - {"w2a16"} | {"w3a8", "w3a8-channels"},
}

ONE = nn.ModuleDict({"proj": nn.Linear(512, 512, device="meta")})
ONE.config = SimpleNamespace()  # pyright: ignore[reportArgumentType]


def refused(scheme: Scheme, consumer: str) -> str | None:
    try:
        check_consumer(ONE, {"proj": (scheme, CodedLinear)}, consumer)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("consumer", REFUSED)
def test_a_consumer_is_refused_exactly_what_it_does_not_compute(consumer: str) -> None:
    assert {name for name, scheme in SCHEMES.items() if refused(scheme, consumer)} == REFUSED[consumer]


@pytest.mark.parametrize("row", BREAKAGES, ids=lambda row: f"{row.consumer}: {row.what}")
def test_every_breakage_concerns_a_scheme_and_a_release(row: Breakage) -> None:
    assert any(row.breaks(schema.layout(scheme)) for scheme in SCHEMES.values())
    oldest, newest = CONSUMERS[row.consumer]
    assert row.versions[0] <= newest
    assert row.versions[1] > oldest


SENTENCES: dict[str, tuple[str, str, str]] = {
    "the first release": (
        "w3a16", "vllm>=0.20",
        r"^model\.layers\.0\.self_attn\.q_proj: vllm 0\.20 reads packed weights of 4 and 8 bits only "
        r"\(scheme 'w3a16', .*wNa16\.py.*\); take vllm>=0\.25, or 4 or 8 bits$"),
    "the newest release": ("mxfp4a16", "vllm", r"vllm 0\.33 quantizes the inputs .* Blackwell"),
    "float inputs": ("w4a8", "vllm>=0.27", r"vllm 0\.27 takes Marlin .* leaves their inputs in float"),
    "float inputs of groups": (
        "w3a8", "vllm>=0.27",
        r"vllm 0\.31 leaves the inputs of packed weights in groups in float .*; take w8a8, or the same"),
    "another reader": ("w4a16", "vlm", "^export.consumer: no reader 'vlm'; did you mean 'vllm'?"),
    "no reader": ("w4a16", "triton", "no reader 'triton'; known are vllm, sglang, transformers, compressed"),
    "too old": ("w4a16", "vllm>=0.9", r"known of vllm are 0\.15 to 0\.33; name one of these"),
    "too new": ("w4a16", "vllm==0.34", r"known of vllm are 0\.15 to 0\.33"),
    "no relation": ("w4a16", "vllm<0.30", r"'vllm<0\.30' is no reader; write vllm, vllm==0\.33 or"),
    "no version": ("w4a16", "vllm>=", "is no reader"),
}  # fmt: skip


@pytest.mark.parametrize("case", SENTENCES)
def test_preflight_names_the_release_and_what_to_do(case: str) -> None:
    scheme, consumer, message = SENTENCES[case]
    model = llama()
    with pytest.raises(ValueError, match=message):
        preflight(model, resolve(model, scheme), "compressed-tensors", consumer=consumer)


def test_without_a_consumer_the_engine_that_proves_decides() -> None:
    model = llama()
    assert preflight(model, resolve(model, "w4afp8"), "compressed-tensors")


def test_every_layout_of_a_recipe_is_asked_for() -> None:
    model = llama()
    recipe = Recipe.model_validate(
        {"scheme": "w4a16", "rules": [{"match": "*.down_proj", "scheme": "mxfp8"}]}
    )
    with pytest.raises(ValueError, match=r"down_proj: vllm 0\.15 does not know mxfp8"):
        preflight(model, resolve(model, recipe), "compressed-tensors", consumer="vllm>=0.15")


@pytest.mark.parametrize("target", ["onnx", "pytorch"])
def test_a_target_with_one_reader_takes_no_consumer(target: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    with pytest.raises(ValueError, match=r"^export\.consumer: vllm asked, this target has one reader"):
        preflight(model, resolve(model, "w4a16"), target, consumer="vllm")


def test_a_recipe_names_its_consumer_and_its_gpu() -> None:
    settings = {"consumer": "vllm>=0.27", "gpu": "hopper"}
    recipe = Recipe.model_validate({"scheme": "w4a16", "export": settings})
    assert recipe.export.consumer == "vllm>=0.27"
    assert recipe.export.gpu == "hopper"
    with pytest.raises(ValidationError):
        Recipe.model_validate({"scheme": "w4a16", "export": {"consumer": 3}})
