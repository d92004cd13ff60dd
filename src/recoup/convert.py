"""The door out: float master weights become codes and scales. One way."""

import torch
from torch import nn

from recoup.nn import (
    CODED_MODULES,
    OUTPUT,
    Codes,
    FakeQuantizer,
    is_prepared,
    matrices_of,
    output_quantizer_of,
    quantizers_of,
    refuse_peft,
)


def convert(model: nn.Module) -> nn.Module:
    """Replace every prepared module by its coded one; in place, returns the model.

    The codes are decided here, once, in float32, from the master weights and the qparams that fake
    quantization used; every later step moves codes. What the model computes does not change by a bit.

    Adapters of `add_lora` are part of the weight; so are norms of `add_batch_norm`, as in evaluation mode.

    Raises:
        ValueError: nothing is prepared, a quantizer is switched off or not calibrated, a weight is not
            finite, or layers are PEFT's.

    >>> import torch, recoup
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 4))
    >>> model = recoup.convert(recoup.prepare(model, recoup.resolve(model, "w4a16")))
    >>> model[0].weight.codes.dtype, tuple(model[0].weight.scale.shape)
    (torch.int8, (4, 1))
    """
    refuse_peft(model)
    for quantizer in (module for module in model.modules() if isinstance(module, FakeQuantizer)):
        if not quantizer.enabled:
            raise ValueError(
                f"{quantizer.path}: its quantizer is switched off, so this is not what was measured"
            )
        if not quantizer.calibrated:
            raise ValueError(
                f"{quantizer.path}: its range is not known; run recoup.calibrate(model, batches) first"
            )
    for name, module in model.named_modules():
        for leaf, matrix in matrices_of(module).items() if is_prepared(module) else ():
            if not torch.isfinite(matrix).all():
                raise ValueError(
                    f"{name}.{leaf}: holds values that are not finite; training went wrong before"
                )
    coded = {
        module: CODED_MODULES[type(module)](module)
        for module in model.modules()
        if type(module) in CODED_MODULES
    }
    if not coded:
        raise ValueError("nothing to convert: the model has no prepared modules; run recoup.prepare first")
    shared: dict[object, Codes] = {}
    for module, twin in coded.items():  # tied weights have one quantizer, and get one set of codes
        for name, quantizer in quantizers_of(module).items():
            setattr(twin, name, shared.setdefault(quantizer, getattr(twin, name)))
    for module, twin in coded.items():
        output = output_quantizer_of(module)
        if output is not None:
            twin.add_module(OUTPUT, output)
    for module, twin in coded.items():  # forward hooks may change what is computed, so they go along
        kept = {k: v for k, v in vars(module).items() if k == "training" or k.startswith("_forward")}
        vars(twin).update(kept)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in coded:
            model.set_submodule(name, coded[module])
    return model
