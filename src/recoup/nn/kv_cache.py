"""Keys and values as the engine's cache holds them.

An engine writes keys, after their rotation, and values into its cache as codes, and attention reads them
back. So the fake quantizer stands where attention reads them: between a transformers model's attention module
and the function that computes the product, through transformers' own table of such functions. The module and
its code stay as they are; what is new is two quantizers in it, `key_quantizer` and `value_quantizer`, and the
name of the function in the config: "recoup_sdpa" fake-quantizes keys and values and calls "sdpa".

With one static scale, codes do not depend on how often or with what others a key is read: it is the same
whether it is rounded when it is written (the engine) or when it is read (here).
"""

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.numerics import QuantSpec

_PREFIX = "recoup_"
_PROJECTIONS = (("k_proj", "v_proj"), ("qkv_proj",))
_FUNCTIONS = ("eager", "sdpa")  # those that get keys and values as (samples, heads, tokens, features)


def caching(model: nn.Module) -> list[str]:
    """The attention modules that keep keys and values from one call to the next, by name.

    Raises:
        ValueError: there are none, or some keep something else or are not computed through transformers'
            table; says which.
    """
    if not getattr(model, "can_generate", bool)():
        raise ValueError(
            f"kv: a {type(model).__qualname__} is no transformers model that generates text, so it has no KV "
            "cache; leave kv out"
        )
    found = {
        name: module
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__
        and {"past_key_values", "past_key_value"} & set(inspect.signature(module.forward).parameters)
    }
    if not found or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"kv: {type(model).__qualname__} has no attention whose keys and values are those of its own "
            "past; leave kv out"
        )
    for name, attention in found.items():
        _fits(name, attention)
    return list(found)


def _fits(name: str, attention: nn.Module) -> None:
    kind = type(attention).__qualname__
    if not any(all(hasattr(attention, part) for part in parts) for parts in _PROJECTIONS):
        raise ValueError(
            f"{name}: a {kind} has no k_proj and v_proj, nor qkv_proj, by which engines find the scales of "
            "its keys and values; leave kv out"
        )
    if getattr(attention, "is_kv_shared_layer", False):
        raise ValueError(f"{name}: a {kind} reads the cache of another layer; leave kv out")
    if _table(attention) is None:
        raise ValueError(
            f"{name}: a {kind} does not compute attention through transformers' ALL_ATTENTION_FUNCTIONS, so "
            "its keys and values cannot be reached; leave kv out"
        )
    function = _function(attention.config)
    if function not in _FUNCTIONS:
        raise ValueError(
            f"{name}: attention is computed by {function!r}, which may lay out keys in another way; load the "
            "model with attn_implementation='sdpa' or 'eager'"
        )


def quantize_cache(model: nn.Module, spec: QuantSpec, names: Iterable[str]) -> list[FakeQuantizer]:
    """Put a quantizer of keys and one of values into each of these modules; in place, returns them.

    Args:
        model: float or prepared; its class is transformers'.
        spec: static or learned, per tensor.
        names: from `caching`.
    """
    made: list[FakeQuantizer] = []
    for name in names:
        attention: Any = model.get_submodule(name)
        device = next(attention.parameters()).device
        for kind in ("key", "value"):
            quantizer = FakeQuantizer(spec, rows=None, columns=None).to(device)
            quantizer.path = f"{name}.{kind}"
            attention.add_module(f"{kind}_quantizer", quantizer)
            made.append(quantizer)
        attention.config._attn_implementation = _registered(attention)
    return made


def cache_quantizers(model: nn.Module) -> dict[str, tuple[FakeQuantizer, FakeQuantizer]]:
    """The quantizers of keys and of values, by the name of their attention module."""
    return {
        name: (key, value)
        for name, module in model.named_modules()
        if isinstance(key := getattr(module, "key_quantizer", None), FakeQuantizer)
        and isinstance(value := getattr(module, "value_quantizer", None), FakeQuantizer)
    }


def _registered(attention: Any) -> str:
    """The name under which the function that quantizes first is in transformers' tables.

    A module without quantizers, as in a second model of the same config, is computed as ever.
    """
    original = _function(attention.config)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(module, "key_quantizer", None), FakeQuantizer):
            key, value = module.key_quantizer(key), module.value_quantizer(value)
        return _computing(module, original)(module, query, key, value, *args, **kwargs)

    masks = sys.modules["transformers.masking_utils"].ALL_MASK_ATTENTION_FUNCTIONS
    name, table = f"{_PREFIX}{original}", _table(attention)
    assert table is not None, "`caching` refuses it"
    table.register(name, attend)
    masks.register(name, masks[original])
    return name


def _computing(attention: nn.Module, name: str) -> Callable[..., Any]:
    """The function of that name; each modeling file has an eager one of its own."""
    if name != "eager":
        return _table(attention)[name]
    return next(
        vars(module)["eager_attention_forward"]
        for module in _files(attention)
        if "eager_attention_forward" in vars(module)
    )


def _table(attention: nn.Module) -> Any:
    """The table of attention functions, as the modeling file has it; None where it has none.

    Taken from there, because nothing in this room imports transformers.
    """
    tables = [vars(module).get("ALL_ATTENTION_FUNCTIONS") for module in _files(attention)]
    return next((table for table in tables if table is not None), None)


def _files(attention: nn.Module) -> list[Any]:
    """The modules of Python in which the attention's class and those it is made of are written."""
    return [sys.modules[cls.__module__] for cls in type(attention).__mro__]


def _function(config: Any) -> str:
    return str(config._attn_implementation).removeprefix(_PREFIX)
