"""The bias as an integer kernel adds it: so many steps of the products, in int32.

A step is the input's scale times the weight's, one for each output channel. ONNX's QLinearConv takes its bias
so, and what would be rounded as a file is opened is rounded in training instead (`Scheme.integer_bias`).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from recoup.nn.batch_norm import folded_bias, norm_of
from recoup.nn.fake_quantizer import FakeQuantizer

_LARGEST = 2**31 - 128  # in float32 the number before 2^31
_ROOM = 2**30


def seen_bias(module: Any) -> Tensor | None:
    """The bias that a prepared module adds; on the grid where its scheme says so. Gradients pass straight.

    Args:
        module: prepared; its bias is (outputs,) or None.
    """
    bias = folded_bias(module)
    if bias is None or not module.scheme.integer_bias:
        return bias
    if not (module.input_quantizer.enabled and module.weight_quantizer.enabled):
        return bias
    step = _step(module)
    on_grid = (_codes(bias, step) * step).to(bias.dtype)
    return on_grid + (bias - bias.detach())  # the difference is 0, and has the gradient


@torch.no_grad()
def coded_bias(prepared: Any) -> tuple[Tensor | None, Tensor | None]:
    """The bias of the converted module, and how many steps it is, in int32; None where it has no grid.

    Raises:
        ValueError: it is more steps than an int32 holds.
    """
    bias = folded_bias(prepared)
    if bias is not None and norm_of(prepared) is not None:
        bias = nn.Parameter(bias, requires_grad=False)
    if bias is None or not prepared.scheme.integer_bias:
        return bias, None
    step = _step(prepared)
    steps = (bias.float() / step).abs().amax()
    if steps > _LARGEST:
        raise ValueError(
            f"{prepared.weight_quantizer.path.removesuffix('.weight')}: its bias is {float(steps):.2g} steps "
            "of its products, and an int32 holds 2^31; calibrate again, or keep the module in float by a rule"
        )
    seen = seen_bias(prepared)
    assert seen is not None
    return nn.Parameter(seen.detach().clone(), requires_grad=False), _codes(bias, step).to(torch.int32)


@torch.no_grad()
def make_room(module: Any) -> None:
    """Widen the weight scales of channels whose bias would be more steps than an int32 holds; in place.

    A batch norm may leave such a channel, of tiny weights, behind. A product is at most 2^15 steps, so it is
    less than 2^-15 of such a bias, and what rounding loses of it does not show in an output of 8 bits.

    Args:
        module: prepared and calibrated, with an integer bias.
    """
    quantizer: FakeQuantizer = module.weight_quantizer
    if getattr(module, "bias", None) is None or quantizer.scale is None:
        return
    qparams, bias = quantizer.stored_qparams, folded_bias(module)
    assert bias is not None
    least = bias.float().abs() / (_ROOM * _input_scale(module))
    quantizer.keep(replace(qparams, scale=torch.maximum(qparams.scale, least.reshape(-1, 1))))


def _codes(bias: Tensor, step: Tensor) -> Tensor:
    return (bias.detach().float() / step).round().clamp(-_LARGEST, _LARGEST)


def _step(module: Any) -> Tensor:
    qparams = module.weight_quantizer.qparams(module.matrix(module).detach())
    return (_input_scale(module) * qparams.scale.flatten()).detach()


def _input_scale(module: Any) -> Tensor:
    return module.input_quantizer.stored_qparams.scale.flatten().detach()
