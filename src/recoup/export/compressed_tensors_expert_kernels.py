"""Which kernel of vLLM computes a layer of experts on a GPU, and whether as it was trained.

Experts have kernels of their own, and fewer schemes than Linears. The rows are from the sources of the
releases that `OLDEST_EXPERTS` and `CONSUMERS` bound: `get_moe_method` chooses a class by the scheme, and the
class, or its oracle, a kernel by the GPU. Nothing ran. What no row is for is not known.
"""

from collections.abc import Callable
from typing import Any

from recoup.export import compressed_tensors_config as schema
from recoup.export.compressed_tensors_config import Layout
from recoup.export.compressed_tensors_kernels import (
    GPUS,
    Kernel,
    Version,
    always,
    float_inputs,
    kernel_for,
    nothing,
    of_format,
    packed,
    quantized_inputs,
)

OLDEST_EXPERTS: Version = (0, 20)  # whose kernels of experts are known
_MOE = (
    "vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe"
)
_ORACLE = "vllm/model_executor/layers/fused_moe/oracle/"
_OLDER, _OTHERS = ("ampere", "ada", "hopper"), ("ampere", "ada", "blackwell")


def _of(format_: str, *strategies: tuple[str, str]) -> Callable[[Layout], bool]:
    """A format whose weights and inputs have scales so; static ones where the inputs have one for all."""

    def takes(layout: Layout) -> bool:
        inputs: dict[str, Any] = layout.inputs or {}
        return layout.format == format_ and (layout.weights["strategy"], inputs.get("strategy")) in strategies

    return takes


def _blocks(layout: Layout) -> bool:
    return layout.format == schema.FLOAT8 and layout.weights["strategy"] == "block"


def _inputs_of(format_: str) -> Callable[[Layout], bool]:
    return lambda layout: layout.format == format_ and layout.inputs is not None


EXPERT_KERNELS: tuple[Kernel, ...] = (
    # integer weights
    Kernel(
        name="Marlin, Humming or Triton WNA16",
        takes=packed(4, 8, groups=(None, 32, 64, 128)),
        wrong=nothing,
        source=f"{_MOE}.py, get_moe_method",
    ),
    Kernel(
        name="",
        takes=packed(2, 3, 5, 6, 7),
        wrong=always("reads packed experts of 4 and 8 bits only"),
        versions=((0,), (0, 25)),
        instead="vllm>=0.25, or 4 or 8 bits",
        source=f"{_MOE}.py, WNA16_SUPPORTED_BITS",
    ),
    Kernel(
        name="",
        takes=packed(inputs="int"),
        wrong=always("has no kernel of a GPU for packed experts with int8 inputs"),
        source=f"{_MOE}_w4a8_int8.py, CompressedTensorsW4A8Int8MoEMethod",
    ),
    Kernel(
        name="CUTLASS W4A8",
        gpus=("hopper",),
        takes=packed(4, inputs="float", groups=(128,)),
        wrong=nothing,
        tile=(256, 256),
        source=f"{_MOE}_w4a8_fp8.py",
    ),
    Kernel(
        name="",
        gpus=("hopper",),
        takes=packed(inputs="float"),
        wrong=always(
            "multiplies packed experts with fp8 inputs in groups of 128, and tiles of 256 x 256, only"
        ),
        source=f"{_MOE}_w4a8_fp8.py",
    ),
    Kernel(
        name="",
        gpus=_OTHERS,
        takes=packed(inputs="float"),
        wrong=always("has no scheme of packed experts with fp8 inputs"),
        source=f"{_MOE}_w4a8_fp8.py; vllm/model_executor/layers/fused_moe/experts/cutlass_moe.py",
    ),
    # int8
    Kernel(
        name="Triton int8",
        takes=_of(schema.INT8, ("channel", "token")),
        wrong=nothing,
        source=f"{_MOE}_w8a8_int8.py",
    ),
    Kernel(
        name="",
        takes=of_format(schema.INT8),
        wrong=always("multiplies int8 experts with a scale per channel and one per token only"),
        instead="w8a8, or w4a16",
        source=f"{_MOE}_w8a8_int8.py",
    ),
    # fp8
    Kernel(
        name="Marlin fp8",
        gpus=("ampere",),
        takes=of_format(schema.FLOAT8),
        wrong=float_inputs,
        source=f"{_ORACLE}fp8.py, select_fp8_moe_backend",
    ),
    Kernel(
        name="FlashInfer, CUTLASS or Triton fp8",
        gpus=("ada", "hopper", "blackwell"),
        takes=_of(schema.FLOAT8, ("channel", "token"), ("tensor", "tensor")),
        wrong=nothing,
        source=f"{_MOE}_w8a8_fp8.py",
    ),
    Kernel(
        name="",
        gpus=("ada", "hopper", "blackwell"),
        takes=lambda layout: layout.format == schema.FLOAT8 and not _blocks(layout),
        wrong=always(
            "wants fp8 experts with a scale per channel and per token, or one for weights and inputs each"
        ),
        instead="fp8, or fp8-static",
        source=f"{_MOE}_w8a8_fp8.py",
    ),
    # microscaling and NVFP4
    Kernel(
        name="FlashInfer or DeepGEMM MXFP8",
        gpus=("blackwell",),
        takes=of_format(schema.MXFP8),
        wrong=quantized_inputs,
        source=f"{_MOE}_w8a8_mxfp8.py",
    ),
    Kernel(
        name="Marlin or Humming MXFP8",
        gpus=_OLDER,
        takes=of_format(schema.MXFP8),
        wrong=float_inputs,
        source=f"{_ORACLE}mxfp8.py",
    ),
    Kernel(
        name="CUTLASS MXFP4",
        gpus=("blackwell",),
        takes=of_format(schema.MXFP4),
        wrong=quantized_inputs,
        source=f"{_MOE}_w4a4_mxfp4.py",
    ),
    Kernel(
        name="Marlin MXFP4",
        gpus=_OLDER,
        takes=of_format(schema.MXFP4),
        wrong=float_inputs,
        source=f"{_MOE}_w4a4_mxfp4.py",
    ),
    Kernel(
        name="FlashInfer or CUTLASS NVFP4",
        gpus=("blackwell",),
        takes=_inputs_of(schema.NVFP4),
        wrong=nothing,
        source=f"{_MOE}_w4a4_nvfp4.py",
    ),
    Kernel(
        name="Marlin or Humming NVFP4",
        takes=of_format(schema.NVFP4),
        wrong=float_inputs,
        source=f"{_ORACLE}nvfp4.py",
    ),
)


def check_expert_kernels(
    layout: Layout, part: tuple[int, int], gpu: str | None, release: Version
) -> tuple[str, Kernel | None]:
    """Does vLLM compute experts as they were trained: on this GPU, or on any?

    Without a GPU, no is: on none; or on some GPU with quantized inputs, which training left in float.

    Args:
        layout: of the layer.
        part: the features inside of an expert on a device, and those outside.
        gpu: a key of `GPUS`, or None.
        release: of vLLM.

    Returns:
        What it does otherwise, "" if nothing; and the kernel on the GPU, or the one that does it.
    """
    rows = [kernel_for(layout, part, one, release, EXPERT_KERNELS) for one in ([gpu] if gpu else GPUS)]
    wrong = [row for row in rows if row is not None and row.wrong(layout)]
    if wrong and (len(wrong) == len(rows) or layout.inputs is None):
        return wrong[0].wrong(layout), wrong[0]
    return "", rows[0]
