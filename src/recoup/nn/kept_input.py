"""The codes of an input, decided once for all layers that read it one after the other.

Query, key and value read the same tensor, and so do gate and up. With dynamic ranges and one lattice they
decide the same codes, so the last ones are remembered until another input comes. It is the same input if it
is the same view of the same storage and nobody wrote to it since: storages are held by a weak reference,
which keeps their identity from being given away again, and writing moves the version number. Writes through
`.data` between two layers of one forward pass stay unseen. Without gradients nothing is remembered.
"""

import threading
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.numerics.kernels import Kept

_last = threading.local()


def kept_input(quantizer: FakeQuantizer, x: Tensor) -> Kept:
    """The codes of an input's 2-D view.

    Raises:
        NonFiniteError: the input is not finite.
        RuntimeError: the quantizer is not calibrated yet.
    """
    view = quantizer.view(x)
    if quantizer.scale is not None or quantizer.global_scale is not None:  # of this layer alone
        return quantizer.kept(view, quantizer.qparams(view))
    if not torch.is_grad_enabled() or view.is_inference():  # that has no version number
        return quantizer.kept(view)
    where = (view.storage_offset(), view.shape, view.stride(), view.dtype, view._version)  # pyright: ignore[reportPrivateUsage]
    key = (quantizer.spec, quantizer.impl, StorageWeakRef(view.untyped_storage()), *where)
    found: tuple[tuple[Any, ...], Kept] | None = vars(_last).pop("input", None)
    if found is None or found[0] != key:
        found = None  # the codes before need not outlive the making of these
        found = key, quantizer.kept(view)
    _last.input = found
    return found[1]
