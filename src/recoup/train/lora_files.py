"""Adapters in PEFT's files: what it saved is read, and it reads what is written here.

`adapter_model.safetensors` holds `base_model.model.<layer>.lora_A.weight` and `lora_B.weight`,
`adapter_config.json` r, lora_alpha, target_modules and the rest by PEFT's names.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from recoup.engines.safetensors_file import read_safetensors
from recoup.nn import QuantConv1D
from recoup.train.lora import adapted, add_lora

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What says nothing of the adapters' values, or is read here; anything else has to be as good as absent.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora"}
_NEUTRAL = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "auto_mapping",
    "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out", "peft_version",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian")}


def save_lora(model: nn.Module, folder: str | Path) -> None:
    """Write a model's adapters as PEFT does. Never changes the model, and writes none of its own weights.

    Args:
        model: with adapters.
        folder: must not exist, or be empty.

    Raises:
        ValueError: the model has no adapters, or the folder is not empty.
        OSError: the folder cannot be written; nothing of it is left.
    """
    layers, folder = adapted(model), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; choose another folder, or remove it")
    adapters = {name: lora for name, module in layers.items() if (lora := module.lora) is not None}
    settings = next(iter(adapters.values())).settings
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": _targets(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": all(isinstance(module, QuantConv1D) for module in layers.values()),
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": factor.detach().cpu().contiguous()
        for name, lora in adapters.items()
        for letter, factor in (("A", lora.A), ("B", lora.B))
    }
    files = folder / TENSORS, folder / CONFIG
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, files[0], metadata={"format": "pt"})
        files[1].write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    except (OSError, SafetensorError) as error:
        for file in files if folder.is_dir() else ():
            file.unlink(missing_ok=True)
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise OSError(f"{folder}: cannot be written ({reason}); nothing of it is left") from None


@torch.no_grad()
def load_lora(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give a prepared model the adapters of a folder, as `add_lora` would; in place, returns the model.

    Args:
        model: prepared, in float32, without adapters.
        folder: that `save_lora` or PEFT wrote: plain LoRA of linear layers, as safetensors.

    Raises:
        ValueError: adapters of another kind, or for another model; a file that is damaged; see `add_lora`.
        OSError: a file cannot be read.
    """
    file, config = Path(folder) / TENSORS, _config(Path(folder) / CONFIG)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_safetensors(file).items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise ValueError(
                f"{file}: {key} is no factor of plain LoRA; save adapters of linear layers alone"
            )
        factors.setdefault(found[1], {})[found[2]] = tensor
    modules = dict(model.named_modules())
    for name, pair in factors.items():
        if name not in modules:
            raise ValueError(f"{file}: has an adapter for {name}, which this model has not")
        weight = getattr(modules[name], "weight", None)
        rows, columns = weight.shape if isinstance(weight, Tensor) and weight.ndim == 2 else (0, 0)
        if isinstance(modules[name], QuantConv1D):
            rows, columns = columns, rows
        wanted = {"A": (config["r"], columns), "B": (rows, config["r"])}
        if {letter: tuple(factor.shape) for letter, factor in pair.items()} != wanted:
            shapes = {f"lora_{letter}": tuple(factor.shape) for letter, factor in pair.items()}
            raise ValueError(
                f"{file}: {name} has {shapes}, but rank {config['r']} makes it lora_A {wanted['A']} and "
                f"lora_B {wanted['B']} in this model"
            )
    add_lora(
        model,
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets="|".join(map(re.escape, factors)),
        dropout=config.get("lora_dropout", 0.0),
        rslora=config.get("use_rslora", False),
    )
    for name, module in adapted(model).items():
        assert module.lora is not None
        module.lora.A.copy_(factors[name]["A"])
        module.lora.B.copy_(factors[name]["B"])
    return model


def _config(file: Path) -> dict[str, Any]:
    """A configuration of plain LoRA."""
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); write or fetch it again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: no configuration of LoRA; load_lora reads PEFT's adapters of that type")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise ValueError(f"{file}: {key}: {config.get(key)!r} found; it is a number above 0")
    for key, value in config.items():
        plain = value in _PLAIN[key] if key in _PLAIN else key in _READ | _NEUTRAL or not value
        if not plain:
            raise ValueError(
                f"{file}: {key} is {value!r}; only plain LoRA is read: merge these adapters with PEFT, and "
                "prepare the merged model"
            )
    return config


def _targets(model: nn.Module, layers: list[str]) -> list[str] | str:
    """Names as PEFT compares them, by their ends; a regular expression where one is the end of another's."""
    others = [name for name, _ in model.named_modules() if name not in layers]
    if any(other.endswith(f".{name}") for name in layers for other in others):
        return "|".join(map(re.escape, layers))
    return layers
