"""One scale for a tensor and its views, before anything is measured or trained.

Where one tensor goes into two convolutions, into one through a concat or a max pool, each has calibrated a
range of its own. An engine would round it twice; with one scale it rounds it once, and hands on codes. So one
range that holds all of theirs becomes the range of all, and what is trained is what is fused. See
`onnx_placement.shared`.
"""

import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from recoup.export import onnx as writer
from recoup.export.export import converted_copy
from recoup.export.onnx_placement import Wires, shared
from recoup.export.onnx_qdq import write
from recoup.nn import FakeQuantizer, is_prepared, moved, output_quantizers


def share_scales_of_integers(model: nn.Module) -> nn.Module:
    """The same as `share_input_scales` for onnxruntime, which it helps where convolutions are integers."""
    integers = any(
        is_prepared(module) and module.inputs_are == "channels" and module.scheme.integer_bias
        for module in model.modules()
    )
    return share_input_scales(model) if integers or output_quantizers(model) else model


@torch.no_grad()
def share_input_scales(model: nn.Module) -> nn.Module:
    """Give what is rounded together one range; in place, returns the model.

    Changes no weight. Learned scales, which would part in training, are left as they are.

    Args:
        model: prepared and calibrated; it is traced with the batch that `calibrate` saw first.

    Raises:
        ValueError: the model cannot be traced.
    """
    found: dict[str, object] = {f"{name}.output_scale": q for name, q in output_quantizers(model).items()}
    for name, module in model.named_modules():
        if is_prepared(module):
            found[f"{name}.input_scale"] = getattr(module, "input_quantizer", None)
    fixed = {
        name: quantizer
        for name, quantizer in found.items()
        if isinstance(quantizer, FakeQuantizer) and quantizer.spec.ranges == "static"
    }
    if len(fixed) < 2:
        return model
    example: Any = getattr(model, "recoup_example", None)
    if example is None:
        raise ValueError("sharing scales traces the model with a batch; run recoup.calibrate first")
    with tempfile.TemporaryDirectory() as temporary:
        write(converted_copy(model), Path(temporary), moved(example, torch.device("cpu")))
        wires = Wires(onnx.load(Path(temporary) / writer.FILE))
    for group in shared(wires):
        names = {node.input[1] for node in group}
        quantizers = [fixed[name] for name in sorted(names) if name in fixed]
        for spec in {quantizer.spec for quantizer in quantizers}:
            _share_range([quantizer for quantizer in quantizers if quantizer.spec == spec])
    return model


def _share_range(quantizers: list[FakeQuantizer]) -> None:
    """The widest, where it holds the others'; with zero points it may not, and a wider one does."""
    bounds = [_bounds(quantizer) for quantizer in quantizers]
    lo, hi = min(lo for lo, _ in bounds), max(hi for _, hi in bounds)
    widest = max(quantizers, key=lambda quantizer: float(quantizer.stored_qparams.scale))
    if _bounds(widest) != (lo, hi):
        widest.set_range(torch.tensor([[lo]]), torch.tensor([[hi]]))
    for quantizer in quantizers:
        quantizer.keep(widest.stored_qparams)


def _bounds(quantizer: FakeQuantizer) -> tuple[float, float]:
    qparams, grid = quantizer.stored_qparams, quantizer.spec.format
    zero_point = 0 if qparams.zero_point is None else float(qparams.zero_point)
    scale = float(qparams.scale)
    return scale * (grid.lo - zero_point), scale * (grid.hi - zero_point)
