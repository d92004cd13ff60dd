"""An output on the lattice: of any module, with a weight or without, whose tensor goes into a sum.

A sum is no module, so nothing stands where its inputs could be quantized; the modules that make them are. The
quantizer is a child of the module, `output_quantizer`, and a forward hook applies it, so the module keeps its
type, its parameters and their names.
"""

from typing import Any

from torch import Tensor, nn

from recoup.nn.fake_quantizer import FakeQuantizer

OUTPUT = "output_quantizer"


def quantize_output(module: nn.Module, quantizer: nn.Module) -> None:
    """Let a quantizer see, and change, everything that the module returns; in place.

    Args:
        module: returns one tensor.
        quantizer: becomes its child.
    """
    module.add_module(OUTPUT, quantizer)
    if type(module).forward is not nn.Sequential.forward:  # which runs its children: this is its last one now
        module.register_forward_hook(_on_the_lattice)


def output_quantizer_of(module: nn.Module) -> nn.Module | None:
    """Of this module itself; None where its output is as it was."""
    return dict(module.named_children()).get(OUTPUT)


def output_quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Of all modules inside, by the module's name."""
    return {
        name: quantizer
        for name, module in model.named_modules()
        if isinstance(quantizer := output_quantizer_of(module), FakeQuantizer)
    }


def _on_the_lattice(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
    del inputs
    quantizer = output_quantizer_of(module)
    assert quantizer is not None
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise ValueError(
            f"{getattr(quantizer, 'path', OUTPUT)}: the module returns a {kind}, and only one tensor can be "
            "quantized; name the module that makes it in outputs"
        )
    return quantizer(output)
