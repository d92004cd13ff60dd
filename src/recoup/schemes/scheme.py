"""A scheme: the numbers of one module."""

from dataclasses import dataclass

from pydantic import with_config

from recoup.numerics import (
    FLOAT32,
    FixedFormat,
    FloatFormat,
    Granularity,
    IntFormat,
    LevelFormat,
    PowerOfTwo,
    QuantSpec,
    StretchedFormat,
    per_channel,
)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one module's tensors are quantized.

    Args:
        name: how plans and reports call it; a preset's name, or one of your own.
        weights: the spec of the weight's 2-D view, (output features, input features).
        inputs: the spec of the input's 2-D view, (tokens, features); None leaves it in float.
        integer_bias: the bias lies on the grid of the products, as an int32 at the input's scale times the
            weight's: what integer kernels add to their sums. Otherwise it stays in float.

    Raises:
        ValueError: specs that no module can carry.
    """

    name: str
    weights: QuantSpec
    inputs: QuantSpec | None = None
    integer_bias: bool = False

    def __post_init__(self) -> None:
        if (
            self.inputs is not None
            and self.inputs.ranges != "dynamic"
            and self.inputs.granularity.rows is not None
        ):
            raise ValueError(
                f"scheme {self.name!r}: {self.inputs.ranges} input ranges cannot have scales per token; "
                f"use per_tensor, or dynamic ranges"
            )
        if self.integer_bias and not (
            isinstance(self.weights.format, IntFormat)
            and self.weights.granularity == per_channel
            and self.weights.symmetric
            and self.inputs is not None
            and isinstance(self.inputs.format, IntFormat)
            and self.inputs.ranges != "dynamic"
        ):
            raise ValueError(
                f"scheme {self.name!r}: integer_bias asked, and there is no one step of the products; use "
                "symmetric integer weights per_channel, and static or learned integer inputs"
            )

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Stored bits per weight of a (rows, columns) view, all scales and zero points included."""
        per_scale = self.weights.granularity.elements_per_scale(rows, columns)
        per_tensor = FLOAT32.bits * self.weights.global_scale
        return (
            self.weights.format.bits + self.weights.bits_per_scale / per_scale + per_tensor / (rows * columns)
        )


# A misspelt key in a recipe is an error, and never one format taken for another.
for noun in (
    *(IntFormat, FixedFormat, FloatFormat, LevelFormat, StretchedFormat, PowerOfTwo),
    *(Granularity, QuantSpec, Scheme),
):
    with_config(extra="forbid")(noun)
