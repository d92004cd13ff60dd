"""Is the folder what was trained? Codes from its bytes, modules and outputs as transformers runs them.

The decoder here is plain: bit streams by NumPy, from the stored tensors and the arguments in config.json
alone, and not a line of the library that packed them.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recoup.engines.safetensors_file import read_safetensors
from recoup.engines.transformers import load
from recoup.export import compressed_tensors as writer
from recoup.export import compressed_tensors_config as schema
from recoup.export.parity import Parity, ParityError, divergence, end_to_end
from recoup.nn import Batch, CodedLinear, Codes, FakeQuantizer, cache_quantizers, call, size_of
from recoup.numerics import IntFormat, dequantize

Array = np.ndarray[Any, np.dtype[Any]]
_TINY = torch.finfo(torch.float32).tiny
_BFLOAT16 = 2.0**-8  # its unit roundoff
_LATTICES = 2  # the library derives dynamic scales of inputs by rules of its own


@torch.no_grad()
def verify(model: nn.Module, folder: Path, example: Batch) -> Parity:
    """Compare a folder with the converted model it was written from.

    Every code and scale in the bytes equals the trained one, and the folder quantizes these modules and no
    others. Loaded by transformers, every kept tensor is the model's, every decompressed weight is what its
    codes stand for, every module's output is within its bound, as is what a quantized KV cache holds, and the
    outputs differ by no more than rounding explains; so do a language model's next words.

    Raises:
        ParityError: one of these does not hold; names it.
    """
    example = _first(example)
    coded = {path: module for path, module in model.named_modules() if isinstance(module, CodedLinear)}
    tensors = read_tensors(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scaled = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    _same_modules("the folder has scales for", scaled, coded)
    codes = scales = 0
    for path, module in coded.items():
        values, scale = read_codes(path, tensors, config)
        _equal(path, "codes", values, module.weight.codes)
        _equal(path, "scales", scale, module.weight.scale)
        _same_other_scales(path, module, tensors)
        codes, scales = codes + values.size, scales + scale.size
    caches = cache_quantizers(model)
    scales += _same_cache_scales(model, tensors)

    engine = load(folder)
    described = [name for name, module in engine.named_modules() if hasattr(module, "quantization_scheme")]
    _same_modules("transformers, reading config.json, quantizes", described, [*coded, *caches])
    _same_dense_tensors(model, coded, engine)
    outputs, worst = _compared(coded, caches, engine, example)
    reference, roundoff = _as_stored(model, engine), max(map(_roundoff, coded.values()))
    drift = end_to_end(
        reference, outputs, example, engine="transformers", lattices=_LATTICES, weight_roundoff=roundoff
    )
    nats = same = None
    if _speaks(model):
        words = outputs.logits.log_softmax(dim=-1)
        nats, same = divergence(
            _Words(reference),
            words,
            example,
            engine="transformers",
            lattices=_LATTICES,
            weight_roundoff=roundoff,
        )
    return Parity(
        modules=len(coded),
        codes=codes,
        scales=scales,
        worst_module=worst,
        end_to_end=drift,
        divergence=nats,
        same_word=same,
    )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every stored tensor, of all shards."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in read_safetensors(file).items()}


def read_codes(path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Array, Array]:
    """Codes and scales of a module, unpacked from the stored tensors and the config alone.

    Args:
        path: the module.
        tensors: by name.
        config: `quantization_config`.

    Returns:
        Codes (rows, columns), integers or bit patterns of a float format; scales (rows, blocks).
    """
    group = _group_of(path, config)
    scale = tensors[f"{path}.weight_scale"]
    exponents = scale.dtype == torch.uint8
    decoded = np.ldexp(np.float32(1), scale.int().numpy() - 127) if exponents else scale.float().numpy()
    scales = decoded.reshape(len(scale), -1)
    if group["format"] == schema.PACKED:
        shape = tuple(tensors[f"{path}.weight_shape"].tolist())
        return _integers(
            tensors[f"{path}.weight_packed"].numpy(), group["weights"]["num_bits"], shape
        ), scales
    if group["format"] in (schema.MXFP4, schema.NVFP4):
        pairs = tensors[f"{path}.weight_packed"].numpy()
        return np.stack([pairs & 15, pairs >> 4], axis=2).reshape(len(pairs), -1), scales
    weight = tensors[f"{path}.weight"]
    return (weight if weight.dtype == torch.int8 else weight.view(torch.uint8)).numpy(), scales


def _group_of(path: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    for group in config["config_groups"].values():
        if path in group["targets"] or (group["targets"] == ["Linear"] and path not in config["ignore"]):
            return group
    raise ParityError(f"{path}: config.json does not say how it is quantized")


def _integers(words: Array, bits: int, shape: tuple[int, int]) -> Array:
    """Rows of little-endian bit streams, cut into fields that count from -2^(bits - 1)."""
    rows, columns = shape
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : columns * bits]
    fields = stream.reshape(rows, columns, bits).astype(np.int16)
    return (fields << np.arange(bits, dtype=np.int16)).sum(axis=2) - 2 ** (bits - 1)


def _same_modules(what: str, found: Iterable[str], planned: Iterable[str]) -> None:
    if different := sorted(set(found) ^ set(planned)):
        raise ParityError(
            f"{what} other modules than the plan: {', '.join(different[:3])}"
            + (f" and {len(different) - 3} more" if len(different) > 3 else "")
        )


def _equal(path: str, what: str, found: Array, trained: Tensor) -> None:
    expected = trained.cpu().numpy()
    if found.shape != expected.shape or not np.array_equal(found, expected):
        place = np.argwhere(found != expected) if found.shape == expected.shape else []
        where = tuple(map(int, place[0])) if len(place) else "its shape"
        raise ParityError(
            f"{path}: the {what} read back from the folder differ from the trained ones at {where}"
        )


def _same_other_scales(path: str, module: CodedLinear, tensors: Mapping[str, Tensor]) -> None:
    """Those of whole tensors: global scales, as divisors, and the scale of static inputs."""
    inputs = module.input_quantizer if isinstance(module.input_quantizer, FakeQuantizer) else None
    trained = {
        "weight_global_scale": _reciprocal(module.weight.global_scale),
        "input_global_scale": _reciprocal(inputs.global_scale) if inputs else None,
        "input_scale": inputs.stored_qparams.scale if inputs and inputs.scale is not None else None,
    }
    for name, expected in trained.items():
        found = tensors.get(f"{path}.{name}")
        if (found is None) != (expected is None):
            raise ParityError(f"{path}: {name} is {'missing' if found is None else 'not of this scheme'}")
        if found is not None and expected is not None:
            _equal(path, name, found.numpy(), expected.reshape(1))


def _same_cache_scales(model: nn.Module, tensors: Mapping[str, Tensor]) -> int:
    """Those of keys and values; how many there are."""
    trained = writer.cache_scales(model)
    _same_modules(
        "the folder has scales of keys and values for",
        (name for name in tensors if name.endswith(writer.CACHE_SCALES)),
        trained,
    )
    for name, scale in trained.items():
        path, _, what = name.rpartition(".")
        _equal(path, what, tensors[name].numpy(), scale)
    return len(trained)


def _reciprocal(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else 1 / scale


def _same_dense_tensors(model: nn.Module, coded: Mapping[str, CodedLinear], engine: nn.Module) -> None:
    """What transformers holds after decompressing: kept tensors bit for bit, weights as their codes say."""
    loaded = engine.state_dict()
    for name, tensor in writer.kept(model).items():
        if name not in loaded or not torch.equal(loaded[name], tensor.to(loaded[name].dtype)):
            raise ParityError(f"{name}: transformers does not load it as it was trained")
    for path, module in coded.items():
        expected, found = _dense(module), loaded[f"{path}.weight"]
        slack = (_roundoff(module) + 4 * 2**-24 * (_roundoff(module) > 0)) * expected.abs()
        if found.shape != expected.shape or ((found - expected).abs() > slack).any():
            raise ParityError(
                f"{path}: transformers decompresses its weight to something else than its codes"
            )


def _dense(module: CodedLinear) -> Tensor:
    return dequantize(module.weight.codes, module.weight.qparams, module.weight.spec)


def _roundoff(module: CodedLinear) -> float:
    """Of the decompressed weight: E2M1 times two scales is rounded to bfloat16, all others are exact."""
    return 0.0 if module.weight.global_scale is None else _BFLOAT16


def _compared(
    coded: Mapping[str, CodedLinear],
    caches: Mapping[str, tuple[FakeQuantizer, FakeQuantizer]],
    engine: nn.Module,
    example: Batch,
) -> tuple[Any, float]:
    """The engine's outputs, and the largest difference of a module from the trained one, by its bound."""
    worst = 0.0

    def compare(path: str, output: Tensor, expected: Tensor, bound: Tensor) -> None:
        nonlocal worst
        share = float(((output.double() - expected).abs() / bound).max())
        if not share <= 1:
            raise ParityError(
                f"{path}: transformers' output is {share:.3g} times its bound from the trained module's"
            )
        worst = max(worst, share)

    def linear(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        return lambda _, inputs, output: compare(path, output, *_expected(coded[path], inputs[0]))

    def cache(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
            for quantizer, x, kept in zip(caches[path], inputs, output, strict=False):
                compare(quantizer.path, kept, quantizer(x).double(), _input_slack(quantizer, x))

        return hook

    handles = [engine.get_submodule(path).register_forward_hook(linear(path)) for path in coded]
    handles += [
        engine.get_submodule(f"{path}.kv_cache").register_forward_hook(cache(path)) for path in caches
    ]
    try:
        return call(engine, example), worst
    finally:
        for handle in handles:
            handle.remove()


def _expected(module: CodedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """A module's output in float64, and how far transformers may be from it.

    With u = 2^-24, K products and one bias: a sum of K + 1 float32 terms in any order is off by at most
    (K + 1) u times the sum of magnitudes (Higham 2002, section 4.2); scaling adds a few more roundings, and
    weights that were rounded to bfloat16 add theirs. Each input may be off by what `_input_slack` says.
    """
    weight, seen = _dense(module), module.input_quantizer(x)
    bias = torch.zeros(()) if module.bias is None else module.bias.float()
    roundoff = (module.in_features + 8) * 2**-24 + _roundoff(module)
    slack = roundoff * seen.abs() + _input_slack(module.input_quantizer, x)
    y = seen.double() @ weight.double().T + bias
    return y, slack @ weight.abs().T + roundoff * bias.abs() + _TINY


def _input_slack(quantizer: nn.Module, x: Tensor) -> Tensor:
    """How far an input on the library's lattice may be from the same input on the trained one.

    Both round to nearest, so each is within half of its own gap. The library's dynamic scales are derived
    in another way (amax / 127.5 for int8, another rule for MX), but are at most the next power of two.
    """
    if not isinstance(quantizer, FakeQuantizer):
        return torch.zeros_like(x)
    view = x.reshape(-1, x.shape[-1])
    qparams = quantizer.qparams(view)
    step = qparams.step.repeat_interleave(view.shape[0] // qparams.step.shape[0], 0)
    step = step.repeat_interleave(view.shape[1] // step.shape[1], 1).reshape(x.shape)
    grid = quantizer.spec.format
    relative = 0.0 if isinstance(grid, IntFormat) else 2.0**-grid.mantissa_bits
    return 1.5 * torch.maximum(quantizer(x).abs() * relative, step * grid.floor)


def _speaks(model: nn.Module) -> bool:
    """A causal language model: its logits are of next words."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


class _Words(nn.Module):
    """What a language model says of the next word: log-probabilities (samples, tokens, words)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the model is called."""
        return self.model(*args, **kwargs).logits.log_softmax(dim=-1)


def _as_stored(model: nn.Module, engine: nn.Module) -> nn.Module:
    """A copy that computes in float32 and whose kept tensors are as the folder has them."""
    copied = copy.deepcopy(model).float()
    for module in copied.modules():
        if isinstance(module, Codes):
            module.dtype = torch.float32
    kept = writer.kept(model)
    copied.load_state_dict(kept, strict=False)
    # What is not stored, as rotary frequencies, is the engine's: a model that was cast has it rounded.
    computed = dict(engine.named_buffers())
    for name, buffer in copied.named_buffers():
        if name in computed and name not in kept:
            buffer.copy_(computed[name])
    return copied


def _first(batch: Batch) -> Batch:
    """One sample is enough to compare with."""
    size = size_of(batch)

    def one(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
        return value[:1] if whole else value

    if isinstance(batch, Mapping):
        return {name: one(value) for name, value in batch.items()}
    return one(batch) if isinstance(batch, Tensor) else tuple(map(one, batch))
