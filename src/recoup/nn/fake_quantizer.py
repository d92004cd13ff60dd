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
    drawn,
    fake_quantize,
    is_finite,
    kernels,
    learned_qparams,
    qparams_of,
)


class NonFiniteError(ValueError):
    """A tensor to be quantized holds NaN or infinity; `tensor` is its name."""

    def __init__(self, tensor: str) -> None:
        super().__init__(
            f"{tensor}: holds NaN or infinity, which has no code; look for where it comes from before this"
        )
        self.tensor = tensor


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
    "learned" a Parameter. Beside the scale, "affine" has a zero point and "min-max" an offset; learned, both
    are an offset, a Parameter too (beta of LSQ+), from which the zero point follows. All of them have their
    final shape from the start, so that a checkpoint loads strictly; until calibration they are NaN and
    `forward` raises.

    Args:
        spec: the lattice.
        rows: of a weight's 2-D view, which is `flatten(1)` of it; None for inputs, whose rows (tokens) vary.
        columns: of the 2-D view; None where they vary too, and only per_tensor holds.

    Raises:
        ValueError: the view cannot be cut into the spec's blocks.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    offset: Tensor | None
    global_scale: Tensor | None

    def __init__(self, spec: QuantSpec, *, rows: int | None, columns: int | None) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = True
        self.calibrated = not self.needs_calibration
        self.path = "a quantizer"  # its name in the model, for messages; `prepare` knows it
        self.is_weight = rows is not None
        self.impl: kernels.Impl = "reference"  # `prepare` chooses
        self.loads = 0  # how often a state was loaded
        self.seed: int | None = None  # draws codes, while a training makes gradients; None rounds to nearest
        shape = spec.granularity.scale_shape(rows or 1, columns or 1)
        kept, learned = spec.ranges != "dynamic", spec.ranges == "learned"
        has_offset = spec.has_offset or (learned and spec.has_zero_point)
        self._state("scale", torch.full(shape, torch.nan) if kept else None, learned)
        self._state("offset", torch.full(shape, torch.nan) if kept and has_offset else None, learned)
        affine = kept and spec.has_zero_point and not learned
        self._state("zero_point", torch.zeros(shape, dtype=torch.int32) if affine else None)
        self._state("global_scale", torch.tensor(torch.nan) if spec.global_scale else None)

    def _state(self, name: str, state: Tensor | None, learned: bool = False) -> None:
        if learned:
            self.register_parameter(name, None if state is None else nn.Parameter(state))
        else:
            self.register_buffer(name, state)

    @property
    def needs_calibration(self) -> bool:
        """Some qparam is state, so somebody must set it."""
        return self.spec.ranges != "dynamic" or self.spec.global_scale

    def forward(self, x: Tensor) -> Tensor:
        """x, moved onto the lattice.

        Raises:
            NonFiniteError: see `check`.
            RuntimeError: not calibrated yet.
        """
        if not self.enabled or x.numel() == 0:
            return x
        view = self.view(x)
        qparams = self.qparams(view)
        moved = None if self.seed is None else drawn(view, qparams, self.spec, self.seed)
        if self.impl == "reference" or torch.compiler.is_compiling():  # inductor fuses the reference itself
            self.check(view, qparams)
            return fake_quantize(view, qparams, self.spec, moved).reshape(x.shape)
        implementation = kernels.KERNELS[self.impl]
        try:
            return kernels.fake_quantize(view, qparams, self.spec, implementation, moved).reshape(x.shape)
        except kernels.NotFiniteError:
            raise NonFiniteError(self.path) from None

    @torch.no_grad()
    def kept(
        self, view: Tensor, qparams: QParams | None = None, before: kernels.Kept | None = None
    ) -> kernels.Kept:
        """The codes of a 2-D view as bytes, by the kernels that were chosen; see `kernels.kept.keep`.

        Raises:
            NonFiniteError: the view is not finite.
        """
        if self.seed is not None:
            qparams = self.qparams(view) if qparams is None else qparams
            view = drawn(view, qparams, self.spec, self.seed)
        try:
            return kernels.KERNELS[self.impl].keep(view, qparams, self.spec, before)
        except kernels.NotFiniteError:
            raise NonFiniteError(self.path) from None

    def check(self, view: Tensor, qparams: QParams) -> None:
        """Look for NaN and infinity in a 2-D view; in its scales alone, where those are of its own values.

        Only on a CPU and outside of `torch.compile`: elsewhere an answer would have to be waited for. There
        NaN stays NaN, and with dynamic ranges infinity makes its whole block NaN.

        Raises:
            NonFiniteError: there is one.
        """
        if view.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if not is_finite(qparams.scale if self.spec.ranges == "dynamic" else view.detach()):
            raise NonFiniteError(self.path)

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
        if self.spec.ranges == "static":  # `keep` got them as they are stored
            return QParams(
                scale=self.scale,
                zero_point=self.zero_point,
                offset=self.offset,
                global_scale=self.global_scale,
            )
        return learned_qparams(self.scale, self.offset, self.global_scale, self.spec)

    @torch.no_grad()
    def set_range(self, lo: Tensor, hi: Tensor, amax: Tensor | None = None) -> None:
        """Make [lo, hi] of every block the range, and derive from it all qparams that are state.

        Args:
            lo: smallest value of every block.
            hi: largest value of every block.
            amax: of the whole tensor, for the global scale; by default that of [lo, hi].

        Raises:
            ValueError: a bound is not finite, or the scale rule needs more than bounds: see `fit`.
        """
        self._check_finite(lo, hi)
        largest = torch.maximum(-lo, hi).amax() if amax is None else amax
        global_scale = choose_global_scale(largest, self.spec)
        if self.spec.ranges == "dynamic":  # blocks choose for themselves, later
            self._keep_global_scale(global_scale)
            return
        try:
            self.keep(choose_qparams(lo, hi, self.spec, global_scale))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    @torch.no_grad()
    def fit(self, view: Tensor) -> None:
        """Take the qparams of this 2-D view's own values: round-to-nearest for a weight, under any rule.

        Raises:
            ValueError: a value is not finite.
        """
        self._check_finite(view)
        self.keep(qparams_of(view, self.spec))

    @torch.no_grad()
    def keep(self, qparams: QParams, columns: slice = slice(None)) -> None:
        """Make qparams state, those of all blocks or of these columns of blocks."""
        offset = qparams.offset
        if qparams.zero_point is not None:
            offset = -qparams.zero_point * qparams.step  # of code 0: from it follows this zero point
        found = {"scale": qparams.scale, "zero_point": qparams.zero_point, "offset": offset}
        for name, value in found.items():
            state = getattr(self, name)
            if state is not None:
                state[:, columns] = value
        self._keep_global_scale(qparams.global_scale)

    @torch.no_grad()
    def stretch(self, factor: Tensor) -> None:
        """Let scales that are state follow rows that are multiplied by a factor: the codes stay.

        Args:
            factor: (rows), above 0; every row has scales of its own.
        """
        for state in (self.scale, self.offset):
            if state is not None:
                state.mul_(factor[:, None])

    def _keep_global_scale(self, global_scale: Tensor | None) -> None:
        if self.global_scale is not None and global_scale is not None:
            self.global_scale.copy_(global_scale)
        self.calibrated = True

    def _check_finite(self, *tensors: Tensor) -> None:
        if not all(map(is_finite, tensors)):
            raise ValueError(f"{self.path}: saw values that are not finite; check the model and the data")

    def extra_repr(self) -> str:
        """The spec in short."""
        return str(self.spec)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.loads += 1
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
