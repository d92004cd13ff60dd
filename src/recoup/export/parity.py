"""What export proves about a written artefact before anyone gets to see it."""

from dataclasses import asdict, dataclass
from typing import Any


class ParityError(RuntimeError):
    """The written artefact is not what was trained. Names the tensor or module; nothing is left on disk."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How closely an engine agrees with the trained model; every figure is from the written bytes.

    Args:
        modules: quantized modules compared.
        codes: codes read back, all equal to the trained ones.
        scales: scales read back, all equal, as are the zero points beside them.
        worst_module: the largest difference of a module's output, as a share of its bound.
        end_to_end: root mean square of the difference of the model's outputs, over that of the outputs.
    """

    modules: int
    codes: int
    scales: int
    worst_module: float
    end_to_end: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.codes:,} codes and {self.scales:,} scales read back equal; {self.modules} modules within "
            f"{self.worst_module:.0%} of their bound; end to end {self.end_to_end:.1e} (relative, RMS)"
        )
