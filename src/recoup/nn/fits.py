"""Does a float module take a scheme, and is it asked by the modules around it? Known before work."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from recoup.nn.experts import is_experts
from recoup.nn.modules import quant_type
from recoup.nn.twin import has_several, weight_names, weight_of
from recoup.numerics import per_tensor
from recoup.schemes import Plan, Scheme

# The last layer, by the names that libraries give it: most sensitive, and least worth quantizing.
HEADS = frozenset(
    {
        "lm_head", "head", "classifier", "score", "cls", "qa_outputs", "embed_out", "output_projection",
        "codebooks_head", "ctc_head",
    }
)  # fmt: skip


def check_shape(name: str, module: nn.Module, scheme: Scheme) -> None:
    """Do the shapes of a float module's weights and inputs take this scheme?

    Raises:
        ValueError: they do not; names the module.
    """
    kind = quant_type(module)
    assert kind is not None
    inputs = scheme.inputs
    if inputs is not None and kind.inputs_are == "ids":
        raise ValueError(
            f"{name}: {scheme.name!r} quantizes inputs, but an embedding's are ids; use w8a16 or w4a16"
        )
    if inputs is not None and kind.inputs_are == "channels" and inputs.granularity != per_tensor:
        raise ValueError(
            f"{name}: {scheme.name!r} has input scales per {inputs.granularity}, but a convolution's input "
            "has one for all; use w8a8-static, w8a8-ort, w8a8-ort-static or a weight-only scheme"
        )
    if has_several(kind):
        kind.check(module, scheme, name)
    for leaf in weight_names(kind, module):
        rows, columns = weight_of(kind, module, leaf).shape
        try:
            scheme.weights.granularity.scale_shape(rows, columns)
            if inputs is not None and kind.inputs_are in ("tokens", "routed"):
                inputs.granularity.scale_shape(1, columns)
        except ValueError as error:
            path = f"{name}.{leaf}" if has_several(kind) else name
            raise ValueError(f"{path}: {error}") from None


def check_surroundings(modules: dict[str, nn.Module], plan: Plan) -> None:
    """Would a module around a quantized one compute with its float weights, without asking it?

    Args:
        modules: of the float model, by name.
        plan: what is quantized of them.

    Raises:
        ValueError: one would; names it.
    """
    for name, module in modules.items():
        within = [quantized for quantized in plan.modules if quantized.startswith(f"{name}.")]
        if within and torch.backends.mha.get_fastpath_enabled():
            _kernels_of_layers_are_off(name, module, within, plan)
        if (
            isinstance(module, nn.MultiheadAttention)
            and name not in plan.modules
            and f"{name}.out_proj" in plan.modules
        ):
            raise ValueError(
                f"{name}.out_proj: the {type(module).__name__} around it stays in float and reads its weight "
                f"without asking it; quantize both, or none with {{match: {name}, scheme: none}}"
            )
        children = (
            f"{name}.{child}".lstrip(".") for child, held in module.named_children() if is_experts(held)
        )
        experts = next((child for child in children if child in plan.modules), None)
        if experts is not None and "forward" in vars(module):
            raise ValueError(
                f"{name}: its forward was replaced on the instance, as use_kernels=True does, and may "
                f"compute with the float weights of {experts}; load the model without it"
            )


def _kernels_of_layers_are_off(name: str, module: nn.Module, within: list[str], plan: Plan) -> None:
    """Without gradients, torch's encoder hands the weights of its layers to one kernel.

    Raises:
        ValueError: it would, those of quantized layers.
    """
    if isinstance(module, nn.TransformerEncoderLayer) and f"{name}.self_attn" not in plan.modules:
        raise ValueError(  # attention that is quantized keeps its layer from it
            f"{name}: nn.TransformerEncoderLayer runs {within[0]} with its float weight in evaluation; "
            "call torch.backends.mha.set_fastpath_enabled(False) first"
        )
    if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
        raise ValueError(
            f"{name}: nn.TransformerEncoder packs its inputs for a kernel that takes float weights; build it "
            f"with enable_nested_tensor=False, or set {name}.use_nested_tensor = False first"
        )


def kept_by_type(module: nn.Module, parameter: str) -> str:
    """Why the parameter of that name of a module without a quantized form stays in float."""
    name = type(module).__name__.lower()
    if isinstance(module, nn.Embedding) or "embedding" in name or "embed" in parameter:
        return f"embedding, and {no_form(module)}"
    return "norm" if "norm" in name else no_form(module)


def no_form(module: nn.Module) -> str:
    """That nothing here quantizes modules of this type, or not before weight norm is folded."""
    if normed_weights(module) or _is_weight_norm(module):
        return f"no quantized form of {type_name(module)}, before recoup.transforms.fold_weight_norm"
    return f"no quantized form of {type_name(module)}"


def normed_weights(module: nn.Module) -> dict[str, list[Tensor]]:
    """What weight norm computes a module's tensors of, as a parametrization or in a hook, by their names."""
    found = {
        name: list(parts.parameters())
        for name, parts in vars(module)["_modules"].get("parametrizations", nn.ModuleDict()).items()
        if _is_weight_norm(parts)
    }
    for hook in vars(module)["_forward_pre_hooks"].values():
        if isinstance(hook, WeightNorm):
            found[hook.name] = [getattr(module, f"{hook.name}_{part}") for part in "gv"]
    return found


def _is_weight_norm(module: nn.Module) -> bool:
    """A list of parametrizations that are weight norm, and nothing else."""
    return isinstance(module, ParametrizationList) and all(isinstance(held, _WeightNorm) for held in module)


def type_name(module: nn.Module) -> str:
    """Of a module, as one imports it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
