"""The adapter of a linear layer, inside of its quantizer: y = Q(x) Q(W + s B A)^T + b.

What is rounded in training is then what is rounded after merging. PEFT's own layers add s B A x to the output
of the layer, next to Q(W), and no code holds that; `refuse_peft` finds them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.numerics import LowRank
from recoup.schemes.training import LoraSettings


class LoRA(nn.Module):
    """A (rank, in) and B (out, rank), as PEFT begins them: A by Kaiming, B zero.

    Args:
        settings: rank, scaling and dropout.
        weight: (out, in), for the shape and the device.
    """

    def __init__(self, settings: LoraSettings, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.settings = settings
        self.A = nn.Parameter(torch.empty(settings.rank, columns, device=weight.device))
        self.B = nn.Parameter(torch.zeros(rows, settings.rank, device=weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def low_rank(self) -> LowRank:
        """The product, whole."""
        return LowRank(self.A, self.B, self.settings.scaling)

    def drawn(self) -> LowRank:
        """The product that a forward pass sees: in training mode some columns of A are dropped.

        That is PEFT's dropout of the adapter's input, with one mask for all tokens: a mask for each would
        make of W + s B A a weight for each.
        """
        if not (self.training and self.settings.dropout):
            return self.low_rank
        mask = F.dropout(torch.ones_like(self.A[:1]), self.settings.dropout)
        return self.low_rank._replace(A=self.A * mask)

    def extra_repr(self) -> str:
        """The settings in short."""
        return f"rank={self.settings.rank}, scaling={self.settings.scaling:g}"


def low_rank_of(module: nn.Module) -> LowRank | None:
    """What a linear layer's adapter adds to its weight; None for a layer without one, float ones too."""
    lora = getattr(module, "lora", None)
    return lora.low_rank if isinstance(lora, LoRA) else None


def refuse_peft(model: nn.Module) -> None:
    """A model without PEFT's layers.

    Raises:
        ValueError: it has some; names the first, and what to call instead.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__module__.partition(".")[0] == "peft"
    ]
    if found:
        name, module = next((pair for pair in found if hasattr(pair[1], "base_layer")), found[0])
        raise ValueError(
            f"{name or 'the model'}: a {type(module).__name__} of peft adds its adapter outside of the "
            "quantized weight, so what ships would not be what is trained; call peft's merge_and_unload() "
            "before recoup.prepare, or train adapters with recoup.add_lora(model)"
        )
