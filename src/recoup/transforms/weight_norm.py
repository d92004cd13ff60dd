"""A weight that is normalized becomes a weight: what is quantized is what is multiplied.

w = g v / |v| (Salimans and Kingma 2016, eq. 2) is a way to train: g and v are Parameters, and w is none.
Engines hold w, and rounding g and v would round it twice. So it is folded, as BatchNorm is, not rounded as
it is computed, which would leave two Parameters in `state_dict` for the codes of one.
"""

from torch import nn
from torch.nn.utils import parametrize, remove_weight_norm

from recoup.nn import normed_weights


def fold_weight_norm(model: nn.Module) -> nn.Module:
    """Put the weight in place of its length and direction, in both forms that torch has; returns the model.

    Never changes what the model computes. The weight is a new Parameter, trainable if one of the two was: an
    optimizer made earlier does not know it.

    >>> model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(32, 4)))
    >>> [name for name, _ in fold_weight_norm(model).named_parameters()]
    ['0.bias', '0.weight']
    """
    for module in list(model.modules()):
        for name, parts in normed_weights(module).items():
            if parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name)
            else:
                remove_weight_norm(module, name)
            weight = getattr(module, name).detach()
            delattr(module, name)  # torch leaves a buffer where nothing was trainable
            trainable = any(part.requires_grad for part in parts)
            module.register_parameter(name, nn.Parameter(weight, requires_grad=trainable))
    return model
