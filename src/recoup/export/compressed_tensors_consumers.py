"""Which readers of compressed-tensors folders compute what was trained, by their versions.

A folder that transformers reads may be refused by the engine that is to serve it, or be read as another
function: with inputs in float that training quantized, or the reverse. `BREAKAGES` is what is known of that.
Its rows about vLLM are what vLLM's own parser and its choice of kernels answered, release by release, on
pretended GPUs (`tests/export/vllm_parser.py`); those about SGLang are from its sources.

A row stands here if the reader refuses the scheme on every GPU, quantizes on some GPU what training left in
float, or leaves in float on every GPU what training quantized. What one GPU does otherwise (float inputs for
fp8 on Ampere) is in `compressed_tensors_kernels`, and is asked for only where that GPU is named.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from recoup.export import compressed_tensors_config as schema
from recoup.export.compressed_tensors_config import Layout
from recoup.export.compressed_tensors_expert_kernels import (
    EXPERT_KERNELS,
    OLDEST_EXPERTS,
    check_expert_kernels,
)
from recoup.export.compressed_tensors_kernels import (
    ALWAYS,
    GPUS,
    KERNELS,
    OLDEST,
    Kernel,
    Version,
    kernel_for,
)
from recoup.export.tensor_parallel import check_joined_blocks, expert_shape, parts
from recoup.nn import CodedExperts
from recoup.schemes import Scheme

# Reader -> the oldest and the newest release whose answers the table holds.
CONSUMERS: dict[str, tuple[Version, Version]] = {
    "vllm": ((0, 15), (0, 33)),
    "sglang": ((0, 5, 23), (0, 5, 23)),
    "transformers": ((5, 23), (5, 23)),
    "compressed-tensors": ((0, 17), (0, 20)),  # what transformers reads with
}
_CONSUMER = re.compile(r"(?P<name>[a-z-]+?)(?P<relation>>=|==)?(?P<version>\d+(\.\d+)*)?")


@dataclass(frozen=True, kw_only=True)
class Breakage:
    """What a reader does not do as it was trained.

    Args:
        consumer: a key of `CONSUMERS`.
        versions: the first release that does so, and the first that no longer does.
        breaks: whether it concerns a layout.
        what: it does, as a sentence without its subject.
        instead: what to do.
        source: where that is to be seen.
    """

    consumer: str
    versions: tuple[Version, Version] = ALWAYS
    breaks: Callable[[Layout], bool]
    what: str
    instead: str
    source: str


def _bits(*widths: int) -> Callable[[Layout], bool]:
    return lambda layout: layout.format == schema.PACKED and layout.weights["num_bits"] in widths


def _packed(inputs: str, *, but_groups_of: int | None = None) -> Callable[[Layout], bool]:
    """Packed weights whose inputs are quantized to "int" or "float" codes."""

    def breaks(layout: Layout) -> bool:
        found = layout.inputs
        given = layout.format == schema.PACKED and found is not None and found["type"] == inputs
        return given and (but_groups_of is None or layout.weights.get("group_size") != but_groups_of)

    return breaks


def _form(format_: str, *, inputs: bool | None = None) -> Callable[[Layout], bool]:
    """A storage format, with quantized inputs, with float ones, or with any."""
    return lambda layout: layout.format == format_ and inputs in (None, layout.inputs is not None)


def _int8(*widths: int, grouped: bool) -> Callable[[Layout], bool]:
    """Packed weights of these bits with int8 inputs, in groups or per channel."""
    return lambda layout: (
        _packed("int")(layout) and _bits(*widths)(layout) and ("group_size" in layout.weights) == grouped
    )


_VLLM = "vllm/model_executor/layers/quantization/compressed_tensors/"
_HUMMING = "vllm/model_executor/layers/quantization/utils/humming/schema.py, check_and_fallback_input_schema"
_SGLANG = "sglang/srt/layers/quantization/compressed_tensors/"
BREAKAGES: tuple[Breakage, ...] = (
    Breakage(
        consumer="vllm",
        versions=((0,), (0, 25)),
        breaks=_bits(2, 3, 5, 6, 7),
        what="reads packed weights of 4 and 8 bits only",
        instead="vllm>=0.25, or 4 or 8 bits",
        source=f"{_VLLM}schemes/compressed_tensors_wNa16.py, WNA16_SUPPORTED_TYPES_MAP",
    ),
    Breakage(
        consumer="vllm",
        versions=((0,), (0, 26)),
        breaks=_packed("int"),
        what="has no scheme of packed weights with int8 inputs",
        instead="w8a8, or the same weights with float inputs",
        source=f"{_VLLM}compressed_tensors.py, _is_wNaM_int",
    ),
    Breakage(
        consumer="vllm",
        versions=((0, 26), (0, 32)),
        breaks=lambda layout: _packed("int")(layout) and _bits(4, 8)(layout),
        what="takes Marlin for packed weights of 4 and 8 bits, which leaves their inputs in float",
        instead="w8a8, or the same weights with float inputs",
        source=f"{_VLLM}schemes/compressed_tensors_wNa8.py: only Humming reads _humming_input_quant_config",
    ),
    *(
        Breakage(
            consumer="vllm",
            versions=(first, ALWAYS[1]),
            breaks=_int8(*widths, grouped=True),
            what="leaves the inputs of packed weights in groups in float",
            instead="w8a8, or the same weights with float inputs",
            source=_HUMMING,
        )
        for first, widths in (((0, 31), (2, 3, 5, 6, 7)), ((0, 32), (4, 8)))
    ),
    Breakage(
        consumer="vllm",
        breaks=_packed("float", but_groups_of=128),
        what="multiplies packed weights with fp8 inputs in groups of 128 only, and on Hopper",
        instead="w4afp8-g128 on Hopper, or w4a16",
        source=f"{_VLLM}schemes/compressed_tensors_w4a8_fp8.py",
    ),
    Breakage(
        consumer="vllm",
        versions=((0,), (0, 20)),
        breaks=_form(schema.MXFP8),
        what="does not know mxfp8",
        instead="vllm>=0.20, or fp8",
        source=f"{_VLLM}compressed_tensors.py, _is_mxfp8",
    ),
    Breakage(
        consumer="vllm",
        versions=((0, 20), ALWAYS[1]),
        breaks=_form(schema.MXFP8, inputs=False),
        what="quantizes the inputs of every mxfp8 layer on Blackwell, and these were trained in float",
        instead="mxfp8, which trains them quantized",
        source=f"{_VLLM}compressed_tensors.py, CompressedTensorsW8A8Mxfp8: inputs are not asked for",
    ),
    Breakage(
        consumer="vllm",
        versions=((0,), (0, 22)),
        breaks=_form(schema.MXFP4, inputs=True),
        what="leaves the inputs of every mxfp4 layer in float",
        instead="vllm>=0.22 on Blackwell, or mxfp4a16",
        source=f"{_VLLM}compressed_tensors.py, CompressedTensorsW4A16Mxfp4",
    ),
    Breakage(
        consumer="vllm",
        versions=((0, 21), ALWAYS[1]),
        breaks=_form(schema.MXFP4, inputs=False),
        what="quantizes the inputs of every mxfp4 layer on Blackwell, and these were trained in float",
        instead="mxfp4, which trains them quantized, or nvfp4a16",
        source=f"{_VLLM}compressed_tensors.py, CompressedTensorsW4A4Mxfp4: inputs are not asked for",
    ),
    Breakage(
        consumer="sglang",
        breaks=_bits(2, 3, 5, 6, 7),
        what="reads packed weights of 4 and 8 bits only",
        instead="4 or 8 bits, or vllm>=0.25",
        source=f"{_SGLANG}schemes/compressed_tensors_wNa16.py, WNA16_SUPPORTED_TYPES_MAP",
    ),
    *(
        Breakage(
            consumer="sglang",
            breaks=_packed(inputs),
            what="has no scheme of packed weights with quantized inputs",
            instead="w8a8 or fp8, or the same weights with float inputs",
            source=f"{_SGLANG}compressed_tensors.py, _get_scheme_from_parts",
        )
        for inputs in ("int", "float")
    ),
    *(
        Breakage(
            consumer="sglang",
            breaks=_form(format_),
            what=f"has no scheme for {format_}",
            instead="fp8 or nvfp4, or vllm>=0.22",
            source=f"{_SGLANG}compressed_tensors.py, _get_scheme_from_parts, and utils.py",
        )
        for format_ in (schema.MXFP8, schema.MXFP4)
    ),
    Breakage(
        consumer="compressed-tensors",
        versions=((0,), (0, 18)),
        breaks=_bits(3, 5, 6, 7),
        what="expects whole codes in each packed word, and these are one stream of bits",
        instead="compressed-tensors>=0.18, or 2, 4 or 8 bits",
        source="compressed_tensors/compressors/pack_quantized/helpers.py, unpack_from_int32",
    ),
)


def check_consumer(
    model: nn.Module,
    modules: Mapping[str, tuple[Scheme, type]],
    consumer: str,
    gpu: str | None = None,
    devices: int = 1,
) -> dict[str, str]:
    """Does the reader that is asked for compute what is trained?

    Args:
        model: float, of transformers.
        modules: what is quantized, by name; each has a layout.
        consumer: a key of `CONSUMERS`, alone for the newest release that is known, or with a release
            ("vllm==0.27"), or with the first of those that must read it ("vllm>=0.27").
        gpu: a key of `GPUS`; None asks for what a reader does on every GPU.
        devices: over which every matrix is split.

    Returns:
        The kernel of every module on the GPU, in the newest release that is asked for, by name; nothing
        without a GPU.

    Raises:
        ValueError: no such reader or GPU, no release that is known, or one of the asked releases does not;
            names the module, the release and what to do.
    """
    name, oldest, newest = _asked(consumer)
    experts = {path: scheme for path, (scheme, kind) in modules.items() if kind is CodedExperts}
    if experts and (name == "sglang" or (name == "vllm" and oldest < OLDEST_EXPERTS)):
        raise ValueError(
            f"{next(iter(experts))}: {consumer} asked, and its kernels of experts are not known; name "
            f"vllm>={_written(OLDEST_EXPERTS)}, or leave consumer out"
        )
    if gpu is not None:
        _check_gpu(gpu, name, oldest)
    for path, (scheme, _) in modules.items():
        layout = schema.layout(scheme)
        for row in BREAKAGES if name != "vllm" or path not in experts else ():
            first = max(oldest, row.versions[0])
            if row.consumer == name and first <= newest and first < row.versions[1] and row.breaks(layout):
                raise _refusal(
                    f"{path}: {name} {_written(first)} {row.what}", scheme, row.source, row.instead
                )
    if name == "transformers":
        check_stacks(experts)
    if name != "vllm":
        return {}
    linears = {path: each for path, each in modules.items() if path not in experts}
    if devices == 1:  # on several, the split has asked
        check_joined_blocks(model, linears)
    return {
        **_computed(model, linears, gpu, (oldest, newest), devices),
        **_computed_experts(model, experts, gpu, (oldest, newest), devices),
    }


def check_stacks(experts: Mapping[str, Scheme]) -> None:
    """Does transformers by itself make stacks of experts that compute what was trained?

    Raises:
        ValueError: no; names the layer.
    """
    for path, scheme in experts.items():
        layout = schema.layout(scheme)
        if layout.inputs is not None or layout.format not in schema.STACKED:
            what = "leaves their inputs in float" if layout.inputs else "does not decode them"
            raise ValueError(
                f"{path}: transformers makes stacks of experts, and {what} (scheme {scheme.name!r}, "
                "transformers/integrations/compressed_tensors.py, CompressedTensorsDequantize); take w4a16"
            )


def _computed_experts(
    model: nn.Module,
    experts: Mapping[str, Scheme],
    gpu: str | None,
    releases: tuple[Version, Version],
    devices: int,
) -> dict[str, str]:
    """The kernels of vLLM for layers of experts; without a GPU, only whether there are any."""
    computed: dict[str, str] = {}
    for path, scheme in experts.items():
        layout, (width, inner) = schema.layout(scheme), expert_shape(model, path)
        for release in _borders(EXPERT_KERNELS, releases):
            wrong, row = check_expert_kernels(layout, (inner // devices, width), gpu, release)
            if wrong and row is not None:
                where = f"(experts of {inner // devices} x {width} on {gpu or 'GPUs'})"
                what = f"{path}: vllm {_written(release)} {wrong} {where}"
                raise _refusal(what, scheme, row.source, row.instead or _instead(gpu))
            if gpu is not None:
                computed[path] = f"{row.name if row else 'unknown'} on {gpu} (vllm {_written(release)})"
    return computed


def _borders(rows: tuple[Kernel, ...], releases: tuple[Version, Version]) -> list[Version]:
    """The releases between which no kernel changes."""
    oldest, newest = releases
    borders = {border for row in rows for border in row.versions if oldest < border < newest}
    return sorted({oldest, *borders, newest})


def _computed(
    model: nn.Module,
    modules: Mapping[str, tuple[Scheme, type]],
    gpu: str | None,
    releases: tuple[Version, Version],
    devices: int,
) -> dict[str, str]:
    """The kernels of vLLM; without a GPU, only whether there is one that has any."""
    computed: dict[str, str] = {}
    for path, part in parts(model, modules, devices).items():
        scheme = modules[path][0]
        layout = schema.layout(scheme)
        for release in _borders(KERNELS, releases):
            rows = [kernel_for(layout, part, one, release) for one in ([gpu] if gpu else GPUS)]
            wrong = [row for row in rows if row and (row.wrong(layout) if gpu else not row.name)]
            if len(wrong) == len(rows):
                row = next((row for row in wrong if row.instead), wrong[0])
                what = f"{path}: vllm {_written(release)} {row.wrong(layout)}"
                where = f"({part[0]} x {part[1]} on {gpu or 'every GPU'})"
                raise _refusal(f"{what} {where}", scheme, row.source, row.instead or _instead(gpu))
            if gpu is not None:
                computed[path] = (
                    f"{rows[0].name if rows[0] else 'unknown'} on {gpu} (vllm {_written(release)})"
                )
    return computed


def _check_gpu(gpu: str, name: str, oldest: Version) -> None:
    if gpu not in GPUS:
        nearest = get_close_matches(gpu, GPUS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(GPUS)}"
        raise ValueError(f"export.gpu: no GPU {gpu!r}; {hint}")
    if name != "vllm":
        raise ValueError(
            f"export.gpu: {gpu} asked, of {name} no kernels are known; leave it out, or take consumer: vllm"
        )
    if oldest < OLDEST:
        raise ValueError(
            f"export.gpu: {gpu} asked, the kernels of vllm are known from {_written(OLDEST)}, not of "
            f"{_written(oldest)}; name a newer one as consumer"
        )


def _refusal(what: str, scheme: Scheme, source: str, instead: str) -> ValueError:
    return ValueError(f"{what} (scheme {scheme.name!r}, {source}); take {instead}")


def _instead(gpu: str | None) -> str:
    return " or ".join(("w4a16", *(GPUS[gpu] if gpu else ())))


def _asked(consumer: str) -> tuple[str, Version, Version]:
    """The reader, and the oldest and newest release that are asked for."""
    found = _CONSUMER.fullmatch(consumer)
    if found is None or (found["relation"] is None) != (found["version"] is None):
        raise ValueError(f"export.consumer: {consumer!r} is no reader; write vllm, vllm==0.33 or vllm>=0.27")
    name = found["name"]
    if name not in CONSUMERS:
        nearest = get_close_matches(name, CONSUMERS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(CONSUMERS)}"
        raise ValueError(f"export.consumer: no reader {name!r}; {hint}")
    oldest, newest = CONSUMERS[name]
    if found["version"] is None:
        return name, newest, newest
    asked = tuple(map(int, found["version"].split(".")))
    if not oldest <= asked or asked[: len(newest)] > newest:
        raise ValueError(
            f"export.consumer: {consumer} asked, known of {name} are {_written(oldest)} to "
            f"{_written(newest)}; name one of these"
        )
    return name, asked, newest if found["relation"] == ">=" else asked


def _written(version: Version) -> str:
    return ".".join(map(str, version))
