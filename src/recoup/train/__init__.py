"""The only room that steps an optimizer on the task."""

from recoup.train.finite import NonFiniteLoss
from recoup.train.losses import LOSSES
from recoup.train.param_groups import check_scales_are_trained, param_groups
from recoup.train.train import float_copy, train, warmup_cosine

__all__ = [
    "LOSSES",
    "NonFiniteLoss",
    "check_scales_are_trained",
    "float_copy",
    "param_groups",
    "train",
    "warmup_cosine",
]
