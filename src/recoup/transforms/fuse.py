"""A BatchNorm right after a layer becomes part of it, as in every engine: what is quantized is what runs.

In evaluation a BatchNorm is y -> k y + c with constants for each channel, k = gamma / sqrt(var + eps) and
c = beta - k mean. So k (W x + b) + c is the layer with the weight k W and the bias k b + c.

Which layer stands right before a norm is seen by running the model, not by names.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from recoup.nn import Batch, call, device_of, evaluating, moved, quant_type, remember, weight_of
from recoup.transforms.weight_norm import fold_weight_norm

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | Transposed | nn.Linear
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
# The layers, and how many axes their output has where the norm's channels are the layer's outputs.
_AXES: dict[type[nn.Module], int] = {
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.Linear: 2,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    layer_name: str
    layer: Layer
    norm_name: str
    norm: Norm

    @property
    def factor(self) -> Tensor:
        """What the norm multiplies every channel by, in float64."""
        assert self.norm.running_var is not None
        scale = (self.norm.running_var.double() + self.norm.eps).rsqrt()
        return scale * self.norm.weight.double() if self.norm.affine else scale

    @property
    def mean(self) -> Tensor:
        """What the norm subtracts before that, in float64."""
        assert self.norm.running_mean is not None
        return self.norm.running_mean.double()


@torch.no_grad()
def fuse(model: nn.Module, example: Batch) -> nn.Module:
    """Fold every BatchNorm into the convolution or linear layer right before it; in place, returns the model.

    A norm is folded when its input is the very tensor that a convolution or an nn.Linear returned and each of
    the two runs once. It becomes an nn.Identity; the layer keeps its weight as the same Parameter,
    gets a bias if it had none, and remembers what the norm was, for `add_batch_norm`. Every other norm stays,
    and all do where the model returns no tensors to compare. A model without BatchNorm is not even run.
    Weight norm is folded before, as by `fold_weight_norm`.
    Never changes what the model computes in evaluation, nor which modules are in training mode.

    Args:
        model: float.
        example: a batch, to see which layer feeds which norm, and to compare the outputs with.

    Raises:
        ValueError: the outputs on the example change by more than rounding explains; the model is then as it
            was.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> fuse(model, torch.zeros(1, 3, 8, 8))[1], model[0].bias is None
    (Identity(), False)
    """
    fold_weight_norm(model)
    if not any(type(module) in _NORMS for module in model.modules()):
        return model
    example = moved(example, device_of(model))
    modes = {module: module.training for module in model.modules()}
    with evaluating(model):
        pairs = _pairs(model, example)
        if not pairs:
            return model
        before = call(model, example)
        if not any(True for _ in tensors_of(before)):
            return model
        with _shaken(pairs):
            allowed = 3 * _difference(before, call(model, example))  # 3 as in docs/decisions/0008

        undo = [_fold(model, pair, training=modes[pair.norm]) for pair in pairs]
        if not _difference(before, call(model, example)) <= allowed:
            for take_back in undo:
                take_back()
            drift, wrong = _worst(model, pairs, example, before)
            raise ValueError(
                f"{wrong.layer_name}: with {wrong.norm_name} folded into it the model's outputs differ by "
                f"{drift:.3g} (relative, RMS), where rounding explains {allowed:.3g}, as when its output is "
                "used elsewhere too; give the norm a copy (x.clone()), and it stays as it is"
            )
    for pair in pairs:
        remember(pair.layer, pair.norm)
    return model


def _worst(model: nn.Module, pairs: list[_Pair], example: Batch, before: Any) -> tuple[float, _Pair]:
    """The pair that changes the outputs most, alone."""
    drifts: list[float] = []
    for pair in pairs:
        take_back = _fold(model, pair, training=False)
        drifts.append(_difference(before, call(model, example)))
        take_back()
    return max(zip(drifts, pairs, strict=True), key=lambda drift_and_pair: drift_and_pair[0])


def _pairs(model: nn.Module, example: Batch) -> list[_Pair]:
    """The layers and norms that may become one, in the order in which they run."""
    runs: Counter[nn.Module] = Counter()
    made: Any = WeakTensorKeyDictionary()  # by identity; a tensor that is gone makes room
    followers: list[tuple[Layer, Norm]] = []

    def after(layer: nn.Module, _: Any, output: Tensor) -> None:
        runs[layer] += 1
        made[output] = layer, output._version  # an operation in place is no reading, but a change

    def before(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(norm, _NORMS)
        runs[norm] += 1
        x: Tensor = (*args, *kwargs.values())[0]
        if x in made:
            layer, version = made[x]
            if x._version == version and x.ndim == _AXES[type(layer)]:
                followers.append((layer, norm))

    handles = [
        module.register_forward_hook(after)
        if type(module) in _AXES
        else module.register_forward_pre_hook(before, with_kwargs=True)
        for module in model.modules()
        if _holds_its_own(module) or (isinstance(module, _NORMS) and module.running_mean is not None)
    ]
    try:
        call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in model.named_modules()}
    readers = Counter(layer for layer, _ in followers)
    return [
        _Pair(layer_name=names[layer], layer=layer, norm_name=names[norm], norm=norm)
        for layer, norm in followers
        if runs[layer] == runs[norm] == readers[layer] == 1
    ]


def _holds_its_own(module: nn.Module) -> bool:
    """A layer with weight and bias to fold into; one that is pruned computes them anew from others."""
    if type(module) not in _AXES:
        return False
    return isinstance(module.weight, nn.Parameter) and isinstance(module.bias, (nn.Parameter, type(None)))


def _fold(model: nn.Module, pair: _Pair, *, training: bool) -> Callable[[], None]:
    """Make the two one; what is returned takes it back."""
    layer, norm, factor = pair.layer, pair.norm, pair.factor
    weight, bias = layer.weight.clone(), cast(nn.Parameter | None, layer.bias)
    bias_value = None if bias is None else bias.clone()

    constant = (-pair.mean if bias is None else bias.double() - pair.mean) * factor
    constant = constant + norm.bias.double() if norm.affine else constant
    layer.weight.data.copy_(_scaled(layer, factor))
    if bias is None:
        made = nn.Parameter(constant.to(weight.dtype), requires_grad=layer.weight.requires_grad)
        layer.register_parameter("bias", made)
    else:
        bias.data.copy_(constant)
    identity = nn.Identity().train(training)
    _replace(model, norm, identity)

    def undo() -> None:
        layer.weight.data.copy_(weight)
        layer.register_parameter("bias", bias)
        if bias is not None and bias_value is not None:
            bias.data.copy_(bias_value)
        _replace(model, identity, norm)

    return undo


def _scaled(layer: Layer, factor: Tensor) -> Tensor:
    """The weight with every output channel multiplied by its factor, in float64."""
    weight = layer.weight.double()
    if isinstance(layer, Transposed):  # (inputs, outputs of a group, places)
        of_groups = weight.unflatten(0, (layer.groups, -1))
        return (of_groups * factor.reshape(layer.groups, 1, -1, *[1] * (weight.ndim - 2))).flatten(0, 1)
    return weight * factor.reshape(-1, *[1] * (weight.ndim - 1))


def _replace(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    for name, found in list(model.named_modules(remove_duplicate=False)):
        if found is module:
            model.set_submodule(name, other)


@contextmanager
def _shaken(pairs: list[_Pair]) -> Generator[None]:
    """The model with an error on the output of every layer of a pair, as large as folding may make one.

    A sum of n products of float32 numbers is off by about u sqrt(n) |w| rms(x), u = 2^-24 (Higham 2002,
    section 4.2), and a constant by u of its size. What a rounded weight does is alike at every place, so a
    channel has one sign.
    """
    signs = torch.Generator().manual_seed(0)

    def shake(pair: _Pair) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add_error(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            del layer
            kind = quant_type(pair.layer)
            assert kind is not None
            matrix = weight_of(kind, pair.layer, "weight").matrix.double()
            size = matrix.shape[1] ** 0.5 * matrix.norm(dim=1) * args[0].double().square().mean().sqrt()
            size = size + pair.mean.abs() + (0 if pair.layer.bias is None else pair.layer.bias.double().abs())
            sign = torch.randint(0, 2, size.shape, generator=signs).to(size.device) * 2 - 1
            error = sign * size * torch.finfo(y.dtype).eps / 2
            return y + error.to(y.dtype).reshape(-1, *[1] * (y.ndim - 2))

        return add_error

    handles = [pair.layer.register_forward_hook(shake(pair)) for pair in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _difference(reference: Any, other: Any) -> float:
    """Of all tensors among the outputs: relative, root mean square."""
    pairs = [(a.double(), b.double()) for a, b in zip(tensors_of(reference), tensors_of(other), strict=True)]
    squared = sum(float((a - b).square().sum()) for a, b in pairs)
    return (squared / max(sum(float(a.square().sum()) for a, _ in pairs), 1e-300)) ** 0.5


def tensors_of(output: Any) -> Iterator[Tensor]:
    """All that a model returns, whatever holds them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_of(value)
    elif is_dataclass(output):
        for field in fields(output):
            yield from tensors_of(getattr(output, field.name))
