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
torch.compile   never comes here: a compiled model runs the equation, which inductor fuses itself

Without gradients nothing is remembered: an evaluation is right whatever hands wrote. What stays unseen is a
write through `.data` by other hands than an optimizer's, between two training passes and without a step.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from recoup.nn.fake_quantizer import FakeQuantizer
from recoup.numerics.kernels import Kept

_kept: WeakKeyDictionary[FakeQuantizer, tuple[tuple[Any, ...], Kept]] = WeakKeyDictionary()
_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def kept_weight(quantizer: FakeQuantizer, weight: Tensor) -> Kept:
    """The codes of a weight's 2-D view; decided again only if it, or its scales, may have changed.

    Raises:
        NonFiniteError: the weight is not finite.
    """
    training = torch.is_grad_enabled()
    state = [weight, *quantizer.parameters(), *quantizer.buffers()]
    if not training or any(tensor.is_inference() for tensor in state):  # those have no version number
        return _decided(quantizer, weight)
    places = tuple(
        (StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset(), tensor.dtype) for tensor in state
    )
    times = (_steps, quantizer.loads, *(tensor._version for tensor in state))  # pyright: ignore[reportPrivateUsage]
    key = (quantizer.spec, quantizer.impl, places), times
    found = _kept.get(quantizer)
    if found is None or found[0] != key:
        # A tensor that was written to in place has no gradient from before any more, and so its bytes too
        # may be written over. Another tensor's may be needed still.
        over = found[1].values if found is not None and found[0][0] == key[0] else None
        found = key, _decided(quantizer, weight, over)
        _kept[quantizer] = found
    return found[1]


def _decided(quantizer: FakeQuantizer, weight: Tensor, over: Tensor | None = None) -> Kept:
    if over is not None:
        torch.autograd.graph.increment_version(over)  # so that a backward pass from before notices
    return quantizer.kept(weight, quantizer.qparams(weight), over)
