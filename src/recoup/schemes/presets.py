"""The schemes by name. A name says what an engine computes, so it is never two things.

w4a16           weights of 4 bits in groups of 32, float inputs; `-g128` after a name changes the group
w4a8            the same with int8 inputs, one dynamic scale per token (vLLM)
w4a8-ort        the same with int8 inputs in blocks as long as the weight's groups: what onnxruntime's
                MatMulNBits computes at accuracy level 4, its fastest
w8a8            int8 weights, one scale per channel; int8 inputs per token. `-static`: per tensor, calibrated
w8a8-ort        int8 weights per channel, uint8 inputs per tensor: onnxruntime's MatMulInteger
w7a8-ort        the same with weights of 7 bits: two products fit in 16 bits, so that every x86 computes them
                exactly by its fastest kernel. `-static`: also an int32 bias, as for QLinearConv
fp8 ...         E4M3; per channel and token, per tensor (`-static`), or DeepSeek's 128 x 128 blocks
mx...           OCP Microscaling v1.0: blocks of 32, E8M0 scales
nvfp4           blocks of 16, E4M3 scales, one float32 scale per tensor. `-2d`: weights in blocks of 16 x 16;
                `-4over6`: the largest weight of a block becomes 6 or 4, whichever errs less
...a16          float inputs
q8_0, q4_0, q4_1, mxfp4-gguf, tq2_0
                llama.cpp's types of these names, with the inputs as its CPU kernels quantize them
q8_0a16         the weights of q8_0 alone: for embeddings, whose inputs are ids
nf4             QLoRA's levels, without its double quantization of scales
w1a16-seq, ...  ParetoQ's 1, 1.58 and 2 bits per channel, for learned scales

`KV_PRESETS` are those of keys and values in a KV cache: fp8 is E4M3, with a calibrated scale for the keys of
a layer, and one for its values.
"""

from dataclasses import replace
from difflib import get_close_matches

from recoup.numerics import (
    BFLOAT16,
    BINARY,
    E2M1,
    E2M3,
    E4M3,
    E8M0,
    FLOAT16,
    FLOAT32,
    MXINT8,
    NF4,
    STRETCHED,
    TERNARY,
    ElementFormat,
    FixedFormat,
    FloatFormat,
    Granularity,
    IntFormat,
    QuantSpec,
    ScaleRule,
    per_block,
    per_channel,
    per_group,
    per_tensor,
    per_token,
)
from recoup.schemes.scheme import Scheme


def _int_weights(bits: int, granularity: Granularity, rule: ScaleRule = "half-range") -> QuantSpec:
    grid = IntFormat(bits, narrow=rule == "narrow")
    return QuantSpec(format=grid, granularity=granularity, scale_rule=rule, ranges="static")


def _mx(grid: FloatFormat | FixedFormat, ranges: str) -> QuantSpec:
    # Round the block scale so that its largest element never saturates: what NVIDIA's conversion does, and
    # better on language models than the specification's floor (AutoRound's Llama-3.1 table: 0.603 to 0.575).
    spec = QuantSpec(
        format=grid, granularity=per_group(32), scale_rule="rceil", scale_format=E8M0, ranges="dynamic"
    )
    return spec if ranges == "dynamic" else replace(spec, ranges="static")


_INT8_PER_TOKEN = QuantSpec(format=IntFormat(8), granularity=per_token, scale_rule="narrow", ranges="dynamic")
_INT8_PER_TENSOR = QuantSpec(
    format=IntFormat(8), granularity=per_tensor, scale_rule="narrow", ranges="static"
)
_UINT8_PER_TENSOR = QuantSpec(
    format=IntFormat(8, signed=False), granularity=per_tensor, scale_rule="affine", ranges="dynamic"
)
_FP8_PER_ROW = QuantSpec(format=E4M3, granularity=per_channel, scale_rule="narrow", ranges="dynamic")
_NVFP4 = QuantSpec(
    format=E2M1,
    granularity=per_group(16),
    scale_rule="narrow",
    scale_format=E4M3,
    global_scale=True,
    ranges="dynamic",
)


# What ggml's CPU kernels multiply by (ggml, src/ggml-cpu/ggml-cpu.c: vec_dot_type), and how it is made
# (src/ggml-quants.c: quantize_row_q8_0_ref, _q8_1_ref, _q8_K_ref). Q8_1 is Q8_0 and the sum of a block.
_Q8_0 = QuantSpec(
    format=IntFormat(8, narrow=True),
    granularity=per_group(32),
    scale_rule="narrow",
    scale_format=FLOAT16,
    ranges="dynamic",
)
_Q8_K = replace(_Q8_0, granularity=per_group(256), scale_rule="signed-max", scale_format=FLOAT32)


def _gguf(grid: IntFormat, rule: ScaleRule, group: int = 32) -> QuantSpec:
    granularity = per_group(group)
    return QuantSpec(
        format=grid, granularity=granularity, scale_rule=rule, scale_format=FLOAT16, ranges="static"
    )


def _of_range(grid: ElementFormat, granularity: Granularity, rule: ScaleRule = "amax") -> QuantSpec:
    return QuantSpec(format=grid, granularity=granularity, scale_rule=rule, ranges="static")


def _static(spec: QuantSpec, granularity: Granularity | None = None) -> QuantSpec:
    return replace(spec, ranges="static", granularity=granularity or spec.granularity)


_TABLE: list[Scheme] = [
    # integer weights in groups
    *(Scheme(name=f"w{bits}a16", weights=_int_weights(bits, per_group(32))) for bits in (2, 3, 4, 8)),
    *(
        Scheme(name=f"w{bits}a8", weights=_int_weights(bits, per_group(32)), inputs=_INT8_PER_TOKEN)
        for bits in (2, 3, 4)
    ),
    *(
        Scheme(
            name=f"w{bits}a8-ort",
            weights=_int_weights(bits, per_group(32), "signed-max"),
            inputs=replace(_INT8_PER_TOKEN, granularity=per_group(32)),
        )
        for bits in (2, 4)
    ),
    Scheme(
        name="w4afp8",
        weights=_int_weights(4, per_group(32)),
        inputs=replace(_FP8_PER_ROW, granularity=per_token),
    ),
    # int8 weights per channel
    Scheme(name="w8a8", weights=_int_weights(8, per_channel, "narrow"), inputs=_INT8_PER_TOKEN),
    Scheme(name="w8a8-static", weights=_int_weights(8, per_channel, "narrow"), inputs=_INT8_PER_TENSOR),
    Scheme(name="w8a8-ort", weights=_int_weights(8, per_channel, "narrow"), inputs=_UINT8_PER_TENSOR),
    Scheme(
        name="w8a8-ort-static",
        weights=_int_weights(8, per_channel, "narrow"),
        inputs=replace(_UINT8_PER_TENSOR, ranges="static"),
    ),
    Scheme(name="w7a8-ort", weights=_int_weights(7, per_channel, "narrow"), inputs=_UINT8_PER_TENSOR),
    Scheme(
        name="w7a8-ort-static",
        weights=_int_weights(7, per_channel, "narrow"),
        inputs=replace(_UINT8_PER_TENSOR, ranges="static"),
        integer_bias=True,
    ),
    # FP8
    Scheme(name="fp8", weights=_static(_FP8_PER_ROW), inputs=_FP8_PER_ROW),
    Scheme(
        name="fp8-static", weights=_static(_FP8_PER_ROW, per_tensor), inputs=_static(_FP8_PER_ROW, per_tensor)
    ),
    Scheme(
        name="fp8-block",
        weights=_static(_FP8_PER_ROW, per_block(128, 128)),
        inputs=replace(_FP8_PER_ROW, granularity=per_group(128)),
    ),
    # microscaling
    Scheme(name="mxfp8", weights=_mx(E4M3, "static"), inputs=_mx(E4M3, "dynamic")),
    Scheme(name="mxfp6", weights=_mx(E2M3, "static"), inputs=_mx(E2M3, "dynamic")),
    Scheme(name="mxfp4", weights=_mx(E2M1, "static"), inputs=_mx(E2M1, "dynamic")),
    Scheme(name="mxfp4a16", weights=_mx(E2M1, "static")),
    Scheme(name="mxint8", weights=_mx(MXINT8, "static"), inputs=_mx(MXINT8, "dynamic")),
    # NVFP4
    Scheme(name="nvfp4", weights=_static(_NVFP4), inputs=_NVFP4),
    Scheme(name="nvfp4a16", weights=_static(_NVFP4)),
    Scheme(name="nvfp4-2d", weights=_static(_NVFP4, per_block(16, 16)), inputs=_NVFP4),
    Scheme(
        name="nvfp4-4over6",
        weights=replace(_static(_NVFP4), scale_rule="four-over-six"),
        inputs=_NVFP4,
    ),
    # llama.cpp
    Scheme(name="q8_0", weights=_static(_Q8_0), inputs=_Q8_0),
    Scheme(name="q8_0a16", weights=_static(_Q8_0)),
    Scheme(name="q4_0", weights=_gguf(IntFormat(4), "signed-max"), inputs=_Q8_0),
    Scheme(name="q4_1", weights=_gguf(IntFormat(4, signed=False), "min-max"), inputs=_Q8_0),
    Scheme(name="mxfp4-gguf", weights=replace(_mx(E2M1, "static"), scale_rule="floor"), inputs=_Q8_0),
    Scheme(name="tq2_0", weights=_gguf(IntFormat(2, narrow=True), "narrow", 256), inputs=_Q8_K),
    # tables of levels
    Scheme(name="nf4", weights=_of_range(NF4, per_group(64))),
    Scheme(name="w1a16-seq", weights=_of_range(BINARY, per_channel, "mean")),
    Scheme(name="w1.58a16-seq", weights=_of_range(TERNARY, per_channel)),
    Scheme(name="w2a16-seq", weights=_of_range(STRETCHED, per_channel)),
]

PRESETS: dict[str, Scheme] = {scheme.name: scheme for scheme in _TABLE}
# The next preset of the same family with more bits.
_UP = {
    "w2a16": "w4a16",
    "w3a16": "w4a16",
    "w4a16": "w8a16",
    "w2a8": "w4a8",
    "w3a8": "w4a8",
    "w4a8": "w8a8",
    "w2a8-ort": "w4a8-ort",
    "w4a8-ort": "w8a8-ort",
    "w4afp8": "fp8",
    "mxfp4": "mxfp6",
    "mxfp6": "mxfp8",
    "tq2_0": "q4_0",
    "q4_0": "q8_0",
    "q4_1": "q8_0",
    "mxfp4-gguf": "q8_0",
    "w1a16-seq": "w1.58a16-seq",
    "w1.58a16-seq": "w2a16-seq",
}
# Keys and values in the KV cache. Readers hold the scale in float32 or in the model's dtype: as a bfloat16
# number it is the same in both.
KV_PRESETS: dict[str, QuantSpec] = {
    "fp8": replace(_static(_FP8_PER_ROW, per_tensor), scale_format=BFLOAT16),
}


def preset(name: str) -> Scheme:
    """The scheme of that name; "-g64" after the name of a scheme with groups changes their size.

    Raises:
        ValueError: no such scheme, with the nearest name; or a group for a scheme that has none.

    >>> preset("w4a16-g128").weights.granularity.columns
    128
    """
    stem, has_suffix, size = name.rpartition("-g")
    if not (has_suffix and size.lstrip("-").isdigit()):
        stem = name
    if stem not in PRESETS:
        nearest = get_close_matches(stem, PRESETS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; there are {', '.join(PRESETS)}"
        raise ValueError(f"no scheme {name!r}{hint}")
    scheme = PRESETS[stem]
    if stem == name:
        return scheme
    if int(size) < 1:
        raise ValueError(f"{name!r}: a group of {size} asked; a group has at least one element")
    weights = scheme.weights
    grouped = weights.granularity == per_group(32) and weights.scale_format == FLOAT32
    if not (grouped and isinstance(weights.format, IntFormat)):
        raise ValueError(f"{name!r}: the blocks of {stem!r} are part of its format and cannot be changed")
    group = per_group(int(size))
    inputs = scheme.inputs
    if inputs is not None and inputs.granularity == weights.granularity:
        inputs = replace(inputs, granularity=group)
    return replace(scheme, name=name, weights=replace(weights, granularity=group), inputs=inputs)


def ways_up(name: str) -> list[Scheme]:
    """The presets of the same family with more bits, the nearest first; none of a scheme of one's own.

    A changed size of groups is kept, by those that have groups.

    >>> [scheme.name for scheme in ways_up("w2a8-g64")]
    ['w4a8-g64', 'w8a8']
    """
    stem, has_suffix, size = name.rpartition("-g")
    if not (has_suffix and size.isdigit()):
        stem = name
    group, found = name.removeprefix(stem), list[Scheme]()
    while stem in _UP:
        stem = _UP[stem]
        weights = PRESETS[stem].weights
        found.append(preset(stem + group) if weights.granularity == per_group(32) else PRESETS[stem])
    return found


def kv_preset(name: str) -> QuantSpec:
    """The spec of keys and values of that name.

    Raises:
        ValueError: there is none.

    >>> print(kv_preset("fp8"))
    e4m3 per tensor, static
    """
    if name not in KV_PRESETS:
        raise ValueError(f"no spec of keys and values {name!r}; there are {', '.join(KV_PRESETS)}")
    return KV_PRESETS[name]
