"""The codes of a weight, decided once for each value that it takes.

They serve every forward and backward pass, of every micro-batch and every recomputation of a checkpointed
activation, until the weight may have changed. A stale code would train another model than it seems to, so
this file is about how a change is noticed:

plain           what writes in place, an optimizer or anyone under no_grad, moves the tensor's version number;
                another tensor has another storage, and a weak reference to the one before keeps its identity
                from being given away again
`.data`         moves no version number; but an optimizer that writes so takes a step, and every step of any
                torch.optim.Optimizer counts here
FSDP2           gathers the unsharded parameter anew without moving its version number; what changes the
                shards is an optimizer's step, or `load_state_dict`, which counts too
a seed          draws codes, while a training rounds stochastically; another one draws others
torch.compile   never comes here: a compiled model runs the equation, which inductor fuses itself

Without gradients nothing is remembered: an evaluation is right whatever hands wrote. What stays unseen is a
write through `.data` by other hands than an optimizer's, between two training passes and without a step.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.numerics import LowRank, QuantSpec, merged
from recoup.numerics.kernels import Kept


class _Entry(NamedTuple):
    spec: QuantSpec
    impl: str
    references: list[StorageWeakRef]  # which keep the identities in `places` from being given away again
    places: list[tuple[int, int | torch.SymInt, torch.dtype]]
    times: tuple[int, int, int | None, list[int]]
    codes: Kept


_kept: WeakKeyDictionary[FakeQuantizer, _Entry] = WeakKeyDictionary()
_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def kept_weight(
    quantizer: FakeQuantizer, weight: Tensor, low_rank: LowRank | None = None, view: Tensor | None = None
) -> Kept:
    """The codes of a weight's 2-D view; decided again only if it, or its scales, may have changed.

    With a product of low rank beside it, they are the codes of the sum, which nothing keeps.

    Args:
        quantizer: of the weight.
        weight: whose changes are noticed.
        low_rank: a product beside it, or none.
        view: its 2-D view, where it is not that itself.

    Raises:
        NonFiniteError: the weight is not finite.
    """
    view = weight if view is None else view
    product = () if low_rank is None else (low_rank.A, low_rank.B)
    scales = (quantizer.scale, quantizer.zero_point, quantizer.offset, quantizer.global_scale)
    held = (weight, *product, *scales)
    state = [tensor for tensor in held if tensor is not None]
    if not torch.is_grad_enabled() or any(tensor.is_inference() for tensor in state):
        return _decided(quantizer, merged(view, low_rank))  # inference tensors have no version number
    storages = [tensor.untyped_storage() for tensor in state]
    places = [(s._cdata, t.storage_offset(), t.dtype) for s, t in zip(storages, state, strict=True)]  # pyright: ignore[reportPrivateUsage]
    versions = [tensor._version for tensor in state]  # pyright: ignore[reportPrivateUsage]
    times = _steps, quantizer.loads, quantizer.seed, versions
    found = _kept.get(quantizer)
    if found is None or (found.spec, found.impl, found.places) != (quantizer.spec, quantizer.impl, places):
        before, references = None, [StorageWeakRef(storage) for storage in storages]
    elif found.times != times:
        # A tensor that was written to in place has no gradient from before any more, and so its bytes too
        # may be written over. Another tensor's may be needed still.
        before, references = found.codes, found.references
    else:
        return found.codes
    with torch.no_grad():
        codes = _decided(quantizer, merged(view, low_rank), before)
    _kept[quantizer] = _Entry(quantizer.spec, quantizer.impl, references, places, times, codes)
    return codes


def _decided(quantizer: FakeQuantizer, weight: Tensor, before: Kept | None = None) -> Kept:
    if before is not None:
        torch.autograd.graph.increment_version(before.values)  # so that a backward pass from before notices
    return quantizer.kept(weight, quantizer.qparams(weight), before)
