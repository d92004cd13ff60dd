"""What a compressed-tensors folder can say: `quantization_config` of its config.json, and what is refused.

A layer is described by arguments for its weights and for its inputs, and by the name of a storage format.
Readers derive dynamic scales by themselves, so a lattice can be written only where their rule is ours.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from recoup.export.compressed_tensors_experts import routers_of, targets_of
from recoup.nn import CodedExperts, CodedLinear, cache_quantizers
from recoup.numerics import (
    BFLOAT16,
    E2M1,
    E4M3,
    E8M0,
    FLOAT16,
    FLOAT32,
    Format,
    IntFormat,
    QuantSpec,
    per_channel,
    per_tensor,
)
from recoup.schemes import Scheme

PACKED, INT8, FLOAT8 = "pack-quantized", "int-quantized", "float-quantized"
MXFP8, MXFP4, NVFP4 = "mxfp8-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"
MIXED = "mixed-precision"
STACKED = (PACKED, MXFP4)  # of whose experts transformers makes stacks, with float inputs

# (weights, inputs) -> storage format; the names are those of `_name`. By itself the library would store
# 4-bit weights with int8 inputs one to a byte; the packed form is half as large, and vLLM reads it.
_FORMATS: dict[tuple[str, str | None], str] = {
    **{(w, i): PACKED for w in ("int row", "int group", "int8 group") for i in (None, "int8 row", "fp8 row")},
    ("int8 row", None): PACKED,
    **{(w, i): INT8 for w in ("int8 row", "int8 tensor") for i in ("int8 row", "int8 tensor")},
    **{(w, i): FLOAT8 for w in ("fp8 row", "fp8 tensor") for i in ("fp8 row", "fp8 tensor")},
    ("fp8 128x128", "fp8 g128"): FLOAT8,
    **{("mxfp8 g32", i): MXFP8 for i in (None, "mxfp8 g32")},
    **{("mxfp4 g32", i): MXFP4 for i in (None, "mxfp4 g32")},
    **{("nvfp4 g16", i): NVFP4 for i in (None, "nvfp4 g16")},
}
_ELEMENTS: dict[tuple[Format, Format, bool], str] = {
    (E4M3, FLOAT32, False): "fp8",
    (E4M3, E8M0, False): "mxfp8",
    (E2M1, E8M0, False): "mxfp4",
    (E2M1, E4M3, True): "nvfp4",
}
_STORED = (FLOAT32, FLOAT16, BFLOAT16)
_REMEDIES = {
    "affine": "zero points do not load in transformers; use a symmetric scale rule, as half-range",
    "signed-max": "negative scales have no kernel in vLLM; use half-range or narrow",
}
_WRITABLE = "w2a16 to w8a16, w2a8 to w4a8, w8a8, w8a8-static, fp8, mxfp4, nvfp4 and their relatives can"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a scheme is written.

    Args:
        format: of the stored weight.
        weights: arguments of the weights, as the library's `QuantizationArgs` takes them.
        inputs: likewise of the inputs; None for float inputs.
    """

    format: str
    weights: dict[str, Any]
    inputs: dict[str, Any] | None


def check(path: str, scheme: Scheme, kind: type) -> None:
    """Can a folder hold a module of this type with this scheme?

    Raises:
        ValueError: it cannot; names the module, the reason and what to do.
    """
    if kind not in (CodedLinear, CodedExperts):
        name = kind.__name__.removeprefix("Coded")
        raise ValueError(
            f"{path}: compressed-tensors folders hold quantized Linears, not {name}s; keep it with "
            f"{{match: {path}, scheme: none}}, or export to onnx"
        )
    try:
        layout(scheme)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_cache(spec: QuantSpec) -> None:
    """Can a folder say that keys and values are kept so, and do its readers keep them so?

    vLLM and SGLang read E4M3 with one static scale, and no other (vLLM:
    `CompressedTensorsKVCacheMethod.validate_kv_cache_scheme`). transformers holds the scale in the model's
    dtype, vLLM in float32.

    Raises:
        ValueError: no; says what to do.
    """
    e4m3 = spec.format == E4M3 and spec.granularity == per_tensor and spec.symmetric
    if not (e4m3 and spec.scale_format == BFLOAT16) or spec.scale_rule == "signed-max":
        raise ValueError(
            f"kv: {spec} ({spec.scale_rule}, scales in {spec.scale_format}) cannot be written for "
            "compressed-tensors, whose readers keep e4m3 with one scale; take kv: fp8"
        )


def kernel(scheme: Scheme, kind: type) -> str:
    """How it is stored: the name of the format, from which readers choose their kernels."""
    del kind
    return layout(scheme).format


def layout(scheme: Scheme) -> Layout:
    """How compressed-tensors writes this scheme.

    Raises:
        ValueError: it has no words for it.

    >>> from recoup.schemes import preset
    >>> layout(preset("w4a8")).format
    'pack-quantized'
    """
    weights, inputs = scheme.weights, scheme.inputs
    names = _weights_name(weights), None if inputs is None else _inputs_name(inputs)
    if names not in _FORMATS:
        what = f"{weights} ({weights.scale_rule}) weights with "
        what += "float inputs" if inputs is None else f"{inputs} ({inputs.scale_rule}) inputs"
        raise ValueError(
            f"scheme {scheme.name!r} cannot be written for compressed-tensors: {what} have no place "
            f"there; {_REMEDIES.get(weights.scale_rule, _WRITABLE)}"
        )
    return Layout(
        format=_FORMATS[names],
        weights=_arguments(weights, row="channel"),
        inputs=None if inputs is None else _arguments(inputs, row="token"),
    )


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """`quantization_config` for a converted model: a group for each layout, and what stays in float.

    A single layout goes to every "Linear" that is not ignored, the form that every reader knows; several
    layouts name their modules.
    """
    from compressed_tensors.quantization import QuantizationConfig

    layouts: dict[str, Layout] = {}
    paths: dict[str, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        if isinstance(module, CodedLinear):
            found = layout(module.scheme)
            layouts[str(found)] = found
            paths[str(found)].append(path)
    experts = targets_of(model)
    named = {key: list(dict.fromkeys(experts.get(path, path) for path in paths[key])) for key in layouts}
    floats = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    formats = sorted({found.format for found in layouts.values()})
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(layouts) == 1 else named[key],
            "weights": found.weights,
            "input_activations": found.inputs,
            "format": found.format,
        }
        for index, (key, found) in enumerate(layouts.items())
    }
    config = QuantizationConfig.model_validate(
        {
            "config_groups": groups,
            "format": formats[0] if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "ignore": floats + (routers_of(model) if experts else []),
            "kv_cache_scheme": _cache(model),
        }
    )
    return config.model_dump(mode="json", exclude={"moe_sparsity_config"})  # older readers forbid the key


def _cache(model: nn.Module) -> dict[str, Any] | None:
    """The arguments of keys and values; None where they stay in float."""
    specs = [key.spec for key, _ in cache_quantizers(model).values()]
    return _arguments(specs[0], row="") if specs else None


def _weights_name(spec: QuantSpec) -> str:
    return _name(spec) if spec.symmetric and spec.scale_rule != "signed-max" else ""


def _inputs_name(spec: QuantSpec) -> str:
    name = _name(spec)
    if spec.granularity == per_tensor:
        readable = spec.ranges != "dynamic" and spec.symmetric and spec.scale_rule != "signed-max"
    elif name in ("int8 row", "fp8 row", "fp8 g128"):
        readable = spec.ranges == "dynamic" and spec.scale_rule == "narrow"  # amax / 127, amax / 448
    else:
        readable = spec.ranges == "dynamic"
    if spec.format == IntFormat(8, narrow=True):  # kernels saturate at -128
        readable = False
    if spec.needs_values or spec.has_offset:  # kernels go by the largest magnitude
        readable = False
    return name if readable and spec.scale_format not in (FLOAT16, BFLOAT16) else ""


def _name(spec: QuantSpec) -> str:
    """As in "int group", "fp8 128x128", "nvfp4 g16": a lattice by the words of `_FORMATS`; "" if none."""
    stored = FLOAT32 if spec.scale_format in _STORED else spec.scale_format
    if not isinstance(spec.format, IntFormat):
        element = _ELEMENTS.get((spec.format, stored, spec.global_scale))
        return f"{element} {spec.granularity}" if element else ""
    if not spec.format.signed or stored != FLOAT32 or spec.global_scale:
        return ""
    grouped = spec.granularity.rows == 1 and spec.granularity.columns is not None
    return f"int{'8' if spec.format.bits == 8 else ''} {'group' if grouped else spec.granularity}"


def _arguments(spec: QuantSpec, *, row: str) -> dict[str, Any]:
    granularity = spec.granularity
    arguments: dict[str, Any] = {
        "num_bits": spec.format.bits,
        "type": "int" if isinstance(spec.format, IntFormat) else "float",
        "symmetric": True,
        "dynamic": spec.ranges == "dynamic",
    }
    if granularity in (per_tensor, per_channel):
        return arguments | {"strategy": "tensor" if granularity == per_tensor else row}
    if granularity.rows != 1:
        block = [granularity.rows, granularity.columns]
        return arguments | {"strategy": "block", "block_structure": block}
    arguments |= {"strategy": "group", "group_size": granularity.columns}
    if spec.scale_format == E8M0:
        arguments["scale_dtype"] = "torch.uint8"
    if spec.global_scale:  # the scales of the blocks are dynamic, that of the tensor is not
        arguments |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
        arguments["dynamic"] = "local" if spec.ranges == "dynamic" else False
    return arguments
