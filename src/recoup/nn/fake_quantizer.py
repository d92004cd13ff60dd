"""The fake quantizer: quantize-dequantize of one tensor, with the qparams it needs to do so.

Its forward is what the exported file computes: the exporter takes codes and scales from here and never
derives them again. One flag, `enabled`; when it is False the tensor passes unchanged.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from recoup.numerics import (
    QParams,
    QuantSpec,
    choose_global_scale,
    choose_qparams,
    fake_quantize,
    qparams_of,
    storable_straight_through,
)


class LatticeState(nn.Module):
    """A module whose tensors are scales and codes: a cast of the model moves them, but never rounds them.

    So model.half() and model.to(torch.bfloat16) change the weights' dtype and leave the lattice as trained.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(state: Tensor) -> Tensor:
            moved = fn(state)
            return moved if moved.dtype == state.dtype else state.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class FakeQuantizer(LatticeState):
    """Holds the qparams of one tensor and applies them.

    Which of them are state follows from `spec.ranges`: "dynamic" has no scale, "static" has a buffer,
    "learned" a Parameter. All of them have their final shape from the start, so that a checkpoint loads
    strictly; until calibration they are NaN and `forward` raises.

    Args:
        spec: the lattice.
        rows: of a weight's 2-D view, which is `flatten(1)` of it; None for inputs, whose rows (tokens) vary.
        columns: of the 2-D view; None where they vary too, and only per_tensor holds.

    Raises:
        ValueError: the view cannot be cut into the spec's blocks.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    global_scale: Tensor | None

    def __init__(self, spec: QuantSpec, *, rows: int | None, columns: int | None) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = True
        self.calibrated = not self.needs_calibration
        self.path = "a quantizer"  # its name in the model, for messages; `prepare` knows it
        self.is_weight = rows is not None
        shape = spec.granularity.scale_shape(rows or 1, columns or 1)
        scale = None if spec.ranges == "dynamic" else torch.full(shape, torch.nan)
        if spec.ranges == "learned":
            self.scale = nn.Parameter(scale) if scale is not None else None
        else:
            self.register_buffer("scale", scale)
        affine = scale is not None and not spec.symmetric
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32) if affine else None)
        self.register_buffer("global_scale", torch.tensor(torch.nan) if spec.global_scale else None)

    @property
    def needs_calibration(self) -> bool:
        """Some qparam is state, so somebody must set it."""
        return self.spec.ranges != "dynamic" or self.spec.global_scale

    def forward(self, x: Tensor) -> Tensor:
        """x, moved onto the lattice."""
        if not self.enabled:
            return x
        view = self.view(x)
        return fake_quantize(view, self.qparams(view), self.spec).reshape(x.shape)

    def view(self, x: Tensor) -> Tensor:
        """The 2-D view: a weight's is (output features, rest), an input's (rest, last axis)."""
        return x.flatten(1) if self.is_weight else x.reshape(-1, x.shape[-1])

    def qparams(self, view: Tensor) -> QParams:
        """The qparams that `forward` uses for this 2-D view.

        Raises:
            RuntimeError: not calibrated yet.
        """
        if not self.calibrated:
            raise RuntimeError(
                f"{self.path}: its range is not known; run recoup.calibrate(model, batches) first"
            )
        if self.scale is None:
            return qparams_of(view.detach(), self.spec, self.global_scale)
        return self.stored_qparams

    @property
    def stored_qparams(self) -> QParams:
        """The qparams of static and learned ranges: they do not depend on the tensor."""
        assert self.scale is not None, "dynamic ranges store no scale"
        scale = storable_straight_through(self.scale, self.spec.scale_format)
        return QParams(scale=scale, zero_point=self.zero_point, global_scale=self.global_scale)

    @torch.no_grad()
    def set_range(self, lo: Tensor, hi: Tensor, amax: Tensor | None = None) -> None:
        """Make [lo, hi] of every block the range, and derive from it all qparams that are state.

        Args:
            lo: smallest value of every block.
            hi: largest value of every block.
            amax: of the whole tensor, for the global scale; by default that of [lo, hi].

        Raises:
            ValueError: a bound is not finite.
        """
        if not (torch.isfinite(lo).all() and torch.isfinite(hi).all()):
            raise ValueError(f"{self.path}: saw values that are not finite; check the model and the data")
        largest = torch.maximum(-lo, hi).amax() if amax is None else amax
        qparams = choose_qparams(lo, hi, self.spec, choose_global_scale(largest, self.spec))
        for state, value in (
            (self.scale, qparams.scale),
            (self.zero_point, qparams.zero_point),
            (self.global_scale, qparams.global_scale),
        ):
            if state is not None and value is not None:
                state.copy_(value)
        self.calibrated = True

    def extra_repr(self) -> str:
        """The spec in short."""
        return str(self.spec)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        stored = [state for state in (self.scale, self.global_scale) if state is not None]
        self.calibrated = not any(bool(state.isnan().any()) for state in stored)


@contextmanager
def quantization_off(model: nn.Module) -> Generator[None]:
    """Run the float model that the prepared one still contains."""
    enabled = [module for module in model.modules() if isinstance(module, FakeQuantizer) and module.enabled]
    for quantizer in enabled:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in enabled:
            quantizer.enabled = True
