"""The convolutions' twins. Their weight's 2-D view is (output channels, what one output channel sums over).

So "per channel" is one scale for each output channel, and a group is cut out of in_channels / groups x the
kernel's places. That holds for transposed convolutions too, whose weight torch has as (input channels, output
channels / groups, places): the quantizer sees the view, and the twin puts it back. An input has one scale: an
output sums over channels and places of it, and no engine can take a scale for each out of that sum. Padding
is of zeros, or of values that are on the lattice already, so it may come after quantization.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from recoup.nn.batch_norm import BatchNorm, folded
from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.nn.twin import Inputs, adopt, input_quantizer, output_of, weight_quantizer
from recoup.schemes import Scheme


class _Twin(nn.modules.conv._ConvNd):  # pyright: ignore[reportPrivateUsage]
    """A convolution's own state, and quantizers; its forward is that of its kind."""

    inputs_are: ClassVar[Inputs] = "channels"
    scheme: Scheme
    weight_quantizer: FakeQuantizer
    input_quantizer: FakeQuantizer | nn.Identity
    batch_norm: BatchNorm | None

    @classmethod
    def from_float(cls, module: nn.Module, scheme: Scheme, path: str) -> Self:
        """The twin of a float module; it shares every Parameter. See `QuantLinear.from_float`."""
        twin = adopt(cls, module, path)
        twin.scheme, twin.batch_norm = scheme, None
        twin.weight_quantizer = weight_quantizer(cls.matrix(module), scheme, path)
        twin.input_quantizer = input_quantizer(None, scheme, path, twin.weight.device)
        return twin

    @staticmethod
    def matrix(module: Any) -> Tensor:
        """(output channels, input channels of a group x places of the kernel)."""
        return folded(module, module.weight).flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """The 2-D view, put back as torch takes it."""
        return matrix.view_as(self.weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """The equation."""
        seen = self.weight_quantizer(folded(self, self.weight))
        return output_of(self, seen, self.weight, partial(self._conv_forward, self.input_quantizer(input)))


class _TransposedTwin(_Twin):
    """A transposed convolution; it has no padding but with zeros."""

    convolution: ClassVar[Callable[..., Tensor]]
    _output_padding: Callable[..., list[int]]

    @staticmethod
    def matrix(module: Any) -> Tensor:
        """(output channels, input channels of a group x places of the kernel)."""
        return folded(module, _rows(module))

    def stored(self, matrix: Tensor) -> Tensor:
        """The 2-D view, put back as torch takes it."""
        return transposed_weight(matrix, self.groups, self.kernel_size)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002 (torch's)
        """The equation."""
        rows = _rows(self)
        x, matrix = self.input_quantizer(input), folded(self, rows)
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size),
            self.dilation,
        )  # fmt: skip

        def spread(seen: Tensor, bias: Tensor | None) -> Tensor:
            weight = self.weight if seen is rows else self.stored(seen)
            return self.convolution(
                x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation
            )

        return output_of(self, self.weight_quantizer(matrix), rows, spread)


def _rows(module: Any) -> Tensor:
    of_groups = module.weight.unflatten(0, (module.groups, -1))
    return of_groups.transpose(1, 2).flatten(0, 1).flatten(1)


def transposed_weight(matrix: Tensor, groups: int, kernel_size: tuple[int, ...]) -> Tensor:
    """The 2-D view of a transposed convolution's weight, put back as torch takes it."""
    of_groups = matrix.unflatten(1, (-1, *kernel_size)).unflatten(0, (groups, -1))
    return of_groups.transpose(1, 2).flatten(0, 1).contiguous()


class QuantConv1d(_Twin, nn.Conv1d):
    """y = Q(W) * Q(x) + b, with nn.Conv1d's stride, padding, dilation and groups."""


class QuantConv2d(_Twin, nn.Conv2d):
    """y = Q(W) * Q(x) + b, with nn.Conv2d's stride, padding, dilation and groups."""


class QuantConv3d(_Twin, nn.Conv3d):
    """y = Q(W) * Q(x) + b, with nn.Conv3d's stride, padding, dilation and groups."""


class QuantConvTranspose1d(_TransposedTwin, nn.ConvTranspose1d):
    """y = Q(x), spread by Q(W), + b, with nn.ConvTranspose1d's geometry."""

    convolution = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(_TransposedTwin, nn.ConvTranspose2d):
    """y = Q(x), spread by Q(W), + b, with nn.ConvTranspose2d's geometry."""

    convolution = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(_TransposedTwin, nn.ConvTranspose3d):
    """y = Q(x), spread by Q(W), + b, with nn.ConvTranspose3d's geometry."""

    convolution = staticmethod(F.conv_transpose3d)
