"""The only room that steps an optimizer on the task."""

from recoup.train.examination import Examination
from recoup.train.fingerprint import fingerprint
from recoup.train.finite import NonFiniteLossError
from recoup.train.losses import LOSSES
from recoup.train.objective import float_copy
from recoup.train.param_groups import check_scales_are_trained, param_groups
from recoup.train.snapshot import check_state
from recoup.train.train import train, warmup_cosine
from recoup.train.trainable import check_trainable, check_training

__all__ = [
    "LOSSES",
    "Examination",
    "NonFiniteLossError",
    "check_scales_are_trained",
    "check_state",
    "check_trainable",
    "check_training",
    "fingerprint",
    "float_copy",
    "param_groups",
    "train",
    "warmup_cosine",
]
