"""Layers of experts as checkpoints have them: a Linear for each matrix of each expert.

transformers makes the stacks of a layer of experts from such a checkpoint, and makes it from them again when
it saves. How, its own tables say (`conversion_mapping.py`), and `places` asks them: with stacks in which
every number says where it lies. What is not cut into plain matrices, as GPT-OSS's stacks, has no places.

compressed-tensors quantizes Linears. transformers' own loader of a quantized folder decodes the experts'
weights into stacks, without their inputs, and only some formats; `load_as_linears` gives the library Linears.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recoup.engines.safetensors_file import Shards
from recoup.nn import ExpertsOfLinears, QuantExperts, is_experts

_ROWS, _COLUMNS = 2, 3  # of a matrix that shows where it lies


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a matrix of a checkpoint lies in a layer of experts.

    Args:
        stack: the name of the Parameter.
        expert: which one.
        part: which of the matrices that lie one below the other.
        parts: how many those are.
    """

    stack: str
    expert: int
    part: int
    parts: int


def places(model: nn.Module, path: str, experts: Any) -> dict[str, Place]:
    """Where the matrices of a layer of experts come from, by the names of their Linears in a checkpoint.

    Args:
        model: of transformers.
        path: the name of the layer in it.
        experts: the layer, float or converted.

    Raises:
        ValueError: its checkpoints hold something else than plain matrices without biases.
    """
    from transformers.core_model_loading import revert_weight_conversion

    up, down = QuantExperts.names(experts)
    stacks: dict[str, Tensor] = {}
    lying: dict[int, tuple[Place, Tensor]] = {}
    for name in (up, down):
        parts = 2 if experts.has_gate and name == up else 1
        shape = experts.num_experts, parts, _ROWS, _COLUMNS
        shown = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        shown += sum(stack.numel() for stack in stacks.values())
        stack = shown.flatten(1, 2)
        stacks[f"{path}.{name}"] = stack.transpose(1, 2) if experts.is_transposed else stack
        for expert, matrices in enumerate(shown):
            for part, matrix in enumerate(matrices):
                place = Place(stack=name, expert=expert, part=part, parts=parts)
                lying[int(matrix[0, 0])] = place, matrix
    found: dict[str, Place] = {}
    for key, matrix in revert_weight_conversion(model, stacks).items():  # pyright: ignore[reportArgumentType]
        place, shown = lying.get(int(matrix.flatten()[0]), (None, None))
        if place is not None and shown is not None and torch.equal(matrix, shown) and key.endswith(".weight"):
            found[key.removesuffix(".weight")] = place
    if experts.has_bias or len(found) != len(lying):
        what = "have biases" if experts.has_bias else "are no matrices of their own"
        raise ValueError(
            f"{path}: in checkpoints of {type(model).__name__} experts {what}, and folders hold quantized "
            f"Linears without; keep it with {{match: {path}, scheme: none}}, or take another target"
        )
    return found


def set_linears(
    model: nn.Module, path: str, found: Mapping[str, Place], make: Callable[[str, Place], nn.Module]
) -> None:
    """Put Linears in place of the stacks of a layer of experts, under the names that checkpoints have.

    Args:
        model: of transformers; changed.
        path: the layer.
        found: of `places`.
        make: the module of a name.
    """
    stacks: Any = model.get_submodule(path)
    linears = {name: [[] for _ in range(stacks.num_experts)] for name in QuantExperts.names(stacks)}
    model.set_submodule(path, ExpertsOfLinears(stacks, linears))
    for name, place in sorted(found.items(), key=lambda each: each[1].part):
        linear = make(name, place)
        linears[place.stack][place.expert].append(linear)
        put(model, name, linear)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under a path, with plain modules on the way to it."""
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in dict(model.named_children()):
            model.add_module(name, nn.Module())
        model = model.get_submodule(name)
    model.add_module(leaf, module)


def quantized_experts(kind: Any, folder: Path) -> dict[str, dict[str, Place]]:
    """The layers of experts in a folder where they are quantized, with their places; none elsewhere.

    Args:
        kind: the class of the model.
        folder: with its config and weights.
    """
    config = kind.config_class.from_json_file(folder / "config.json")
    if getattr(config, "quantization_config", None) is None or not _has_scales(Shards(folder)):
        return {}
    with torch.device("meta"):
        model = kind(config)
    layers = {path: module for path, module in model.named_modules() if is_experts(module)}
    return {path: places(model, path, module) for path, module in layers.items()}


def load_as_linears(
    kind: Any, folder: Path, experts: Mapping[str, Mapping[str, Place]]
) -> tuple[nn.Module, dict[str, Any]]:
    """A model in whose layers of experts compressed-tensors computes every Linear, still compressed.

    Args:
        kind: the class of the model.
        folder: with its config and weights.
        experts: of `quantized_experts`.

    Returns:
        The model, and what transformers says of its other tensors.
    """
    config, tensors = kind.config_class.from_json_file(folder / "config.json"), Shards(folder)
    names = {name for found in experts.values() for name in found}
    others = {key: tensors[key] for key in tensors if key.rpartition(".")[0] not in names}
    model, loaded = kind.from_pretrained(
        None,
        config=config,
        state_dict=others,
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
    )
    stacks = {f"{path}.{place.stack}" for path, found in experts.items() for place in found.values()}
    loaded["missing_keys"] = set(loaded["missing_keys"]) - stacks
    root = nn.Module()
    for path, found in experts.items():
        layer = model.get_submodule(path)
        for name, place in found.items():
            rows, columns = QuantExperts.view(layer, place.stack).shape
            put(root, name, nn.Linear(columns, rows // place.parts, bias=False, device="meta"))
    _fill(root, model.hf_quantizer, {key: tensors[key] for key in tensors if key not in others})
    for path, found in experts.items():
        set_linears(model, path, found, lambda name, _: root.get_submodule(name))
    return model, loaded


def _has_scales(tensors: Shards) -> bool:
    return any(".experts." in name and name.endswith(".weight_scale") for name in tensors)


def _fill(root: nn.Module, quantizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Make Linears what compressed-tensors makes of those of any model before it is loaded, and load them."""
    from compressed_tensors.quantization import QuantizationStatus, apply_quantization_config

    compressor = copy.deepcopy(quantizer.compressor)
    compressor.quantization_config.kv_cache_scheme = None  # here is no attention
    compressor.quantization_config.quantization_status = QuantizationStatus.COMPRESSED
    apply_quantization_config(root, compressor.quantization_config, show_progress=False)
    compressor.compress_model(root)
    root.load_state_dict(dict(tensors), assign=True)
