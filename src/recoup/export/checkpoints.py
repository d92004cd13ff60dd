"""What the weights of a quantized checkpoint stand for, whichever tool wrote it.

Which layers are quantized is read from the tensors that are there, how from the config, and what cannot be
understood from both is refused by name. The bytes are decoded in `checkpoint_layouts.py`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from recoup.engines.safetensors_file import Shards
from recoup.export import checkpoint_layouts as layouts
from recoup.export.checkpoint_layouts import Layer, UnreadableError

_CODES = (".weight_packed", ".qweight", ".weight_scale", ".weight_scale_inv")  # a layer with one is quantized
_ENDLESS = re.compile(r"\)[*+{?]")  # a pattern of these can take for ever
_LONGEST_PATTERN = 500
Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder with quantized weights.

    Args:
        method: as its config calls it.
        tensors: of all files.
        layers: what is quantized, with how it is, by name.
    """

    method: str
    tensors: Mapping[str, Tensor]
    layers: Mapping[str, Layer]

    @property
    def kept(self) -> list[str]:
        """The matrices that are not quantized, by name."""
        found = [name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight")]
        return [path for path in found if path not in self.layers and self.tensors[f"{path}.weight"].ndim > 1]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every quantized weight as the float32 matrix (rows, columns) that its bytes stand for, one by one.

        Raises:
            ValueError: one cannot be decoded; names it.
        """
        for path, layer in self.layers.items():
            prefix = f"{path}."
            parts = {
                name: self.tensors[prefix + name] for name in layouts.PARTS if prefix + name in self.tensors
            }
            try:
                yield path, layouts.LAYOUTS[layer.layout](layer, parts)
            except (KeyError, IndexError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"{path}: its tensors ({', '.join(parts)}) are no {layer.layout} weight ({reason})"
                ) from None


def read(folder: Path) -> Checkpoint:
    """The quantized checkpoint in a folder.

    Raises:
        ValueError: there is none, or its config says something that is not known here; names it.
    """
    config = quantization_config(folder)
    if not config:
        raise ValueError(f"{folder}: no quantized checkpoint; its config.json has no quantization_config")
    method = str(config.get("quant_method"))
    if method not in METHODS:
        raise ValueError(
            f"{folder}: quant_method {method!r} is not read here; there are {', '.join(METHODS)}"
        )
    tensors = Shards(folder)
    paths = sorted({name.removesuffix(end) for name in tensors for end in _CODES if name.endswith(end)})
    if not paths:
        raise ValueError(f"{folder}: its config says {method}, and no layer has codes or scales")
    try:
        layers = {path: layer for path in paths if (layer := METHODS[method](path, config)) is not None}
    except UnreadableError as error:
        raise ValueError(f"{folder}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder}: no quantization config of {method} ({type(error).__name__}: {reason})"
        ) from None
    return Checkpoint(method=method, tensors=tensors, layers=layers)


def quantization_config(folder: Path) -> dict[str, Any]:
    """That of config.json, or of the file that a tool writes beside it; empty for a float model.

    Raises:
        ValueError: a file is no JSON object.
    """
    found = _json(folder / "config.json").get("quantization_config")
    if not found:
        found = _json(folder / "quantize_config.json") or _json(folder / "quantization_config.json")
    modelopt = _json(folder / "hf_quant_config.json")
    if modelopt:
        found = {**(found or {}), **modelopt.get("quantization", {}), "quant_method": "modelopt"}
    if not isinstance(found, dict):
        return {}
    return found


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no whole JSON ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: expected keys and values, found {type(data).__name__}")
    return data


def _compressed_tensors(path: str, config: Config) -> Layer | None:
    group = _group(path, config)
    format_, weights = group.get("format") or config["format"], group["weights"]
    layout = {
        "pack-quantized": "packed integers",
        "int-quantized": "integers",
        "float-quantized": "8-bit floats",
        "naive-quantized": "integers" if weights["type"] == "int" else "8-bit floats",
        "nvfp4-pack-quantized": "4-bit floats",
        "mxfp4-pack-quantized": "4-bit floats",
        "mxfp8-quantized": "8-bit floats",
    }.get(format_)
    bits = weights["num_bits"]
    if layout is None:
        raise UnreadableError(f"{path}: the format {format_!r} of compressed-tensors is not read here")
    block = weights.get("block_structure")
    size = tuple(block) if block else (1, weights.get("group_size"))
    return Layer(layout=layout, bits=bits, block=size, divides_by_global=True)


def _group(path: str, config: Config) -> Config:
    """The group of a module: one that names it, before one whose pattern fits, before one for its class."""
    groups: list[Config] = list(config["config_groups"].values())
    ways: tuple[Callable[[str], bool], ...] = (path.__eq__, partial(_matches, path), "Linear".__eq__)
    for fits in ways:
        for group in groups:
            if any(map(fits, group["targets"])):
                return group
    raise UnreadableError(f"{path}: no group of the config is for it")


def _matches(path: str, target: str) -> bool:
    if not target.startswith("re:"):
        return False
    pattern = target.removeprefix("re:")
    if len(pattern) > _LONGEST_PATTERN or _ENDLESS.search(pattern):
        raise UnreadableError(f"the pattern {pattern[:80]!r} is too much to look for")
    return re.match(pattern, path) is not None


def _gptq(path: str, config: Config) -> Layer | None:
    checkpoint = config.get("checkpoint_format", "gptq")
    if checkpoint not in ("gptq", "gptq_v2"):
        raise UnreadableError(
            f"{path}: checkpoint_format {checkpoint!r} is not read here; there are gptq, gptq_v2"
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise UnreadableError(f"{path}: pack_dtype {config['pack_dtype']!r} is not read here; there is int32")
    dynamic = config.get("dynamic") or {}
    if dynamic:
        raise UnreadableError(f"{path}: rules for some layers (`dynamic`) are not read here")
    return Layer(layout="gptq", bits=config["bits"], zero_points_less_one=checkpoint == "gptq")


def _awq(path: str, config: Config) -> Layer | None:
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm" or config["bits"] != 4:
        raise UnreadableError(
            f"{path}: {config['bits']} bits in the layout {version!r} are not read here; there is gemm"
        )
    return Layer(layout="awq", bits=4)


def _auto_round(path: str, config: Config) -> Layer | None:
    packing = str(config.get("packing_format", "auto_round:auto_gptq"))
    bits = {"bits": config["bits"], **(config.get("extra_config") or {}).get(path, {})}["bits"]
    if bits > 8:
        return None
    if packing.endswith("auto_gptq"):
        return Layer(layout="gptq", bits=bits, zero_points_less_one=True)
    if packing.endswith(("awq", "awq:gemm")):
        return _awq(path, {"bits": bits})
    raise UnreadableError(
        f"{path}: packing_format {packing!r} is not read here; there are auto_gptq, auto_awq"
    )


def _modelopt(path: str, config: Config) -> Layer | None:
    algorithm, size = config["quant_algo"], config.get("group_size")
    if algorithm == "MIXED_PRECISION":
        own = config["quantized_layers"].get(path)
        if own is None:
            raise UnreadableError(f"{path}: quantized_layers does not name it")
        algorithm, size = own["quant_algo"], own.get("group_size")
    layout = {"FP8": "8-bit floats", "FP8_PER_CHANNEL_PER_TOKEN": "8-bit floats", "NVFP4": "4-bit floats",
              "W4A16_NVFP4": "4-bit floats", "W4A16_AWQ": "modelopt integers"}.get(algorithm)  # fmt: skip
    if layout is None:
        raise UnreadableError(f"{path}: ModelOpt's quant_algo {algorithm!r} is not read here")
    return Layer(layout=layout, bits=8 if layout == "8-bit floats" else 4, block=(1, size))


METHODS: dict[str, Callable[[str, Config], Layer | None]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "modelopt": _modelopt,
}
