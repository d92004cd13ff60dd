"""Integer weights train with more bits first, and with their own at last (Zhuang et al. 2018).

There (arXiv:1711.00205, "progressive quantization") every training begins with the weights that the one with
more bits left. Each format has a lattice of its own, so at every change its scale, zero point and offset are
chosen anew, from the weight as it is by then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from recoup.calibrate.calibrate import calibrate_weight
from recoup.nn import FakeQuantizer, QuantModule, is_prepared, quantizers_of
from recoup.numerics import IntFormat, QuantSpec
from recoup.schemes.training import TrainSettings

_OBSERVER = "mse"


def check_progressive(model: nn.Module, bits: Sequence[int]) -> None:
    """A prepared model with weights that train with so many bits first; of none, where none are asked.

    Raises:
        ValueError: no weight has integers of fewer bits.
    """
    if bits and not _above(model, bits):
        raise ValueError(
            f"train.progressive {[*bits]} asked, but no weight has integers of fewer than {bits[0]} bits; "
            "leave it out"
        )


class Bits:
    """The bits of integer weights in every step: phases of equal length, the last with their own bits.

    Without `progressive` there is one phase, in which nothing changes.

    Args:
        model: prepared and calibrated.
        settings: `progressive`, `steps` and `start_step`; steps without quantization are in no phase.
    """

    def __init__(self, model: nn.Module, settings: TrainSettings) -> None:
        self.last, self.quantized = settings.steps, settings.steps - settings.start_step
        self.phases = (*_above(model, settings.progressive), 0)
        self.weights = _integer_weights(model) if len(self.phases) > 1 else {}
        self.own = {quantizer: quantizer.spec for quantizer in self.weights}
        self.ranges = {quantizer: _copied(quantizer.state_dict()) for quantizer in self.weights}
        self.phase = len(self.phases) - 1

    @property
    def are_own(self) -> bool:
        """What a look would see now is what ships."""
        return self.phase == len(self.phases) - 1

    def enter(self, step: int, optimizer: Optimizer) -> None:
        """Have the bits of a step; where they are others than before it, choose the ranges for them.

        Learned ranges stay the same Parameters. The optimizer forgets their moments, which are those of
        gradients in steps of another length; weights and their gradients have no such unit, and keep theirs.
        """
        before = self._set(self._phase_of(step))
        for quantizer, (module, name) in self.weights.items():
            if quantizer.spec != before[quantizer]:
                calibrate_weight(module, name, _OBSERVER)
                for ranges in quantizer.parameters():
                    optimizer.state.pop(ranges, None)

    def resume(self, step: int) -> None:
        """Have the bits of a step whose ranges are loaded."""
        self._set(self._phase_of(step))

    def close(self) -> None:
        """Their own bits again, with the ranges from the start where no others were chosen for them."""
        for quantizer, before in self._set(len(self.phases) - 1).items():
            if quantizer.spec != before:
                quantizer.load_state_dict(self.ranges[quantizer])

    def _phase_of(self, step: int) -> int:
        last = len(self.phases) - 1
        return max(0, last - (self.last - step) * len(self.phases) // self.quantized)

    def _set(self, phase: int) -> dict[FakeQuantizer, QuantSpec]:
        """The specs before."""
        self.phase, before = phase, {quantizer: quantizer.spec for quantizer in self.weights}
        for quantizer, own in self.own.items():
            bits = max(self.phases[phase], own.format.bits)
            quantizer.spec = replace(own, format=replace(own.format, bits=bits))
        return before


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _integer_weights(model: nn.Module) -> dict[FakeQuantizer, tuple[QuantModule, str]]:
    """Quantizers, with a module and the name of its weight."""
    return {
        quantizer: (module, name)
        for module in model.modules()
        if is_prepared(module)
        for name, quantizer in quantizers_of(module).items()
        if isinstance(quantizer.spec.format, IntFormat)
    }


def _above(model: nn.Module, bits: Sequence[int]) -> list[int]:
    """Those that are above the own bits of some weight."""
    fewest = min((quantizer.spec.format.bits for quantizer in _integer_weights(model)), default=8)
    return [entry for entry in bits if entry > fewest]
