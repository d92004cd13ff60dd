"""Float to float, the same function: a model in the form in which it is quantized."""

from recoup.transforms.fuse import fuse

__all__ = ["fuse"]
