"""Whether a model can be split over several devices as vLLM splits it, with every scale beside its codes.

vLLM cuts some matrices into rows and others into columns, one part to a device (`--tensor-parallel-size`).
Which is which, a model of transformers says itself: its `tp_plan`. A part must hold whole blocks of codes, as
many as it has scales, and whole words of packed codes (vLLM's `layers/linear.py`, `validate_fp8_block_shape`,
and its packed parameters). What stays in float, and the output matrix, which vLLM pads, are not looked at.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from recoup.export.compressed_tensors_config import PACKED, layout
from recoup.export.fused import siblings
from recoup.nn import CodedExperts, QuantExperts
from recoup.schemes import Scheme

_WORD = 32  # bits
_KEYS_AND_VALUES = ("k_proj", "v_proj")


def check_split(model: nn.Module, modules: Mapping[str, tuple[Scheme, Any]], devices: int) -> None:
    """Can vLLM serve this on so many devices?

    Args:
        model: float, of transformers.
        modules: what is quantized, by name.
        devices: of `--tensor-parallel-size`.

    Raises:
        ValueError: no plan, or a matrix or the heads of attention cannot be split; names it and what can be.
    """
    plan: dict[str, str] = getattr(model, "tp_plan", None) or {}
    if not plan:
        raise ValueError(
            f"export.tensor_parallel: transformers has no tp_plan for {type(model).__name__}, so nothing is "
            "known of how it is split; leave it out"
        )
    if wrong := _heads(model, devices):
        raise ValueError(f"export.tensor_parallel: {wrong} cannot be dealt to {devices} devices")
    for path, (scheme, kind) in modules.items():
        if kind is CodedExperts:
            if wrong := _cut_experts(model, path, scheme, devices):
                raise ValueError(
                    f"{path}: {wrong} on {devices} devices; take fewer, or change the scheme by a rule"
                )
            continue
        style = _style(model, path)
        if path.endswith("lm_head") or not style:
            continue
        if wrong := _cut(model, path, scheme, style, devices):
            fewer = (n for n in range(2, devices) if not _heads(model, n))
            legal = [1, *(n for n in fewer if not _cut(model, path, scheme, style, n))]
            raise ValueError(
                f"{path}: {wrong} on {devices} devices; split it over {', '.join(map(str, legal))}, or "
                "change the scheme by a rule"
            )


def _heads(model: nn.Module, devices: int) -> str:
    """Which heads cannot be dealt out; those of keys and values are repeated where they are fewer."""
    config: Any = model.config
    heads = getattr(config, "num_attention_heads", devices)
    shared = getattr(config, "num_key_value_heads", None) or heads
    if heads % devices:
        return f"{heads} heads of queries"
    return f"{shared} heads of keys and values" if shared % devices and devices % shared else ""


def _cut(model: nn.Module, path: str, scheme: Scheme, style: str, devices: int) -> str:
    """What the split would cut; empty if nothing."""
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    rows, columns = scheme.weights.granularity.rows, scheme.weights.granularity.columns
    if "rowwise" in style:  # of the transposed matrix
        part, left = divmod(linear.in_features, devices)
        if left or (columns is not None and part % columns):
            return f"{linear.in_features} columns cannot be split into whole groups of {columns or 1}"
        if layout(scheme).format == PACKED and part * scheme.weights.format.bits % _WORD:
            return f"{part} codes of {scheme.weights.format.bits} bits do not fill words of {_WORD}"
        return ""
    if "colwise" not in style:
        return ""
    for whole, dealt in _matrices(model, path, devices):
        part, left = divmod(whole, dealt)
        if left or (rows is not None and part % rows):
            return f"{whole} rows cannot be split into whole blocks of {rows or 1}"
    return ""


def expert_shape(model: nn.Module, path: str) -> tuple[int, int]:
    """The features outside and inside of an expert: rows and columns of its `down_proj`."""
    return QuantExperts.view(model.get_submodule(path), "down_proj").shape


def _cut_experts(model: nn.Module, path: str, scheme: Scheme, devices: int) -> str:
    """What the split would cut: the features inside of every expert are dealt out."""
    _, inner = expert_shape(model, path)
    part, left = divmod(inner, devices)
    for size in (scheme.weights.granularity.rows, scheme.weights.granularity.columns):
        if left or (size is not None and part % size):
            return f"{inner} features of each expert cannot be split into whole blocks of {size or 1}"
    if layout(scheme).format == PACKED and part * scheme.weights.format.bits % _WORD:
        return f"{part} codes of {scheme.weights.format.bits} bits do not fill words of {_WORD}"
    return ""


def _style(model: nn.Module, path: str) -> str:
    plan: dict[str, str] = getattr(model, "tp_plan", None) or {}
    return next((style for match, style in plan.items() if fnmatchcase(path, match)), "")


def _matrices(model: nn.Module, path: str, devices: int) -> list[tuple[int, int]]:
    """The rows of every matrix that a Linear joins, and over how many devices they are dealt.

    Heads of keys and values that are fewer than the devices are repeated (vLLM's `QKVParallelLinear`).
    """
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    config: Any = model.config
    name, rows = path.rpartition(".")[2], linear.out_features
    heads = getattr(config, "num_attention_heads", None) or devices
    shared = getattr(config, "num_key_value_heads", None) or heads
    dealt = min(devices, shared)
    if name == "qkv_proj":
        head = rows // (heads + 2 * shared)
        return [(head * heads, devices), (head * shared, dealt), (head * shared, dealt)]
    if name == "gate_up_proj":
        return [(rows // 2, devices)] * 2
    return [(rows, dealt if name in _KEYS_AND_VALUES else devices)]


def parts(
    model: nn.Module, modules: Mapping[str, tuple[Scheme, Any]], devices: int
) -> dict[str, tuple[int, int]]:
    """Rows and columns of what a device multiplies by, by the names of what is quantized.

    Siblings that vLLM runs as one product (`fused.FUSED`) have the rows of all of them.
    """
    found: dict[str, tuple[int, int]] = {}
    for path in modules:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        style = _style(model, path)
        rows = linear.out_features
        if "colwise" in style:
            rows = sum(whole // dealt for whole, dealt in _matrices(model, path, devices))
        found[path] = rows, linear.in_features // (devices if "rowwise" in style else 1)
    for names in siblings(model):
        joined = sum(found[name][0] for name in names if name in found)
        found |= {name: (joined, found[name][1]) for name in names if name in found}
    return found


def check_joined_blocks(model: nn.Module, modules: Mapping[str, tuple[Scheme, Any]]) -> None:
    """Are the blocks of matrices that are one in the file whole, on one device? The last one's may be cut.

    Raises:
        ValueError: vLLM refuses them (`fp8_utils.py`, `validate_fp8_block_shape`); names the matrix.
    """
    for path, (scheme, _) in modules.items():
        rows = scheme.weights.granularity.rows
        for whole, _ in _matrices(model, path, 1)[:-1]:
            if rows is not None and whole % rows:
                raise ValueError(
                    f"{path}: a matrix in it has {whole} rows, no whole blocks of {rows}, and vLLM reads "
                    "each by itself; take fp8, which has a scale per channel"
                )
