"""The twins of nn.LSTM and nn.GRU: every matrix of every layer and direction is a weight of its own.

torch computes all steps in one function that takes a list of weights, so the twin hands it rounded ones.
Inside of that the state goes from step to step, and nothing can round it there: schemes that quantize inputs
are refused.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.nn.twin import Inputs, Weight, adopt, stack_quantizer
from recoup.schemes import Scheme

_Base = nn.RNNBase if TYPE_CHECKING else object


class Rounded(_Base):
    """An nn.LSTM or nn.GRU that computes with other weights than it holds."""

    def rounded(self, name: str) -> Tensor:
        """What it computes with in place of the weight or bias of this name."""
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None) -> Any:  # noqa: A002 (torch's name)
        """The equations of torch, with rounded weights."""
        self._update_flat_weights()  # before, because torch's own forward looks for replaced Parameters too
        held = self._flat_weights
        self._flat_weights = [self.rounded(name) for name in self._flat_weights_names]
        try:
            return super().forward(input, hx)
        finally:
            self._flat_weights = held


class QuantRecurrent(Rounded):
    """Of float weights and their quantizers."""

    inputs_are: ClassVar[Inputs] = "steps"
    scheme: Scheme

    @classmethod
    def from_float(cls, module: nn.RNNBase, scheme: Scheme, path: str) -> Self:
        """The twin of a float module; it shares every Parameter. See `QuantLinear.from_float`."""
        twin = adopt(cls, module, path)
        twin.scheme = scheme
        for name in cls.names(module):
            twin.add_module(
                f"{name}_quantizer", stack_quantizer(cls.view(module, name), scheme, f"{path}.{name}")
            )
        return twin

    @staticmethod
    def names(module: nn.RNNBase) -> tuple[str, ...]:
        """Of the matrices for inputs, states and projections, layer by layer."""
        return tuple(name for name in module._flat_weights_names if name.startswith("weight"))

    @staticmethod
    def view(module: nn.RNNBase, name: str) -> Weight:
        """The weight itself: the rows of its gates, one below the other."""
        weight: Tensor = getattr(module, name)
        return Weight(matrix=weight, rows=weight.shape[0])

    @staticmethod
    def check(module: nn.RNNBase, scheme: Scheme, path: str) -> None:
        """Can it have this scheme?

        Raises:
            ValueError: the scheme quantizes inputs.
        """
        if scheme.inputs is not None:
            raise ValueError(
                f"{path}: {scheme.name!r} quantizes inputs, and the state of an nn.{type(module).__name__} "
                "stays in float from step to step; use w8a16 or w4a16, or keep it in float"
            )

    def rounded(self, name: str) -> Tensor:
        """The weight on its lattice; a bias as it is."""
        quantizer: FakeQuantizer | None = getattr(self, f"{name}_quantizer", None)
        stored: Tensor = getattr(self, name)
        return stored if quantizer is None else quantizer(stored)


class QuantLSTM(QuantRecurrent, nn.LSTM):
    """nn.LSTM's equations with Q(W)."""


class QuantGRU(QuantRecurrent, nn.GRU):
    """nn.GRU's equations with Q(W)."""
