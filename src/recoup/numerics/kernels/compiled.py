"""Kernels that torch's inductor makes of the functions in `kept.py`: C++ on a CPU, Triton on a GPU.

The values are the same, bit for bit: inductor is told to divide and to round as eager torch does. A kernel is
made when it is first used, for one lattice, one width and one dtype, and serves any number of rows. It is
called directly, without the guards of `torch.compile` and autograd's layers, which take longer than a kernel
over a small weight; what they would guard is in the key of `_kernel_for`. Which kernel serves a tensor's
bytes, and by which views, is remembered with them (`Kept.known`): between two products of matrices, Python
is slow.

Bytes are read back by a kernel only where inductor has an instruction for it. With AVX2 it loads eight of
them by way of the stack, which made restoring 106 M values take 0.23 s against 0.03 s of torch's own copy
and multiplication.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recoup.numerics.granularity import per_channel, per_tensor
from recoup.numerics.kernels import kept as eager
from recoup.numerics.kernels.carrier import Carrier, carrier_of
from recoup.numerics.kernels.kept import Kept, NotFiniteError, may_saturate, pack_bits
from recoup.numerics.quantize import is_finite, qparams_of
from recoup.numerics.spec import QParams, QuantSpec

Found = tuple[Tensor | None, ...]
Function = Callable[..., Found]
# A kernel, and what it is given of a tensor's bytes and scales.
Known = tuple[Callable[..., Found], Found]

_AS_EAGER: dict[str, Any] = {"eager_numerics.division_rounding": True, "emulate_precision_casts": True}
_kernels: dict[tuple[Any, ...], Callable[..., Found]] = {}


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


def keep(x: Tensor, qparams: QParams | None, spec: QuantSpec, before: Kept | None) -> Kept:
    """See `kept.keep`."""
    if x.numel() == 0:
        return eager.keep(x, qparams, spec, before)
    values, known = eager.room_for(x, spec, before), dict[Any, Known]()
    one, lines = _lines(x.detach(), spec)
    if qparams is None:
        saturated, *found = _run(_choose_and_encode, one, lines, values.view(lines.shape))
        qparams = _blocks(found, spec.granularity.scale_shape(*x.shape))
        bounds = qparams.scale
    else:
        qparams = eager.loud(x, qparams, spec)
        if before is not None and all(map(_same_memory, _parts(qparams), _parts(before.qparams))):
            known = before.known
        key = _encode, x.dtype, torch.get_num_threads()
        if key not in known:
            places = values.view(lines.shape), *_rows(qparams, spec)
            known[key] = _kernel_for(_encode, one, lines, *places), places
        kernel, places = known[key]
        saturated, bounds = kernel(lines, *places)
    assert bounds is not None, "both kernels give bounds"
    if x.device.type == "cpu" and not is_finite(bounds):
        raise NotFiniteError
    bits = None if saturated is None else pack_bits(saturated)
    return Kept(values=values, qparams=qparams, spec=spec, saturated=bits, known=known)


def restore(kept: Kept, out: Tensor) -> Tensor:
    """See `kept.restore`."""
    if out.numel() == 0 or not _reads_bytes(out.device):
        return eager.restore(kept, out)
    key = _decode, out.dtype, torch.get_num_threads()
    if key not in kept.known:
        one, lines = _lines(kept.values, kept.spec)
        scales = _rows(kept.qparams, kept.spec)
        kernel = _kernel_for(_decode, one, lines, out.view(lines.shape), *scales)
        kept.known[key] = kernel, (lines, *scales)
    kernel, (lines, *scales) = kept.known[key]
    assert lines is not None, "bytes"
    kernel(lines, out.view(lines.shape), *scales)
    return out


def clip_(grad: Tensor, kept: Kept) -> Tensor:
    """See `kept.clip_`."""
    key = _clip, grad.dtype, torch.get_num_threads()
    if key not in kept.known:
        simple = kept.saturated is None and may_saturate(kept.spec, kept.carrier)
        if grad.numel() == 0 or not simple or not _reads_bytes(grad.device):
            return eager.clip_(grad, kept)
        values = kept.values.view(-1)
        kept.known[key] = _kernel_for(_clip, kept.spec, values, grad.view(-1)), (values,)
    kernel, (values,) = kept.known[key]
    kernel(values, grad.view(-1))
    return grad


def _encode(spec: QuantSpec, carrier: Carrier, x: Tensor, out: Tensor, *scales: Tensor | None) -> Found:
    """What saturates, if bytes alone do not tell, and numbers that are finite only if x is."""
    work = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return eager.encode(x, _qparams(scales), spec, carrier, out, work), x.abs().amax()


def _choose_and_encode(spec: QuantSpec, carrier: Carrier, x: Tensor, out: Tensor) -> Found:
    """What saturates, and the qparams of x's own values."""
    qparams = qparams_of(x, spec)
    return _encode(spec, carrier, x, out, *_parts(qparams))[0], *_parts(qparams)


def _decode(spec: QuantSpec, carrier: Carrier, values: Tensor, out: Tensor, *scales: Tensor | None) -> Found:
    work = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    out.copy_(eager.decode(values, _qparams(scales), spec, carrier, work))
    return ()


def _clip(spec: QuantSpec, carrier: Carrier, values: Tensor, grad: Tensor) -> Found:
    del spec
    carrier.clip_(grad, values, torch.empty_like(grad))
    return ()


@cache
def _reads_bytes(device: torch.device) -> bool:
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"


def _run(function: Function, spec: QuantSpec, *tensors: Tensor | None) -> Found:
    """One of the functions above, by its kernel."""
    return _kernel_for(function, spec, *tensors)(*tensors)


def _kernel_for(function: Function, spec: QuantSpec, *tensors: Tensor | None) -> Callable[..., Found]:
    """The kernel of a function, made when it is first asked for."""
    # The axis of any length: the last one of a single block or a single axis, else the rows.
    along = -1 if spec.granularity == per_tensor or function is _clip else 0
    first = tensors[0]
    assert first is not None, "there is something to read"
    if first.shape[along] == 1:  # which is a size of its own to whoever traces
        return partial(function, spec, carrier_of(spec.format))
    width = 0 if along == -1 else first.shape[1]
    # One row of blocks has one row of scales: that size is a constant to whoever traces, too.
    kinds = tuple([None if t is None else (t.dtype, t.shape[along:][:1] == (1,)) for t in tensors])
    key = (function, spec, width, kinds, first.device, torch.get_num_threads())
    kernel = _kernels.get(key)
    if kernel is None:
        kernel = _kernels[key] = _kernel(function, spec, along, tensors)
    return kernel


def _kernel(
    function: Function, spec: QuantSpec, along: int, tensors: Sequence[Tensor | None]
) -> Callable[..., Found]:
    """A function, compiled for tensors like these, with any number of elements along one axis."""
    # Imported late: they take a second, which `import recoup` need not.
    import torch._functorch.config as autograd_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    def symbolic(tensor: Tensor) -> Tensor:
        sizes = [DimDynamic.STATIC] * tensor.ndim
        if tensor.ndim and tensor.shape[along] > 1:
            sizes[along] = DimDynamic.DYNAMIC
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        return fake.from_tensor(torch.empty_like(tensor), symbolic_context=context)

    # Graphs know no None: where there is one, among what comes in and what goes out, is known here.
    carrier, comes = carrier_of(spec.format), [tensor is not None for tensor in tensors]
    goes: list[bool] = []

    def traced(*given: Tensor) -> tuple[Tensor, ...]:
        each = iter(given)
        found = function(spec, carrier, *(next(each) if there else None for there in comes))
        goes[:] = [tensor is not None for tensor in found]
        return tuple(tensor for tensor in found if tensor is not None)

    made: list[Callable[[list[Tensor]], Sequence[Tensor]]] = []

    def compile_inner(*graph: Any, **options: Any) -> Any:
        made.append(compile_fx_inner(*graph, **options))
        return made[-1]

    with torch.inference_mode(False), torch.no_grad():  # whoever calls first, the kernel serves all
        fake = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
        examples = [symbolic(tensor) for tensor in tensors if tensor is not None]
        with fake:
            graph = make_fx(traced)(*examples)
        tables = [*graph.buffers()]  # of a format's values, which the kernel takes first
        assert not isinstance(examples[0].shape[along], int), "traced for one size"
        # What is remembered of the layers around a kernel would be given back without it.
        with autograd_config.patch(enable_autograd_cache=False):
            compile_fx(graph, examples, inner_compile=compile_inner, config_patches=_AS_EAGER)
    (run,) = made

    def kernel(*tensors: Tensor | None) -> Found:
        found = run([*tables, *[tensor for tensor in tensors if tensor is not None]])
        if not goes:
            return ()
        each = iter(found)
        return tuple([next(each) if there else None for there in goes])

    return kernel


def _lines(x: Tensor, spec: QuantSpec) -> tuple[QuantSpec, Tensor]:
    """A view in which every row is a block, if blocks lie in one piece: so one kernel serves all shapes."""
    x = x.contiguous()  # kernels are made for it
    if spec.granularity.rows == 1:
        return _by_lines(spec), x.reshape(-1, spec.granularity.columns or x.shape[1])
    return spec, x.reshape(1, -1) if spec.granularity == per_tensor else x


@cache
def _by_lines(spec: QuantSpec) -> QuantSpec:
    return replace(spec, granularity=per_channel)


def _rows(qparams: QParams, spec: QuantSpec) -> tuple[Tensor | None, ...]:
    """The parts of qparams in the shape that goes with `_lines`."""
    if spec.granularity.rows != 1:
        return _parts(qparams)
    *blocks, global_scale = _parts(qparams)
    return *(None if tensor is None else tensor.reshape(-1, 1) for tensor in blocks), global_scale


def _blocks(rows: Sequence[Tensor | None], shape: tuple[int, int]) -> QParams:
    """The inverse of `_rows`."""
    *blocks, global_scale = rows
    return _qparams((*(None if tensor is None else tensor.reshape(shape) for tensor in blocks), global_scale))


def _same_memory(now: Tensor | None, before: Tensor | None) -> bool:
    """And views of it, which `_rows` makes unless it has to copy."""
    return now is before and (now is None or now.is_contiguous())


def _parts(qparams: QParams) -> tuple[Tensor | None, ...]:
    return qparams.scale, qparams.zero_point, qparams.offset, qparams.global_scale


def _qparams(scales: Sequence[Tensor | None]) -> QParams:
    scale, zero_point, offset, global_scale = scales
    assert scale is not None, "every lattice has a scale"
    return QParams(scale=scale, zero_point=zero_point, offset=offset, global_scale=global_scale)
