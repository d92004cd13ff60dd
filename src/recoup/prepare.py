"""The door in: which module gets which numbers (`resolve`), and the modules that carry them (`prepare`).

`resolve` accounts for every parameter before anything is touched: quantized, kept and why, or an error
(`explain.py` prints that account). `prepare` carries it out, in place.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from recoup.nn import (
    HEADS,
    QUANT_MODULES,
    Codes,
    FakeQuantizer,
    caching,
    check_shape,
    check_surroundings,
    check_tied,
    device_of,
    is_prepared,
    kept_by_type,
    leaves_of,
    no_form,
    quant_type,
    quantize_cache,
    quantize_output,
    quantizers_of,
    refuse_peft,
    routers,
    shared_parameters,
    tied_weights,
    type_name,
    unasked_layers,
)
from recoup.numerics import QuantSpec, kernels, per_tensor
from recoup.schemes import Plan, Recipe, Rule, Scheme
from recoup.schemes.parse import parse

_log = logging.getLogger("recoup")
# Modules without a quantized form may hold so much of the matrices that are not meant to stay in float.
LEFT_OUT = 0.05
_QUANTIZABLE = (
    f"{', '.join(name.removeprefix('torch.') for name in QUANT_MODULES)}, subclasses of linear layers and "
    "convolutions, and layers of experts, with weights of their own"
)


def resolve(model: nn.Module, recipe: Recipe | Scheme | str) -> Plan:
    """Decide for every parameter what becomes of it.

    In this order: the first rule that matches decides; tied parameters, heads, routers, embeddings and norms
    are kept; every other module with a quantized form gets the recipe's scheme. A rule matches a module by
    its name or by that of a module around it; the model itself has no name, so its own parameters are
    matched by theirs. Modules that share one weight share its numbers: rules quantize all of them, with the
    same weights and whatever inputs, or none. Never changes the model.

    Args:
        model: a float model.
        recipe: or a scheme, or a scheme's name.

    Raises:
        ValueError: a rule that matches nothing, or gives a scheme to nothing that can have one; a layer that
            its groups do not divide, or whose inputs cannot have the scheme's; tied weights that are not
            quantized alike, or that the recipe wants untied; too many parameters in modules that have no
            quantized form, and no rule that keeps them; nothing to quantize; layers of PEFT's; a name in
            `outputs` that is no module's, or a scheme whose inputs have no numbers for them; a KV cache that
            the model has not, or that cannot be reached.

    >>> import torch
    >>> resolve(torch.nn.Sequential(torch.nn.Linear(32, 4)), "w4a16").modules
    {'0': 'w4a16'}
    """
    if not isinstance(recipe, Recipe):
        recipe = parse(Recipe, {"scheme": recipe}, "resolve")
    refuse_peft(model)
    if any(isinstance(module, (FakeQuantizer, Codes)) for module in model.modules()):
        raise ValueError("the model is prepared already; resolve looks at the float model")
    if recipe.untie and (together := shared_parameters(model)):
        first, other, *_ = together[0]
        raise ValueError(
            f"untie: asked, and {other} is still tied to {first}; call recoup.transforms.untie(model) first"
        )
    tied, choosing, unasked = tied_weights(model), routers(model), unasked_layers(model)
    _every_rule_matches(model, recipe.rules, unasked)

    schemes: dict[str, Scheme] = {}
    modules: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, module in model.named_modules():
        for parameter, tensor in module.named_parameters(recurse=False):
            path = f"{name}.{parameter}".lstrip(".")
            decision = _decide(name or parameter, module, parameter, recipe, tied, choosing, unasked)
            if isinstance(decision, str):
                kept[path] = decision
            elif parameter not in leaves_of(module):
                is_bias = tensor.ndim < 2 or "bias" in parameter
                kept[path] = "bias" if is_bias else kept_by_type(module, parameter)
            else:
                check_shape(name, module, decision)
                if schemes.setdefault(decision.name, decision) != decision:
                    raise ValueError(
                        f"two different schemes are called {decision.name!r}; give them two names"
                    )
                modules[name] = decision.name
    outputs = _outputs(model, recipe)
    caches = () if recipe.kv is None else tuple(caching(model))
    plan = Plan(schemes=schemes, modules=modules, kept=kept, outputs=outputs, kv=recipe.kv, caches=caches)
    check_tied(model, plan)
    _little_is_left_out(model, kept)
    if not modules:
        raise ValueError(
            "nothing to quantize: "
            + (f"every module is kept ({_reasons(kept)})" if kept else "no parameters")
        )
    return plan


def prepare(model: nn.Module, plan: Plan, *, impl: kernels.Choice = "auto") -> nn.Module:
    """Put the quantized twins in place of the modules that the plan names; in place, returns the model.

    Weights are calibrated by min and max at once; inputs with static ranges, and keys and values, wait for
    `calibrate`.
    Parameters are shared with the float modules, never copied, so an optimizer made earlier still trains
    them; modules with one weight get one quantizer for it, whose learned scales train once. To resume,
    prepare a fresh model and `load_state_dict` strictly.

    Args:
        model: a float model.
        plan: what `resolve` found for it.
        impl: how fake quantization is computed; the values are the same to the bit. "reference" is the
            specification in eager torch; "fused" keeps a byte for a value, in torch's own operations;
            "compiled" has kernels made for it, by a C++ compiler or Triton. "auto" chooses, and logs which
            and why (logger "recoup", level INFO).

    Raises:
        ValueError: the plan names a module that the model lacks or that is prepared already, does not fit
            the model, a weight is not finite, torch would run the layer around a module without asking it,
            or compiled kernels are asked where they cannot be made; the model is then as it was.
    """
    refuse_peft(model)
    modules = dict(model.named_modules())
    check_surroundings(modules, plan)
    chosen = _chosen(impl, [modules[name] for name in plan.modules if name in modules])
    for name in plan.outputs:
        if name not in modules:
            raise ValueError(f"outputs: the model has no module {name!r}; resolve the plan for this model")
    twins: dict[nn.Module, nn.Module] = {}
    quantizers: dict[Tensor, FakeQuantizer] = {}
    for name in plan.modules:
        module = modules.get(name)
        if module is None:
            raise ValueError(
                f"the plan quantizes {name!r}, which the model has not; resolve it for this model"
            )
        twin = quant_type(module)
        if twin is None:
            raise ValueError(f"{name}: a {type_name(module)} has no quantized form, or is prepared already")
        check_shape(name, module, plan[name])
        prepared = twins[module] = twin.from_float(module, plan[name], name)
        assert is_prepared(prepared)
        for leaf, quantizer in quantizers_of(prepared).items():
            shared = quantizers.setdefault(getattr(prepared, leaf), quantizer)
            setattr(prepared, f"{leaf}_quantizer", shared)
    check_tied(model, plan)
    if plan.kv is not None and (missing := set(plan.caches) - set(caching(model))):
        raise ValueError(
            f"the plan quantizes keys and values of {min(missing)!r}, which keeps none in this model; "
            "resolve it for this model"
        )
    if model in twins:
        raise ValueError("the model is itself the only layer; wrap it, as in nn.Sequential(model)")
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in twins:
            model.set_submodule(name, twins[module])
    for name, spec in plan.outputs.items():
        quantizer = FakeQuantizer(spec, rows=None, columns=None)
        quantizer.path = f"{name}.output"
        quantize_output(model.get_submodule(name), quantizer.to(device_of(model)))
    if plan.kv is not None:
        quantize_cache(model, plan.kv, plan.caches)
    for quantizer in model.modules():
        if isinstance(quantizer, FakeQuantizer):
            quantizer.impl = chosen
    return model


def _chosen(asked: kernels.Choice, modules: list[nn.Module]) -> kernels.Impl:
    """The implementation for these modules' weights, logged with the reason."""
    found = (getattr(module, leaf, None) for module in modules for leaf in leaves_of(module))
    weights = {weight for weight in found if isinstance(weight, Tensor)}
    device = next(iter(weights)).device if weights else torch.device("cpu")
    chosen, why = kernels.choose(asked, device, sum(weight.numel() for weight in weights))
    _log.info("fake quantization: %s (%s)", chosen, why)
    return chosen


def _outputs(model: nn.Module, recipe: Recipe) -> dict[str, QuantSpec]:
    """The modules whose outputs are quantized: as the recipe's scheme quantizes inputs."""
    names, spec = [name for name, _ in model.named_modules() if name], recipe.scheme.inputs
    for pattern in recipe.outputs:
        if not any(fnmatchcase(name, pattern) for name in names):
            nearest = get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ValueError(
                f"outputs: {pattern!r} matches no module; did you mean {', '.join(nearest) or names[0]}?"
            )
    if not recipe.outputs:
        return {}
    if spec is None or spec.ranges == "dynamic" or spec.granularity != per_tensor:
        raise ValueError(
            f"outputs: they are quantized as scheme {recipe.scheme.name!r} quantizes inputs, and that is not "
            "static per tensor; use w8a8-static, w7a8-ort-static or fp8-static"
        )
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in recipe.outputs)]
    for name in found:
        if isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict):
            raise ValueError(f"outputs: {name} is a list of modules and returns nothing; name those in it")
    return dict.fromkeys(found, spec)


def _decide(
    name: str,
    module: nn.Module,
    parameter: str,
    recipe: Recipe,
    tied: dict[str, list[str]],
    choosing: set[str],
    unasked: dict[str, str],
) -> Scheme | str:
    """The scheme of a module, or the reason why its parameters are kept."""
    kind = quant_type(module)
    rule = next((rule for rule in recipe.rules if _matches(rule, name)), None)
    if rule is not None and rule.scheme is None:
        return f"rule {rule.match!r}"
    in_router = not choosing.isdisjoint(_with_parents(name))
    if in_router and (kind is None or rule is None):
        return "router, kept unless a rule names it" if rule is None else f"router, and {no_form(module)}"
    if kind is None:
        return kept_by_type(module, parameter)
    if rule is None:
        if name in tied:
            return f"tied to {tied[name][0]}"
        if kind.inputs_are == "ids":
            return "embedding, kept unless a rule names it"
        if name.rpartition(".")[2] in HEADS:
            return "head, kept unless a rule names it"
        if kind.inputs_are == "unseen" and recipe.scheme.inputs is not None:
            return f"{no_form(module)} with inputs"
    if name in unasked:
        return f"no quantized form of the {unasked[name]} around it, which reads its weight"
    return _with_ranges(recipe.scheme if rule is None or rule.scheme is None else rule.scheme, recipe)


def _with_ranges(scheme: Scheme, recipe: Recipe) -> Scheme:
    if recipe.weight_ranges is None:
        return scheme
    return replace(scheme, weights=replace(scheme.weights, ranges=recipe.weight_ranges))


def _matches(rule: Rule, name: str) -> bool:
    return any(fnmatchcase(path, rule.match) for path in _with_parents(name))


def _with_parents(name: str) -> list[str]:
    """The names of the modules around it, outermost first, and its own."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _every_rule_matches(model: nn.Module, rules: tuple[Rule, ...], unasked: dict[str, str]) -> None:
    owners = {
        name or parameter: module
        for name, module in model.named_modules()
        for parameter, _ in module.named_parameters(recurse=False)
    }
    for rule in rules:
        matched = [name for name in owners if _matches(rule, name)]
        if not matched:
            nearest = get_close_matches(rule.match, owners, n=3, cutoff=0.3)
            named = f"modules are named as {next(iter(owners), '')!r}"
            hint = f"did you mean {', '.join(nearest)}?" if nearest else named
            raise ValueError(f"rule {rule.match!r} matches no module; {hint}")
        if rule.scheme is not None and unasked.keys() >= set(matched):
            raise ValueError(
                f"rule {rule.match!r} matches only {', '.join(_first(matched, 3))}, whose weight the "
                f"{unasked[matched[0]]} around it reads, so no quantizer would be asked; leave the rule out"
            )
        if rule.scheme is not None and not any(quant_type(owners[name]) for name in matched):
            kinds = sorted({type_name(owners[name]) for name in matched})
            raise ValueError(
                f"rule {rule.match!r} matches only modules without a quantized form: {', '.join(kinds)}; "
                f"there is one of {_QUANTIZABLE}"
            )


def _little_is_left_out(model: nn.Module, kept: dict[str, str]) -> None:
    matrices = {path: parameter for path, parameter in model.named_parameters() if parameter.ndim >= 2}
    left_out = {
        path: parameter
        for path, parameter in matrices.items()
        if kept.get(path, "").startswith(("no quantized form", "norm"))
    }
    left = sum(parameter.numel() for parameter in left_out.values())
    share = left / max(1, left + sum(matrices[path].numel() for path in matrices.keys() - kept.keys()))
    if share > LEFT_OUT:
        by_size = sorted(left_out, key=lambda path: -left_out[path].numel())
        named = [f"{path} ({' x '.join(map(str, left_out[path].shape))}, {kept[path]})" for path in by_size]
        module = by_size[0].rpartition(".")[0] or by_size[0]
        raise ValueError(
            f"{share:.0%} of the matrices would stay in float: {'; '.join(_first(named, 3))}. "
            f"Keep them knowingly with rules such as {{match: {module}, scheme: none}}; "
            f"quantized can be {_QUANTIZABLE}"
        )


def _first(items: list[str], count: int) -> Iterator[str]:
    yield from items[:count]
    if len(items) > count:
        yield f"and {len(items) - count} more"


def _reasons(kept: dict[str, str]) -> str:
    return ", ".join(sorted(set(kept.values())))
