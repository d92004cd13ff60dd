"""The only room that steps an optimizer on the task."""

from recoup.train.batch_norm import add_batch_norm, check_batch_norm, merge_batch_norm
from recoup.train.examination import Examination
from recoup.train.fingerprint import fingerprint
from recoup.train.finite import NonFiniteLossError
from recoup.train.lora import add_lora, check_lora, check_scales, merge_lora
from recoup.train.lora_files import load_lora, save_lora
from recoup.train.losses import LOSSES
from recoup.train.param_groups import check_scales_are_trained, param_groups
from recoup.train.progressive import check_progressive
from recoup.train.schedule import warmup_cosine
from recoup.train.snapshot import check_state
from recoup.train.teacher import float_copy
from recoup.train.train import train
from recoup.train.trainable import check_trainable, check_training

__all__ = [
    "LOSSES",
    "Examination",
    "NonFiniteLossError",
    "add_batch_norm",
    "add_lora",
    "check_batch_norm",
    "check_lora",
    "check_progressive",
    "check_scales",
    "check_scales_are_trained",
    "check_state",
    "check_trainable",
    "check_training",
    "fingerprint",
    "float_copy",
    "load_lora",
    "merge_batch_norm",
    "merge_lora",
    "param_groups",
    "save_lora",
    "train",
    "warmup_cosine",
]
