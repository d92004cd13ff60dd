"""Is the folder what was trained? Codes from its bytes, modules and outputs as transformers runs them.

The decoder here is plain: bit streams by NumPy, from the stored tensors and the arguments in config.json
alone, and not a line of the library that packed them.
"""

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recoup.engines.safetensors_file import read_safetensors
from recoup.engines.transformers import load, load_stacks
from recoup.export import compressed_tensors as writer
from recoup.export import compressed_tensors_config as schema
from recoup.export.answers import answers
from recoup.export.compressed_tensors_experts import as_linears, targets_of
from recoup.export.parity import Array, Parity, ParityError
from recoup.export.routing import routed, routing_of
from recoup.export.trained import (
    KEPT,
    Layer,
    Stored,
    Trained,
    check_cached,
    check_modules,
    check_stored,
    coded,
    tensors_of,
)
from recoup.nn import Batch, CodedLinear, CodedModule, Codes, FakeQuantizer, call, cut
from recoup.numerics import IntFormat, dequantize

_TINY = torch.finfo(torch.float32).tiny
_BFLOAT16 = 2.0**-8  # its unit roundoff
_LATTICES = 2  # the library derives dynamic scales of inputs by rules of its own
_OTHERS: dict[str, tuple[str, tuple[int, ...]]] = {  # the names here: those of the file, and the shape here
    "global_divisor": ("weight_global_scale", ()),
    "input_global_divisor": ("input_global_scale", ()),
    "input_scale": ("input_scale", (1, 1)),
}


@torch.no_grad()
def trained(model: nn.Module, folder: Path, example: Batch) -> Trained:
    """What a folder is compared with, from the converted model that it was written from."""
    example, model = cut(example, 1), as_linears(model)
    modules, _ = coded(model)
    roundoff = max(map(_roundoff, modules.values()), default=0.0)
    reference = _as_stored(model, load(folder))
    routing = routing_of(reference, example)
    with routed(reference, routing):
        answered = answers(reference, example, lattices=_LATTICES, weight_roundoff=roundoff)
    return Trained.of(model, example, answered, kept=writer.kept(model), routing=routing)


def stored(folder: Path, layers: Mapping[str, Layer]) -> dict[str, Stored]:
    """Codes and all scales of every quantized module, from the bytes and config.json.

    Raises:
        ParityError: the folder quantizes other modules, or config.json does not say how.
    """
    tensors = read_tensors(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scaled = {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}
    check_modules("the folder has scales for", scaled, layers)
    found: dict[str, Stored] = {}
    for path in layers:
        codes, scale = read_codes(path, tensors, config)
        others = {
            name: tensors[f"{path}.{tensor}"].numpy().reshape(shape)
            for name, (tensor, shape) in _OTHERS.items()
            if f"{path}.{tensor}" in tensors
        }
        found[path] = {"codes": codes, "scale": scale, **others}
    return found


def stored_cached(folder: Path) -> dict[str, Array]:
    """The scales of keys and values from the bytes, as `cached` names them."""
    kinds = dict(zip(writer.CACHE_SCALES, KEPT, strict=True))
    return {
        f"{path}.{kinds[scale]}": tensor.numpy()
        for name, tensor in read_tensors(folder).items()
        for path, _, scale in [name.rpartition(".")]
        if scale in kinds
    }


@torch.no_grad()
def compare(trained: Trained, folder: Path) -> Parity:
    """Compare a folder with what was trained.

    Every code and scale in the bytes equals the trained one, and the folder quantizes these modules and no
    others. Loaded by transformers, every kept tensor is the model's, every decompressed weight is what its
    codes stand for, every module's output is within its bound, as is what a quantized KV cache holds, and the
    outputs differ by no more than rounding explains; so do a language model's next words.

    Raises:
        ParityError: one of these does not hold; names it.
    """
    found = stored(folder, trained.layers)
    codes, scales = check_stored(trained.modules, found)
    scales += check_cached(trained.cached, stored_cached(folder))
    for path, module in trained.modules.items():
        for name in ("global_divisor", "input_global_divisor", "input_scale"):
            if name in tensors_of(module) and name not in found[path]:
                raise ParityError(f"{path}: {_OTHERS[name][0]} is missing")
    engine = load(folder)
    described = {name for name, module in engine.named_modules() if hasattr(module, "quantization_scheme")}
    planned = {*trained.modules, *_attentions(trained)}
    check_modules("transformers, reading config.json, quantizes", described, planned)
    _same_dense_tensors(trained, engine)
    with routed(engine, trained.routing):
        outputs, worst = _compared(trained, engine)
    agreement = trained.answers.agree(outputs, "transformers")
    if _reads_stacks(trained, engine):
        stacks = call(load_stacks(folder), trained.example)
        trained.answers.agree(stacks, "transformers, with experts in stacks,")
    return Parity(
        modules=len(trained.modules),
        codes=codes,
        scales=scales,
        worst_module=worst,
        end_to_end=agreement.drift,
        divergence=agreement.nats,
        same_word=agreement.same_word,
    )


def _reads_stacks(trained: Trained, engine: nn.Module) -> bool:
    """Does transformers by itself make stacks of experts of the folder that compute what was trained?

    It decodes these formats, all experts by one group, and never rounds what they are given
    (`CompressedTensorsDequantize`, integrations/compressed_tensors.py).
    """
    layouts = [schema.layout(trained.modules[path].scheme) for path in targets_of(engine)]
    readable = all(one.format in schema.STACKED and one.inputs is None for one in layouts)
    return readable and len({str(one) for one in layouts}) == 1


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
        named = any(
            target == path or (target.startswith("re:") and re.match(target[3:], path))
            for target in group["targets"]
        )
        if named or (group["targets"] == ["Linear"] and path not in config["ignore"]):
            return group
    raise ParityError(f"{path}: config.json does not say how it is quantized")


def _integers(words: Array, bits: int, shape: tuple[int, int]) -> Array:
    """Rows of little-endian bit streams, cut into fields that count from -2^(bits - 1)."""
    rows, columns = shape
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : columns * bits]
    fields = stream.reshape(rows, columns, bits).astype(np.int16)
    return (fields << np.arange(bits, dtype=np.int16)).sum(axis=2) - 2 ** (bits - 1)


def _same_dense_tensors(trained: Trained, engine: nn.Module) -> None:
    """What transformers holds after decompressing: kept tensors bit for bit, weights as their codes say."""
    loaded = engine.state_dict()
    for name, tensor in (trained.kept or {}).items():
        if name not in loaded or not torch.equal(loaded[name], tensor.to(loaded[name].dtype)):
            raise ParityError(f"{name}: transformers does not load it as it was trained")
    for path, module in trained.modules.items():
        expected, found = _dense(module), loaded[f"{path}.weight"]
        slack = (_roundoff(module) + 4 * 2**-24 * (_roundoff(module) > 0)) * expected.abs()
        if found.shape != expected.shape or ((found - expected).abs() > slack).any():
            raise ParityError(
                f"{path}: transformers decompresses its weight to something else than its codes"
            )


def _dense(module: CodedModule) -> Tensor:
    return dequantize(module.weight.codes, module.weight.qparams, module.weight.spec)


def _roundoff(module: CodedModule) -> float:
    """Of the decompressed weight: E2M1 times two scales is rounded to bfloat16, all others are exact."""
    return 0.0 if module.weight.global_scale is None else _BFLOAT16


def _compared(trained: Trained, engine: nn.Module) -> tuple[Any, float]:
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
        return lambda _, inputs, output: compare(path, output, *_expected(trained.modules[path], inputs[0]))

    def cache(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
            for kind, x, kept in zip(KEPT, inputs, output, strict=False):
                quantizer = trained.cached[f"{path}.{kind}"]
                compare(quantizer.path, kept, quantizer(x).double(), _input_slack(quantizer, x))

        return hook

    handles = [engine.get_submodule(path).register_forward_hook(linear(path)) for path in trained.modules]
    handles += [
        engine.get_submodule(f"{path}.kv_cache").register_forward_hook(cache(path))
        for path in _attentions(trained)
    ]
    try:
        return call(engine, trained.example), worst
    finally:
        for handle in handles:
            handle.remove()


def _attentions(trained: Trained) -> set[str]:
    """The attention modules whose keys and values are quantized."""
    return {name.rpartition(".")[0] for name in trained.cached}


def _expected(module: CodedModule, x: Tensor) -> tuple[Tensor, Tensor]:
    """A module's output in float64, and how far transformers may be from it.

    With u = 2^-24, K products and one bias: a sum of K + 1 float32 terms in any order is off by at most
    (K + 1) u times the sum of magnitudes (Higham 2002, section 4.2); scaling adds a few more roundings, and
    weights that were rounded to bfloat16 add theirs. Each input may be off by what `_input_slack` says.
    """
    assert isinstance(module, CodedLinear)
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
