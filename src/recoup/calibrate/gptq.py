"""GPTQ: weights are rounded column by column, and what one column loses the later ones make up for.

For a layer y = Q(x) W^T the loss of a change dW is tr(dW H dW^T), with H the sum of Q(x)^T Q(x) over the
calibration data. Rounding column j by e_j, the best answer of the columns after it is
-e_j U[j, j+1:] / U[j, j], where U is the upper Cholesky factor of H^-1 (Frantar et al. 2022,
arXiv:2210.17323, algorithm 1). The columns with the largest inputs come first, while many others are left to
make up for them; those of a group together, so that its scale is chosen for what they are by then.

The layers are taken as one forward pass over all the data reaches them, so that each sees the inputs that
the quantized layers before it really give. An expert of a mixture sees the tokens that are routed to it, and
what its rounded first matrix makes of them goes into its second. What is stored is each column as it was
just before it was rounded: round-to-nearest of these weights is GPTQ's solution, so fake quantization,
training and export go on as ever, and a training that follows still has a float weight to move.
"""

import copy
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recoup.calibrate.as_one import as_one, check_batches, check_ready
from recoup.calibrate.observers import best_share
from recoup.nn import (
    DEFAULT_SAMPLES,
    Batch,
    FakeQuantizer,
    QuantConv1D,
    QuantExperts,
    QuantLinear,
    call,
    device_of,
    evaluating,
    is_prepared,
    moved,
    norm_of,
    quantizers_of,
    take,
    without_labels,
)
from recoup.numerics import QParams, choose_qparams, extrema, fake_quantize, per_channel, qparams_of
from recoup.progress import progress

_DAMPING = 0.1  # of the mean diagonal of H; with the 0.01 of the paper, it follows few tokens too closely
_LAZY = 128  # columns after which the others are brought up to date; the paper's B


@torch.no_grad()
def gptq(model: nn.Module, batches: Iterable[Batch], *, samples: int | None = None) -> nn.Module:
    """Move linear layers' weights so that rounding costs their outputs less; in place, returns the model.

    Scales of groups are chosen anew, for the least error of a layer's output with its columns taken as
    independent. Those of whole rows and tensors stay as calibrated, since siblings may share them and biases
    have made room in them; so do those of inputs. Convolutions, embeddings, LSTMs, GRUs, weights that several
    modules share, layers that a pass runs more than once and experts to which no token goes stay as they are.
    The float model is lost: copy a teacher before.

    Args:
        model: prepared and calibrated.
        batches: all of one shape; they go through the model as one.
        samples: how many to see; see `calibrate`.

    Raises:
        ValueError: the model is not prepared or not calibrated, or has nothing to move; weights with dynamic
            ranges, or not in float32; fewer samples than asked, or batches of several shapes; a layer that no
            batch reaches.

    >>> import torch
    >>> from recoup import calibrate, prepare, resolve
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(64, 32)), torch.randn(256, 64)
    >>> with torch.no_grad():
    ...     y = model(x)
    ...     nearest = calibrate(prepare(model, resolve(model, "w2a16")), [x], observer="mse")(x)
    ...     bool((gptq(model, [x])(x) - y).norm() < (nearest - y).norm())
    True
    """
    taken = [without_labels(batch) for batch in take(batches, samples or DEFAULT_SAMPLES)]
    check_layers(model)
    check_batches(taken, "gptq")
    check_ready(model, taken, samples, "gptq", "gptq")
    layers = _run_once(model, _layers(model), taken[0])
    left, losses = dict(layers), _Losses()

    def compensate(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if left.pop(module, None) is not None:
            if isinstance(module, QuantExperts):
                _compensate_experts(module, losses, *arguments, **named)
            else:
                _compensate(cast(Any, module), next(iter((*arguments, *named.values()))), losses)
            advance("rounding as GPTQ does")

    def stop_after_the_last(*_: Any) -> None:
        if not left:
            raise _AllDone

    handles = [module.register_forward_pre_hook(compensate, with_kwargs=True) for module in layers]
    handles += [module.register_forward_hook(stop_after_the_last) for module in layers]
    try:
        with (
            suppress(_AllDone),  # what follows, as the head of a language model, costs memory for nothing
            evaluating(model),
            progress("rounding as GPTQ does", len(layers)) as advance,
        ):
            call(model, moved(as_one(taken), device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return model


def check_layers(model: nn.Module) -> None:
    """Has a prepared model something that GPTQ can move?

    Raises:
        ValueError: it has not; says why.
    """
    if not any(isinstance(module, FakeQuantizer) for module in model.modules()):
        raise ValueError("gptq: the model is not prepared; run recoup.prepare and recoup.calibrate first")
    layers = _layers(model)
    if not layers:
        raise ValueError("gptq: the plan quantizes no linear layer with a weight of its own; leave it out")
    for module in cast(Any, layers):
        for name, quantizer in quantizers_of(module).items():
            if getattr(module, "lora", None) is not None:
                raise ValueError(
                    f"{quantizer.path}: gptq moves the weight, and an adapter adds to it; call "
                    "recoup.merge_lora first"
                )
            if norm_of(module) is not None:
                raise ValueError(
                    f"{quantizer.path}: gptq moves the weight, and a norm scales it; call "
                    "recoup.merge_batch_norm first"
                )
            if quantizer.spec.ranges == "dynamic":
                raise ValueError(
                    f"{quantizer.path}: its scales follow the weight, and gptq decides them; use static "
                    "ranges"
                )
            dtype = module.get_parameter(name).dtype
            if dtype != torch.float32:
                raise ValueError(
                    f"{quantizer.path}: {dtype} cannot hold what gptq decides; call model.float() before "
                    "recoup.prepare"
                )


class _AllDone(Exception):  # noqa: N818 (not an error)
    """Every layer has been seen."""


def _layers(model: nn.Module) -> dict[nn.Module, str]:
    holders = Counter(parameter for m in model.modules() for parameter in m.parameters(recurse=False))
    layers: dict[nn.Module, str] = {}
    for module in model.modules():
        if is_prepared(module) and module.inputs_are in ("tokens", "routed"):
            layer, quantizers = cast(nn.Module, module), quantizers_of(module)
            if all(holders[layer.get_parameter(name)] == 1 for name in quantizers):
                layers[layer] = next(iter(quantizers.values())).path
    return layers


def _run_once(model: nn.Module, layers: dict[nn.Module, str], batch: Batch) -> dict[nn.Module, str]:
    """Those that a pass runs once: the inputs of the first run say nothing of those of the next.

    Raises:
        ValueError: one is not run at all.
    """
    calls = Counter[nn.Module]()

    def count(module: nn.Module, _: Any) -> None:
        calls[module] += 1

    handles = [module.register_forward_pre_hook(count) for module in layers]
    try:
        with evaluating(model):
            call(model, moved(batch, device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    for module, path in layers.items():
        if not calls[module]:
            raise ValueError(f"{path}: no batch reaches it, so GPTQ knows no inputs of it")
    return {module: path for module, path in layers.items() if calls[module] == 1}


class _Loss(NamedTuple):
    """What an error of a weight costs.

    Args:
        order: the columns, group by group: the most important group first, and so in every group.
        importance: of the columns in this order: the sums of squares of inputs, the damped diagonal of H.
        factor: U, of the columns in this order.
    """

    order: Int[Tensor, " c"]
    importance: Float[Tensor, " c"]
    factor: Float[Tensor, "c c"]


class _Losses:
    """That of the layer at hand; query, key and value see one input, and so do gate and up."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.size = 0
        self.found: _Loss | None = None

    def of(self, x: Float[Tensor, "n c"], size: int) -> _Loss:
        """From inputs, in float64, for groups of so many columns; a feature always 0 costs nothing."""
        known = self.x is not None and self.x.device == x.device and torch.equal(x, self.x)
        if self.found is None or not known or size != self.size:
            damped = (x.T @ x).double()
            diagonal = damped.diagonal()
            diagonal += _DAMPING * diagonal.mean() + (diagonal == 0)
            order = _order(diagonal, size)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
            factor = torch.linalg.cholesky(inverse, upper=True)
            self.x, self.size = x, size
            self.found = _Loss(order, diagonal[order].float(), factor.float())
        return self.found


def _order(importance: Float[Tensor, " c"], size: int) -> Int[Tensor, " c"]:
    """Columns by falling importance, those of a group together."""
    within = importance.view(-1, size).argsort(dim=1, descending=True, stable=True)
    groups = importance.view(-1, size).sum(dim=1).argsort(descending=True, stable=True)
    return (within + size * torch.arange(len(groups), device=within.device)[:, None])[groups].flatten()


def _compensate(module: QuantLinear | QuantConv1D, inputs: Tensor, losses: _Losses) -> None:
    x = module.input_quantizer(inputs).reshape(-1, inputs.shape[-1]).float()
    weight = module.matrix(cast(Any, module))
    weight.copy_(_compensated(weight.float(), x, module.weight_quantizer, losses))


def _compensate_experts(
    module: Any, losses: _Losses, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> None:
    """Every expert as Linears of its own, with the tokens that go to it; see `QuantExperts.forward`."""
    del top_k_weights  # it scales what an expert gives, all of it
    quantizers = quantizers_of(module)
    for expert in top_k_index.unique().tolist():
        x = hidden_states[torch.where(top_k_index.T.eq(expert))[1]]
        for name, of_all in quantizers.items():
            weight, quantizer = module.matrix_of(name, expert), _of_expert(of_all, expert, module.num_experts)
            seen = getattr(module, f"{name}_input_quantizer")(x)
            weight.copy_(_compensated(weight.float(), seen.float(), quantizer, losses))
            if name != "down_proj":
                x = module.inner(expert, seen, quantizer(weight))


def _of_expert(quantizer: FakeQuantizer, expert: int, experts: int) -> FakeQuantizer:
    """That of one matrix of a stack; it shares the scales."""
    found = copy.copy(quantizer)
    for registered in ("_parameters", "_buffers"):
        held = vars(found)[registered] = dict(vars(quantizer)[registered])
        for name, state in held.items():
            if state is not None and state.ndim == 2:
                part = state.detach().unflatten(0, (experts, -1))[expert]
                held[name] = nn.Parameter(part) if isinstance(state, nn.Parameter) else part
    return found


def _compensated(
    weight: Float[Tensor, "r c"], x: Float[Tensor, "n c"], quantizer: FakeQuantizer, losses: _Losses
) -> Float[Tensor, "r c"]:
    """The weight whose rounding is GPTQ's; sets the scales of groups in the quantizer."""
    columns = weight.shape[1]
    size = quantizer.spec.granularity.columns or columns
    loss, column = losses.of(x, size), replace(quantizer.spec, granularity=per_channel, ranges="static")
    weight, before_rounding = weight[:, loss.order], torch.empty_like(weight)
    for group in (slice(start, start + size) for start in range(0, columns, size)):
        index = int(loss.order[group.start]) // size
        if quantizer.spec.granularity.columns is not None:
            _choose_scale(quantizer, weight[:, group], loss.importance[group], index)
        scale = _scale_of_rows(quantizer.stored_qparams, len(weight), index)
        for start in range(group.start, group.stop, _LAZY):
            block = slice(start, min(start + _LAZY, group.stop))
            some, rows = weight[:, block], loss.factor[block, block]
            errors = torch.empty_like(some)
            for j in range(some.shape[1]):
                before_rounding[:, start + j] = some[:, j]
                rounded = fake_quantize(some[:, j : j + 1], scale, column)
                errors[:, j] = (some[:, j] - rounded[:, 0]) / rows[j, j]
                some[:, j + 1 :] -= torch.outer(errors[:, j], rows[j, j + 1 :])
            weight[:, block.stop :] -= errors @ loss.factor[block, block.stop :]
    return before_rounding[:, loss.order.argsort()]


def _choose_scale(quantizer: FakeQuantizer, group: Tensor, importance: Tensor, index: int) -> None:
    """That of the least error in what a group gives, as the columns before it left it."""
    spec, global_scale = replace(quantizer.spec, ranges="static"), quantizer.global_scale
    if spec.needs_values:
        found = qparams_of(group, spec, global_scale)
    else:
        lo, hi = extrema(group, spec.granularity)
        share = best_share(group, lo, hi, spec, global_scale, importance)
        found = choose_qparams(share * lo, share * hi, spec, global_scale)
    quantizer.keep(found, slice(index, index + 1))


def _scale_of_rows(stored: QParams, rows: int, index: int) -> QParams:
    """The qparams of one column of a group of columns, a scale for each row."""

    def of_rows(state: Tensor | None) -> Tensor | None:
        if state is None:
            return None
        return state[:, index : index + 1].repeat_interleave(rows // len(state), dim=0)

    scale = of_rows(stored.scale)
    assert scale is not None, "every lattice has a scale"
    return QParams(
        scale=scale,
        zero_point=of_rows(stored.zero_point),
        offset=of_rows(stored.offset),
        global_scale=stored.global_scale,
    )
