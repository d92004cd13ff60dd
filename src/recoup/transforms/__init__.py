"""Float to float, the same function: a model in the form in which it is quantized."""

from recoup.transforms.fuse import fuse
from recoup.transforms.smooth import smooth
from recoup.transforms.untie import untie
from recoup.transforms.weight_norm import fold_weight_norm

__all__ = ["fold_weight_norm", "fuse", "smooth", "untie"]
