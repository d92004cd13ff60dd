"""Kernels that torch's inductor makes of the reference: C++ on a CPU, Triton on a GPU.

The functions are those of `kept.py`, and so are the values, bit for bit: inductor is told to divide and to
round as eager torch does. A kernel is made when it is first used, for one lattice, and serves any number of
rows. On a CPU only quantizing is compiled: of an int8 tensor inductor loads eight bytes by way of the stack,
which made restoring 106 M values take 0.23 s against 0.03 s of torch's own copy and multiplication.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from recoup.numerics.granularity import per_channel, per_tensor
from recoup.numerics.kernels import kept as eager
from recoup.numerics.kernels.carrier import Carrier, carrier_of
from recoup.numerics.kernels.kept import Kept, may_saturate, pack_bits
from recoup.numerics.spec import QParams, QuantSpec

_AS_EAGER: dict[str, Any] = {"eager_numerics.division_rounding": True, "emulate_precision_casts": True}


def missing(device: torch.device) -> str | None:
    """What compiled kernels for a device lack here, and what to do about it; None if they can be made."""
    if device.type != "cpu":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not there; install the one that this torch was built for"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler {compiler!r} is there; install it (apt-get install g++), or name one in CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is not there; install python's headers (apt-get install python3-dev)"
    return None


def keep(x: Tensor, qparams: QParams, spec: QuantSpec) -> Kept:
    """See `kept.keep`."""
    if x.numel() == 0:
        return eager.keep(x, qparams, spec)
    qparams = eager.loud(x, qparams, spec)
    lines, scales, one = _lines(x.detach(), qparams, spec)
    values, saturated = _kernel(_encode, one, lines.shape[1])(lines, *_parts(scales))
    return Kept(
        values=values.reshape(x.shape),
        qparams=qparams,
        spec=spec,
        saturated=None if saturated is None else pack_bits(saturated),
    )


def restore(kept: Kept, out: Tensor) -> Tensor:
    """See `kept.restore`."""
    if out.device.type == "cpu" or out.numel() == 0:
        return eager.restore(kept, out)
    lines, scales, one = _lines(kept.values, kept.qparams, kept.spec)
    return out.copy_(_kernel(_decode, one, lines.shape[1])(lines, *_parts(scales)).reshape(out.shape))


def clip_(grad: Tensor, kept: Kept) -> Tensor:
    """See `kept.clip_`; here the result may be a new tensor."""
    if grad.device.type == "cpu" or kept.saturated is not None or not may_saturate(kept.spec, kept.carrier):
        return eager.clip_(grad, kept)
    return _kernel(_clip, kept.spec, 1)(grad.reshape(-1), kept.values.reshape(-1)).reshape(grad.shape)


def _encode(
    spec: QuantSpec, carrier: Carrier, x: Tensor, *scales: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    values = torch.empty(x.shape, dtype=carrier.dtype, device=x.device)
    return values, eager.encode(x, _qparams(scales), spec, carrier, values)


def _decode(spec: QuantSpec, carrier: Carrier, values: Tensor, *scales: Tensor | None) -> Tensor:
    out = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    return eager.decode(values, _qparams(scales), spec, carrier, out)


def _clip(spec: QuantSpec, carrier: Carrier, grad: Tensor, values: Tensor) -> Tensor:
    del spec
    return grad * carrier.inside(values)


@cache
def _kernel(function: Callable[..., Any], spec: QuantSpec, width: int) -> Callable[..., Any]:
    """One of the functions above, compiled for a lattice and for lines of one length."""
    along = int(spec.granularity == per_tensor and function is not _clip)
    if along == 1 and width:  # of any length
        return _kernel(function, spec, 0)
    carrier = carrier_of(spec.format)

    def kernel(*tensors: Tensor | None) -> Any:
        return function(spec, carrier, *tensors)

    # Dynamo counts recompilations by code object, and all lattices and widths would share one, and its limit.
    code = kernel.__code__.replace(co_name=f"kernel_{function.__name__}")
    own = FunctionType(code, kernel.__globals__, code.co_name, None, kernel.__closure__)
    run = torch.compile(own, fullgraph=True, dynamic=False, options=_AS_EAGER)

    # Imported late: Dynamo takes a second, which `import recoup` need not.
    from torch._dynamo import maybe_mark_dynamic

    def on_lines(*tensors: Tensor | None) -> Any:
        for tensor in tensors:
            if tensor is not None and tensor.ndim > 0:
                maybe_mark_dynamic(tensor, along)
        return run(*tensors)

    return on_lines


def _lines(x: Tensor, qparams: QParams, spec: QuantSpec) -> tuple[Tensor, QParams, QuantSpec]:
    """A view in which every row is a block, if blocks lie in one piece: so one kernel serves all shapes."""
    if spec.granularity == per_tensor:
        return x.reshape(1, -1), qparams, spec
    if spec.granularity.rows != 1:
        return x, qparams, spec
    count = qparams.scale.numel()
    scale, zero_point, offset, global_scale = _parts(qparams)
    lines = [None if tensor is None else tensor.reshape(count, 1) for tensor in (scale, zero_point, offset)]
    scales = _qparams((*lines, global_scale))
    return x.reshape(count, -1), scales, replace(spec, granularity=per_channel)


def _parts(qparams: QParams) -> tuple[Tensor | None, ...]:
    return qparams.scale, qparams.zero_point, qparams.offset, qparams.global_scale


def _qparams(scales: Sequence[Tensor | None]) -> QParams:
    scale, zero_point, offset, global_scale = scales
    assert scale is not None, "every lattice has a scale"
    return QParams(scale=scale, zero_point=zero_point, offset=offset, global_scale=global_scale)
