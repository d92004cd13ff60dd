"""compressed-tensors: a converted model becomes a folder that transformers loads and vLLM serves.

The codes of a module take the place of its weight, in the layout of its storage format; everything else is
saved as the model's own `save_pretrained` does: sharded, tied weights once, no pickle.

Kept tensors have the dtype that the model has. Only where readers decompress to bfloat16 and nothing else
(the 4-bit floats and mxfp8) they are bfloat16, or the model would not run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recoup.engines.transformers import silent
from recoup.engines.transformers_experts import places
from recoup.export import compressed_tensors_config as schema
from recoup.export.compressed_tensors_experts import as_linears, check_names
from recoup.export.fused import check_fused
from recoup.nn import CodedExperts, CodedLinear, FakeQuantizer, cache_quantizers
from recoup.numerics import BFLOAT16, E2M1, E4M3, E8M0, FLOAT16, FLOAT32, Format, IntFormat, QuantSpec
from recoup.schemes import Scheme

CACHE_SCALES = ("k_scale", "v_scale")
_BFLOAT16_ONLY = {schema.MXFP8, schema.MXFP4, schema.NVFP4}
_DTYPES: dict[Format, torch.dtype] = {
    FLOAT32: torch.float32,
    FLOAT16: torch.float16,
    BFLOAT16: torch.bfloat16,
}


def check(model: nn.Module, modules: Mapping[str, tuple[Scheme, type]]) -> None:
    """Can a folder hold this model?

    Args:
        model: float, or converted.
        modules: what is quantized: the scheme and the type of the converted module, by name.

    Raises:
        ValueError: it cannot; says what to do.
        ImportError: the extra is not installed.
    """
    import compressed_tensors  # pyright: ignore[reportUnusedImport]  # noqa: F401 (the writer needs it)
    import transformers

    kind = type(model)
    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(
            f"compressed-tensors: the model is a {kind.__module__}.{kind.__qualname__}, these folders are "
            "transformers'; bring a PreTrainedModel, or export to onnx"
        )
    if getattr(transformers, kind.__name__, None) is not kind:
        raise ValueError(
            f"compressed-tensors: transformers does not know the class {kind.__qualname__}, so nobody could "
            "load the folder; use the class that AutoModel gives"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "compressed-tensors: transformers loaded this model from quantized weights, and does not save "
            "it as a float one; make a new model from its config, without quantization_config, and load its "
            "state_dict into that"
        )
    for path, (scheme, coded) in modules.items():
        schema.check(path, scheme, coded)
        if coded is CodedExperts:
            places(model, path, model.get_submodule(path))
            check_names(model, [name for name, (_, kind) in modules.items() if kind is CodedLinear])
    check_fused(model, modules)
    for path, parameter in model.named_parameters():
        if path.rpartition(".")[0] in modules:
            continue
        if parameter.ndim == 3 and min(parameter.shape) > 1:  # a convolution's kernel is no stack of matrices
            owner = model.get_submodule(path.rpartition(".")[0])
            if not isinstance(owner, nn.Conv1d | nn.ConvTranspose1d):
                raise ValueError(
                    f"compressed-tensors: {path} is a stack of experts that stays in float, which no entry "
                    "of the config tells vLLM; export to onnx, or quantize a model without fused experts"
                )


def write(model: nn.Module, folder: Path, example: object) -> None:
    """Write `model` into the folder: config, weights, generation config; a float model as it is.

    Args:
        model: a converted, or float, transformers model.
        folder: exists.
        example: not needed.
    """
    del example
    saved: Any = as_linears(model)
    if not any(isinstance(module, CodedLinear) for module in saved.modules()):
        with silent():
            saved.save_pretrained(folder)
        return
    with silent():
        saved.save_pretrained(folder, state_dict=state_dict(saved))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = schema.quantization_config(saved)
    if (dtype := kept_dtype(saved)) is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    if getattr(saved, "generation_config", None) is not None:
        config["use_cache"] = saved.generation_config.use_cache  # off in training only
    file.write_text(json.dumps(config, indent=2) + "\n")


def kept_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of everything that is not quantized; None for its own."""
    formats = {schema.layout(m.scheme).format for m in model.modules() if isinstance(m, CodedLinear)}
    return torch.bfloat16 if formats & _BFLOAT16_ONLY else None


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What the folder stores: kept tensors under their names, codes and scales under the format's."""
    coded = {path: module for path, module in model.named_modules() if isinstance(module, CodedLinear)}
    state = kept(model)
    for path, module in coded.items():
        state |= {f"{path}.{name}": tensor.contiguous() for name, tensor in stored(module).items()}
    return state | cache_scales(model)


def cache_scales(model: nn.Module) -> dict[str, Tensor]:
    """The scales of keys and values, by their names beside the projections."""
    return {
        f"{path}.{name}": quantizer.stored_qparams.scale.detach().reshape(1)
        for path, quantizers in cache_quantizers(model).items()
        for name, quantizer in zip(CACHE_SCALES, quantizers, strict=True)
    }


def kept(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that are not quantized, in the dtype in which they are stored; tied ones stay one."""
    quantized = tuple(
        f"{path}.{part}."
        for path, module in model.named_modules()
        if isinstance(module, CodedLinear)
        for part in ("weight", "input_quantizer")
    ) + tuple(f"{path}.{part}_quantizer." for path in cache_quantizers(model) for part in ("key", "value"))
    dtype, cast = kept_dtype(model), dict[int, Tensor]()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(quantized):
            continue
        if dtype is None or not tensor.is_floating_point():
            state[name] = tensor
        else:
            state[name] = cast.setdefault(tensor.data_ptr(), tensor.to(dtype))
    return state


def stored(module: CodedLinear) -> dict[str, Tensor]:
    """The tensors of one quantized module, by their names beside it."""
    weight, spec = module.weight, module.weight.spec
    format_ = schema.layout(module.scheme).format
    tensors = {"weight_scale": _scale(weight.scale, spec), **_codes(weight.codes, spec, format_)}
    if weight.global_scale is not None:
        tensors["weight_global_scale"] = _divisor(weight.global_scale)
    if isinstance(module.input_quantizer, FakeQuantizer) and module.input_quantizer.needs_calibration:
        if module.input_quantizer.global_scale is not None:
            tensors["input_global_scale"] = _divisor(module.input_quantizer.global_scale)
        else:
            scale = module.input_quantizer.stored_qparams.scale.detach()
            tensors["input_scale"] = scale.reshape(1).clone()  # experts share theirs, and files share nothing
    return tensors


def _codes(codes: Tensor, spec: QuantSpec, format_: str) -> dict[str, Tensor]:
    if format_ == schema.PACKED:
        from compressed_tensors.compressors import pack_to_int32

        packed = pack_to_int32(codes, spec.format.bits)
        return {"weight_packed": packed, "weight_shape": torch.tensor(codes.shape)}
    if spec.format == E2M1:
        return {"weight_packed": codes[:, 0::2] | codes[:, 1::2] << 4}
    return {"weight": codes if isinstance(spec.format, IntFormat) else codes.view(torch.float8_e4m3fn)}


def _scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    if spec.scale_format == E8M0:
        return E8M0.encode(scale)
    if spec.scale_format == E4M3:
        return E4M3.encode(scale).view(torch.float8_e4m3fn)
    scale = scale.to(_DTYPES[spec.scale_format])  # exact: it lies on that grid
    return scale.reshape(1) if spec.granularity.rows is None else scale


def _divisor(global_scale: Tensor) -> Tensor:
    """The format divides by the scale of the scales."""
    return (1 / global_scale).reshape(1)
