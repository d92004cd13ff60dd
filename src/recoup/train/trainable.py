"""What training refuses: of a prepared model, and of a float one before anything is done for it."""

import torch
from torch import nn

from recoup.nn import Batch, FakeQuantizer, call, device_of, evaluating, moved, refuse_peft
from recoup.schemes.training import TrainSettings
from recoup.train.activations import check_layers
from recoup.train.losses import build_loss, names_of
from recoup.train.snapshot import check_state


def check_trainable(model: nn.Module) -> None:
    """A model that can be trained under fake quantization.

    Raises:
        ValueError: it is not prepared, not calibrated, has layers of PEFT's, or parameters to train that are
            not float32.
    """
    refuse_peft(model)
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizer)]
    if not quantizers:
        raise ValueError("nothing to train under: the model is not prepared; run recoup.prepare first")
    for quantizer in quantizers:
        if not quantizer.calibrated:
            raise ValueError(
                f"{quantizer.path}: its range is not known; run recoup.calibrate(model, batches) first"
            )
    _check_float32(model)


@torch.no_grad()
def check_training(model: nn.Module, batch: Batch, settings: TrainSettings) -> None:
    """Could a float model be trained so, once it is prepared? Runs it once, in evaluation mode.

    Raises:
        ValueError: it has parameters that are not float32, state that is no tensor, or no layers whose
            activations could be computed again; or it returns nothing that the loss could use.
    """
    _check_float32(model)
    check_state(model)
    if settings.activation_checkpointing:
        check_layers(model, quiet="task" not in names_of(settings.loss))
    batch = moved(batch, device_of(model))
    with evaluating(model):
        output = call(model, batch)
    build_loss(settings.loss, settings.temperature, output)(output, output, batch)


def _check_float32(model: nn.Module) -> None:
    low = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if low:
        raise ValueError(
            f"{low[0]} and {len(low) - 1} more parameters are not float32; training needs float32 master "
            "weights: call model.float() before recoup.prepare"
        )
