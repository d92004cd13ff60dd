"""Of layers of experts, what their reader does not compute as it was trained is refused before any work."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from recoup.export import compressed_tensors_config as schema
from recoup.export.compressed_tensors_consumers import check_consumer
from recoup.export.compressed_tensors_expert_kernels import EXPERT_KERNELS, OLDEST_EXPERTS
from recoup.export.compressed_tensors_kernels import GPUS, Kernel, kernel_for
from recoup.export.tensor_parallel import check_split
from recoup.nn import CodedExperts
from recoup.schemes import Scheme, preset

from .llamas import SCHEMES

PACKED_INPUTS = {"w2a8", "w3a8", "w4a8", "w4afp8", "w3a8-channels"}
OTHER_SCALES = {"w8a8-static", "w8a8-tensor", "fp8-mixed", "fp8-tensor"}
NOWHERE = PACKED_INPUTS | OTHER_SCALES | {"mxfp4a16", "mxfp8a16"}  # or with inputs that were trained in float
FP8 = {"fp8", "fp8-static", "fp8-block"}
FLOAT_INPUTS = {"mxfp8", "mxfp4", "nvfp4"}
NARROW = {f"w{bits}a16" for bits in (2, 3, 5, 6, 7)}
QUANTIZED = {"mxfp4a16", "mxfp8a16"}
# Whether a scheme's inputs were trained in float matters where no GPU is named, or that one is.
REFUSED: dict[tuple[str, str | None], set[str]] = {
    ("vllm", None): NOWHERE,
    ("vllm==0.20", None): NOWHERE | NARROW,
    ("vllm", "ampere"): NOWHERE - QUANTIZED | FP8 | FLOAT_INPUTS | {"w4afp8-g128"},
    ("vllm", "ada"): NOWHERE - QUANTIZED | FLOAT_INPUTS | {"w4afp8-g128"},
    ("vllm>=0.25", "hopper"): NOWHERE - QUANTIZED | FLOAT_INPUTS,
    ("vllm", "blackwell"): NOWHERE | {"w4afp8-g128"},
    ("transformers", None): {
        name for name, scheme in SCHEMES.items() if scheme.inputs or name in ("mxfp8a16", "nvfp4a16")
    },
}


class Experts(nn.Module):
    """As much of a layer of experts as is asked for."""

    is_transposed = False

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.empty(2, width, inner, device="meta"))


def model_of(width: int = 512, inner: int = 512) -> nn.Module:
    model: Any = nn.ModuleDict({"experts": Experts(width, inner)})
    model.tp_plan = {"experts": "colwise"}
    model.config = None
    return model


def asked(scheme: Scheme, consumer: str, gpu: str | None, devices: int = 1, **sizes: int) -> str:
    """The kernel, or the refusal."""
    modules = {"experts": (scheme, CodedExperts)}
    try:
        return check_consumer(model_of(**sizes), modules, consumer, gpu, devices).get("experts", "")
    except ValueError as error:
        return f"refused: {error}"


@pytest.mark.parametrize(("consumer", "gpu"), REFUSED)
def test_experts_are_refused_exactly_what_their_reader_does_not_compute(
    consumer: str, gpu: str | None
) -> None:
    refused = {n for n, scheme in SCHEMES.items() if asked(scheme, consumer, gpu).startswith("refused")}
    assert refused == REFUSED[consumer, gpu]


@pytest.mark.parametrize(
    "row", EXPERT_KERNELS, ids=lambda row: f"{row.name or 'none'}: {row.gpus}, {row.source}"
)
def test_every_kernel_takes_experts_of_a_release(row: Kernel) -> None:
    release = max(row.versions[0], OLDEST_EXPERTS)
    taken = (
        kernel_for(schema.layout(scheme), (512, 512), gpu, release, EXPERT_KERNELS)
        for scheme, gpu in product(SCHEMES.values(), GPUS)
    )
    assert any(found is row for found in taken)


def test_the_kernel_is_shown_with_its_gpu_and_release() -> None:
    assert asked(preset("w4a16"), "vllm", "hopper") == "Marlin, Humming or Triton WNA16 on hopper (vllm 0.33)"
    assert asked(preset("w3a16"), "vllm", "hopper") == "unknown on hopper (vllm 0.33)"


def test_a_refusal_names_the_layer_the_release_and_what_to_take() -> None:
    assert asked(preset("w4a8"), "vllm", None) == (
        "refused: experts: vllm 0.33 has no kernel of a GPU for packed experts with int8 inputs (experts of "
        "512 x 512 on GPUs) (scheme 'w4a8', vllm/model_executor/layers/quantization/compressed_tensors/"
        "compressed_tensors_moe/compressed_tensors_moe_w4a8_int8.py, CompressedTensorsW4A8Int8MoEMethod); "
        "take w4a16"
    )
    assert "CUTLASS" in asked(preset("w4afp8-g128"), "vllm", "hopper")
    assert "tiles of 256 x 256" in asked(preset("w4afp8-g128"), "vllm", "hopper", devices=4)
    assert "makes stacks of experts, and leaves their inputs in float" in asked(
        preset("fp8"), "transformers", None
    )


@pytest.mark.parametrize("consumer", ["sglang", "vllm==0.19"])
def test_readers_whose_experts_are_not_known_are_refused(consumer: str) -> None:
    said = asked(preset("w4a16"), consumer, None)
    assert said == (
        f"refused: experts: {consumer} asked, and its kernels of experts are not known; name vllm>=0.20, or "
        "leave consumer out"
    )


def test_the_features_inside_of_experts_are_dealt_out_in_whole_blocks() -> None:
    modules = {"experts": (preset("w4a16"), CodedExperts)}
    check_split(model_of(inner=128), modules, 4)
    message = (
        r"^experts: 128 features of each expert cannot be split into whole blocks of 32 on 8 devices; take"
    )
    with pytest.raises(ValueError, match=message):
        check_split(model_of(inner=128), modules, 8)
    bits = {"experts": (SCHEMES["w4a16-channels"], CodedExperts)}
    with pytest.raises(ValueError, match=r"^experts: 4 codes of 4 bits do not fill words of 32 on 2 devices"):
        check_split(model_of(inner=8), bits, 2)
