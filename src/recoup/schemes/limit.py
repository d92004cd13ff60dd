"""A limit of a gate: "2%" of the baseline, or an absolute change. Never a bare number."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator


class Limit(BaseModel):
    """How much a metric may move away from the baseline: by a share of it, or by an amount.

    Exactly one of the two is set. Written as "2%" or as {absolute: 0.5}.

    >>> Limit.model_validate("2%").allowed(baseline=50.0)
    1.0
    >>> str(Limit.model_validate({"absolute": 0.5}))
    '0.5'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    relative: float | None = Field(default=None, ge=0)
    absolute: float | None = Field(default=None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, (int, float)):
            raise ValueError(
                f'a limit is "{value}%" (of the baseline) or {{absolute: {value}}}, not a bare number'
            )
        if not isinstance(value, str):
            return value
        try:
            return {
                "relative": float(value.strip().removesuffix("%"))
                / (100 if value.strip().endswith("%") else 0)
            }
        except (ValueError, ZeroDivisionError):
            raise ValueError(f'{value!r} is not a limit; write "2%" or {{absolute: 0.5}}') from None

    @model_validator(mode="after")
    def _one(self) -> "Limit":
        if (self.relative is None) == (self.absolute is None):
            raise ValueError('a limit is either relative ("2%") or {absolute: 0.5}')
        return self

    def allowed(self, baseline: float) -> float:
        """The largest move that is allowed, in the units of the metric."""
        return abs(baseline) * self.relative if self.relative is not None else self.absolute or 0.0

    @model_serializer
    def _as_written(self) -> Any:
        return {"absolute": self.absolute} if self.relative is None else str(self)

    def __str__(self) -> str:
        return f"{self.absolute:.10g}" if self.relative is None else f"{100 * self.relative:.10g}%"
