"""Faster implementations of fake quantization. The values and gradients are the reference's, bit for bit.

    reference   `numerics.fake_quantize` itself: the specification, as eager torch runs it
    fused       torch's own operations over bytes, in place: `kept.py`
    compiled    the same with kernels that inductor makes, C++ or Triton: `compiled.py`

Read `carrier.py`, `place.py`, `kept.py`, `compiled.py`, `choose.py` and `functions.py`, in that order.
"""

from recoup.numerics.kernels.choose import KERNELS, Choice, Impl, Kernels, choose
from recoup.numerics.kernels.functions import fake_quantize, linear
from recoup.numerics.kernels.kept import Kept, NotFiniteError, matrices

__all__ = [
    "KERNELS",
    "Choice",
    "Impl",
    "Kept",
    "Kernels",
    "NotFiniteError",
    "choose",
    "fake_quantize",
    "linear",
    "matrices",
]
