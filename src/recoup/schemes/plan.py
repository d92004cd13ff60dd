"""A plan: which module gets which scheme, and why every other parameter is left alone. Data, as JSON."""

from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from recoup.numerics import QuantSpec
from recoup.schemes.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every parameter of a model, accounted for.

    Args:
        schemes: the schemes in use, by name.
        modules: the name of the scheme of every quantized module.
        kept: the reason for every parameter that stays in float.
        outputs: the spec of every module whose output is quantized, with a weight or without.
        kv: the spec of keys and values in the KV cache; None leaves them in float.
        caches: the attention modules that keep them so.

    Raises:
        ValueError: a module has a scheme that is not among `schemes`, or `kv` and `caches` do not belong
            together.
    """

    schemes: dict[str, Scheme] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, QuantSpec] = field(default_factory=dict)
    kv: QuantSpec | None = None
    caches: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for module, name in self.modules.items():
            if name not in self.schemes:
                raise ValueError(f"{module}: no scheme {name!r} among the plan's: {', '.join(self.schemes)}")

        if (self.kv is None) != (not self.caches):
            raise ValueError(f"kv is {self.kv}, and {len(self.caches)} attention modules have it; give both")

    def __getitem__(self, module: str) -> Scheme:
        return self.schemes[self.modules[module]]

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` makes an equal plan."""
        return _ADAPTER.dump_python(self, mode="json")

    @classmethod
    def from_json(cls, data: Any) -> "Plan":
        """The plan in `data`.

        Raises:
            ValueError: it is not a plan.
        """
        try:
            return _ADAPTER.validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"not a plan: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


_ADAPTER = TypeAdapter(Plan)
