"""When a linear layer runs as one function, and when as the equation that it is.

`numerics.kernels.linear` is faster and keeps less; it does not call the quantizers. So it runs only while
nobody listens to them, and `torch.compile`, which fuses the equation by itself, never meets it.
"""

import torch
from torch import Tensor, nn

from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.nn.kept_weight import kept_weight
from recoup.numerics.kernels import KERNELS, linear


def fuses(input_quantizer: FakeQuantizer | nn.Identity, weight_quantizer: FakeQuantizer) -> bool:
    """The layer's quantizers would do what `fused_linear` does, and nothing else."""
    return (
        weight_quantizer.impl != "reference"
        and not torch.compiler.is_compiling()
        and all(
            getattr(quantizer, "enabled", True)
            and not (quantizer._forward_hooks or quantizer._forward_pre_hooks or quantizer._backward_hooks)  # pyright: ignore[reportPrivateUsage]
            for quantizer in (input_quantizer, weight_quantizer)
        )
    )


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_quantizer: FakeQuantizer | nn.Identity,
    weight_quantizer: FakeQuantizer,
) -> Tensor:
    """F.linear(input_quantizer(x), weight_quantizer(weight), bias), the same to the bit.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out), or none.
        input_quantizer: of x; an Identity leaves it in float.
        weight_quantizer: of the weight.

    Raises:
        NonFiniteError: x or the weight is not finite.
    """
    of_x = None
    if isinstance(input_quantizer, FakeQuantizer):
        view = input_quantizer.view(x)
        of_x = input_quantizer.qparams(view), input_quantizer.spec
        input_quantizer.check(view, of_x[0])
    codes = kept_weight(weight_quantizer, weight)
    learned = weight_quantizer.spec.ranges == "learned"  # with gradients, then
    of_weight = weight_quantizer.qparams(weight) if learned else codes.qparams
    return linear(x, of_x, weight, of_weight, codes, bias, KERNELS[weight_quantizer.impl])
