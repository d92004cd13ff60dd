"""Does a float module take a scheme? Asked before anything is touched."""

from torch import nn

from recoup.nn.modules import quant_type
from recoup.nn.twin import has_several, weight_names, weight_of
from recoup.numerics import per_tensor
from recoup.schemes import Scheme


def check_shape(name: str, module: nn.Module, scheme: Scheme) -> None:
    """Do the shapes of a float module's weights and inputs take this scheme?

    Raises:
        ValueError: they do not; names the module.
    """
    kind = quant_type(module)
    assert kind is not None
    inputs = scheme.inputs
    if inputs is not None and kind.inputs_are == "ids":
        raise ValueError(
            f"{name}: {scheme.name!r} quantizes inputs, but an embedding's are ids; use w8a16 or w4a16"
        )
    if inputs is not None and kind.inputs_are == "channels" and inputs.granularity != per_tensor:
        raise ValueError(
            f"{name}: {scheme.name!r} has input scales per {inputs.granularity}, but a convolution's input "
            "has one for all; use w8a8-static, w8a8-ort, w8a8-ort-static or a weight-only scheme"
        )
    if has_several(kind):
        kind.check(module, scheme, name)
    for leaf in weight_names(kind, module):
        rows, columns = weight_of(kind, module, leaf).shape
        try:
            scheme.weights.granularity.scale_shape(rows, columns)
            if inputs is not None and kind.inputs_are in ("tokens", "routed"):
                inputs.granularity.scale_shape(1, columns)
        except ValueError as error:
            path = f"{name}.{leaf}" if has_several(kind) else name
            raise ValueError(f"{path}: {error}") from None
