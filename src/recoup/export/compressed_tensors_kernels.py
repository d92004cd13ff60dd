"""Which kernel of vLLM computes a layer on a GPU, and whether as it was trained.

The kernels and their GPUs are what vLLM's own parser and its choice of kernels answered, release by release,
on pretended GPUs that have every kernel installed (`tests/export/vllm_parser.py`). A kernel that is chosen
may still leave inputs in float: what it does with them is from its source, which is named. No kernel ran.
What no row is for is not known.
"""

from collections.abc import Callable
from dataclasses import dataclass

from recoup.export import compressed_tensors_config as schema
from recoup.export.compressed_tensors_config import Layout

Version = tuple[int, ...]

ALWAYS: tuple[Version, Version] = ((0,), (10**6,))
OLDEST: Version = (0, 16)  # whose kernels are known
# Generation -> the schemes with quantized inputs that are computed there as they were trained.
GPUS: dict[str, tuple[str, ...]] = {
    "ampere": ("w8a8",),
    "ada": ("w8a8", "fp8"),
    "hopper": ("w8a8", "fp8", "w4afp8-g128"),
    "blackwell": ("fp8", "mxfp8", "mxfp4", "nvfp4"),  # of compute capability 10.0 and 10.3
}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What computes a layer; of all that could, the first one in `KERNELS` does.

    Args:
        name: of the kernel, or of vLLM's scheme where that has several; "" where there is none.
        gpus: keys of `GPUS`.
        takes: which layouts.
        wrong: what it does otherwise than training did, as a sentence without its subject; "" if nothing.
        versions: the first release that does so, and the first that no longer does.
        tile: what the rows and columns of a device's part are multiples of.
        instead: what to do about it; "" for the schemes that `GPUS` names.
        source: where that is to be seen.
    """

    name: str
    gpus: tuple[str, ...] = tuple(GPUS)
    takes: Callable[[Layout], bool]
    wrong: Callable[[Layout], str]
    versions: tuple[Version, Version] = ALWAYS
    tile: tuple[int, int] = (1, 1)
    instead: str = ""
    source: str


def kernel_for(
    layout: Layout,
    part: tuple[int, int],
    gpu: str,
    release: Version,
    rows: "tuple[Kernel, ...] | None" = None,
) -> Kernel | None:
    """The kernel that takes a device's part of a layer; None where that is not known.

    Args:
        layout: of the layer.
        part: its rows and columns on a device, those of matrices that vLLM joins together.
        gpu: a key of `GPUS`.
        release: of vLLM.
        rows: of which table; `KERNELS` by default.
    """
    for row in rows or KERNELS:
        first, end = row.versions
        whole = not any(size % step for size, step in zip(part, row.tile, strict=True))
        if gpu in row.gpus and first <= release < end and whole and row.takes(layout):
            return row
    return None


def packed(
    *bits: int, inputs: str | None = None, groups: tuple[int | None, ...] = ()
) -> Callable[[Layout], bool]:
    """Packed weights of these widths and groups, of any where none is named; None is a scale per channel."""

    def takes(layout: Layout) -> bool:
        found = None if layout.inputs is None else layout.inputs["type"]
        given = layout.format == schema.PACKED and found == inputs
        given = given and layout.weights["num_bits"] in (bits or range(2, 9))
        return given and (not groups or layout.weights.get("group_size") in groups)

    return takes


def _grouped(*bits: int) -> Callable[[Layout], bool]:
    return lambda layout: packed(*bits, inputs="int")(layout) and "group_size" in layout.weights


def of_format(format_: str) -> Callable[[Layout], bool]:
    """A storage format."""
    return lambda layout: layout.format == format_


def _blocks(layout: Layout) -> bool:
    return layout.format == schema.FLOAT8 and "block_structure" in layout.weights


def nothing(layout: Layout) -> str:
    """It computes what was trained."""
    del layout
    return ""


def float_inputs(layout: Layout) -> str:
    """It rounds no inputs."""
    return "leaves in float the inputs that training quantized" if layout.inputs else ""


def quantized_inputs(layout: Layout) -> str:
    """It rounds inputs in any case."""
    return "" if layout.inputs else "quantizes the inputs that training left in float"


def always(sentence: str) -> Callable[[Layout], str]:
    """It computes something else, or nothing."""
    return lambda _: sentence


_QUANTIZATION = "vllm/model_executor/layers/quantization/"
_LINEAR = "vllm/model_executor/kernels/linear/"
_SCHEMES = f"{_QUANTIZATION}compressed_tensors/schemes/compressed_tensors_"
_FALLBACK = f"{_QUANTIZATION}utils/humming/schema.py, check_and_fallback_input_schema"
_MARLIN = f"{_LINEAR}mixed_precision/marlin.py, can_implement"
_DEEP_GEMM = f"{_QUANTIZATION}utils/fp8_utils.py, deepgemm_post_process_fp8_weight_block"
_MARLIN_GROUPS = (None, 32, 64, 128)
_OLDER = ("ampere", "ada", "hopper")
_OTHERS = ("ampere", "ada", "blackwell")
_NARROW = (2, 3, 5, 6, 7)  # bits that Marlin does not take
KERNELS: tuple[Kernel, ...] = (
    # integer weights, float inputs
    Kernel(
        name="Machete",
        gpus=("hopper",),
        takes=packed(4, 8, groups=(None, 64, 128)),
        wrong=nothing,
        tile=(128, 64),
        source=f"{_LINEAR}mixed_precision/machete.py, can_implement",
    ),
    Kernel(
        name="AllSpark",
        gpus=("ampere", "ada"),
        takes=packed(8, groups=(None,)),
        wrong=nothing,
        versions=((0,), (0, 31)),
        tile=(16, 16),
        source=f"{_QUANTIZATION}utils/allspark_utils.py, check_allspark_supported_dtype_shape",
    ),
    Kernel(
        name="Humming",
        gpus=("hopper",),
        takes=packed(4, 8),
        wrong=nothing,
        versions=((0, 32), ALWAYS[1]),
        source=f"{_QUANTIZATION}utils/humming/priority.py, prioritize_humming",
    ),
    Kernel(
        name="Marlin",
        takes=packed(4, 8, groups=_MARLIN_GROUPS),
        wrong=nothing,
        versions=((0,), (0, 24)),
        tile=(64, 128),
        source=_MARLIN,
    ),
    Kernel(
        name="Marlin",
        takes=packed(4, 8, groups=_MARLIN_GROUPS),
        wrong=nothing,
        versions=((0, 24), ALWAYS[1]),
        source=f"{_QUANTIZATION}utils/marlin_utils.py, marlin_padded_nk",
    ),
    Kernel(
        name="Humming or TritonW4A16",
        takes=packed(4, 8),
        wrong=nothing,
        versions=((0, 23), ALWAYS[1]),
        source=f"{_LINEAR}__init__.py, _POSSIBLE_KERNELS",
    ),
    Kernel(
        name="",
        takes=packed(4, 8),
        wrong=always(
            "has no kernel in bfloat16 for parts that are no multiples of 64 rows and 128 columns, nor for "
            "groups other than 32, 64 and 128"
        ),
        versions=((0,), (0, 23)),
        instead="vllm>=0.23, fewer devices, or one of these groups",
        source=_MARLIN,
    ),
    Kernel(
        name="Humming",
        takes=packed(*_NARROW),
        wrong=nothing,
        versions=((0, 25), ALWAYS[1]),
        source=f"{_SCHEMES}wNa16.py",
    ),
    # integer weights, int8 inputs
    Kernel(
        name="Marlin",
        gpus=_OTHERS,
        takes=packed(4, 8, inputs="int", groups=_MARLIN_GROUPS),
        wrong=float_inputs,
        versions=((0, 26), ALWAYS[1]),
        source=f"{_SCHEMES}wNa8.py: only Humming reads _humming_input_quant_config",
    ),
    Kernel(
        name="Humming",
        takes=packed(*_NARROW, inputs="int"),
        wrong=nothing,
        versions=((0, 26), (0, 31)),
        source=f"{_QUANTIZATION}utils/humming_utils.py",
    ),
    Kernel(
        name="Humming",
        takes=_grouped(*_NARROW),
        wrong=float_inputs,
        versions=((0, 31), ALWAYS[1]),
        source=_FALLBACK,
    ),
    Kernel(
        name="Humming",
        gpus=("hopper",),
        takes=_grouped(4, 8),
        wrong=float_inputs,
        versions=((0, 32), ALWAYS[1]),
        source=_FALLBACK,
    ),
    Kernel(
        name="Humming",
        gpus=_OLDER,
        takes=packed(*_NARROW, inputs="int", groups=(None,)),
        wrong=nothing,
        versions=((0, 31), ALWAYS[1]),
        source=_FALLBACK,
    ),
    Kernel(
        name="Humming",
        gpus=("hopper",),
        takes=packed(4, 8, inputs="int", groups=(None,)),
        wrong=nothing,
        versions=((0, 32), ALWAYS[1]),
        source=_FALLBACK,
    ),
    Kernel(
        name="Humming",
        gpus=("blackwell",),
        takes=packed(*_NARROW, inputs="int", groups=(None,)),
        wrong=float_inputs,
        versions=((0, 31), ALWAYS[1]),
        source=_FALLBACK,
    ),
    # integer weights, fp8 inputs
    Kernel(
        name="CUTLASS W4A8",
        gpus=("hopper",),
        takes=packed(4, inputs="float", groups=(128,)),
        wrong=nothing,
        tile=(128, 128),
        source=f"{_LINEAR}mixed_precision/cutlass.py, can_implement",
    ),
    Kernel(
        name="",
        gpus=("hopper",),
        takes=packed(4, inputs="float", groups=(128,)),
        wrong=always("multiplies weights with fp8 inputs in parts of whole tiles of 128 x 128 only"),
        instead="fewer devices, or w4a16, w8a8 or fp8",
        source=f"{_LINEAR}mixed_precision/cutlass.py, can_implement",
    ),
    Kernel(
        name="",
        gpus=_OTHERS,
        takes=packed(inputs="float"),
        wrong=always("has no scheme of packed weights with fp8 inputs"),
        source=f"{_SCHEMES}w4a8_fp8.py",
    ),
    # int8
    Kernel(
        name="CUTLASS int8",
        gpus=_OLDER,
        takes=of_format(schema.INT8),
        wrong=nothing,
        source=f"{_LINEAR}scaled_mm/cutlass.py, CutlassInt8ScaledMMLinearKernel",
    ),
    Kernel(
        name="",
        gpus=("blackwell",),
        takes=of_format(schema.INT8),
        wrong=always("ends at its first product of int8, which CUTLASS has not"),
        source="csrc/quantization/w8a8/cutlass/c3x/scaled_mm_helper.hpp, dispatch_scaled_mm",
    ),
    # fp8
    Kernel(
        name="W8A16Fp8",
        gpus=("ampere",),
        takes=of_format(schema.FLOAT8),
        wrong=float_inputs,
        source=f"{_SCHEMES}w8a16_fp8.py",
    ),
    Kernel(
        name="Triton fp8",
        gpus=("ada",),
        takes=_blocks,
        wrong=nothing,
        versions=((0, 20), (0, 26)),
        source=f"{_LINEAR}scaled_mm/triton.py",
    ),
    Kernel(
        name="Marlin fp8",
        gpus=("ada",),
        takes=_blocks,
        wrong=float_inputs,
        versions=((0, 29), ALWAYS[1]),
        source=f"{_LINEAR}__init__.py, _POSSIBLE_FP8_BLOCK_KERNELS",
    ),
    Kernel(
        name="DeepGEMM",
        gpus=("hopper", "blackwell"),
        takes=_blocks,
        wrong=always(
            "requantizes blocks to scales that are powers of two where DeepGEMM is installed, unless "
            "VLLM_USE_DEEP_GEMM=0 is set"
        ),
        source=_DEEP_GEMM,
    ),
    Kernel(
        name="CUTLASS or FlashInfer fp8",
        gpus=("ada", "hopper", "blackwell"),
        takes=lambda layout: layout.format == schema.FLOAT8 and not _blocks(layout),
        wrong=nothing,
        source=f"{_LINEAR}scaled_mm/cutlass.py, CutlassFP8ScaledMMLinearKernel",
    ),
    # microscaling and NVFP4
    Kernel(
        name="FlashInfer MXFP8",
        gpus=("blackwell",),
        takes=of_format(schema.MXFP8),
        wrong=quantized_inputs,
        versions=((0, 20), ALWAYS[1]),
        source=f"{_SCHEMES}w8a8_mxfp8.py: inputs are not asked for",
    ),
    Kernel(
        name="Humming or Marlin MXFP8",
        gpus=_OLDER,
        takes=of_format(schema.MXFP8),
        wrong=float_inputs,
        versions=((0, 20), ALWAYS[1]),
        source=f"{_LINEAR}mxfp8/marlin.py; {_FALLBACK}",
    ),
    Kernel(
        name="FlashInfer MXFP4",
        gpus=("blackwell",),
        takes=of_format(schema.MXFP4),
        wrong=quantized_inputs,
        versions=((0, 22), ALWAYS[1]),
        source=f"{_SCHEMES}w4a4_mxfp4.py: inputs are not asked for",
    ),
    Kernel(
        name="Humming MXFP4",
        gpus=("hopper",),
        takes=of_format(schema.MXFP4),
        wrong=always("rounds the inputs to fp8 with one scale per token"),
        versions=((0, 32), ALWAYS[1]),
        source=_FALLBACK,
    ),
    Kernel(
        name="Marlin MXFP4",
        gpus=_OLDER,
        takes=of_format(schema.MXFP4),
        wrong=float_inputs,
        source=f"{_LINEAR}mxfp4/marlin.py",
    ),
    Kernel(
        name="W4A16Mxfp4",
        gpus=("blackwell",),
        takes=of_format(schema.MXFP4),
        wrong=float_inputs,
        versions=((0,), (0, 21)),
        source=f"{_SCHEMES}w4a16_mxfp4.py",
    ),
    Kernel(
        name="FlashInfer NVFP4",
        gpus=("blackwell",),
        takes=lambda layout: layout.format == schema.NVFP4 and layout.inputs is not None,
        wrong=nothing,
        source=f"{_SCHEMES}w4a4_nvfp4.py",
    ),
    Kernel(
        name="NVFP4 with float inputs",
        takes=of_format(schema.NVFP4),
        wrong=float_inputs,
        source=f"{_SCHEMES}w4a4_nvfp4.py; {_FALLBACK}",
    ),
)
