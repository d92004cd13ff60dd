"""BatchNorm becomes part of the layer before it, and the function stays the same."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recoup import prepare, resolve
from recoup.nn import call
from recoup.transforms import fuse
from tests.models import MODELS, Residual, Row, every_model, images, run


def trained(model: nn.Module, *batches: Any) -> nn.Module:
    """With statistics and constants as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.2, 3.0)
            nn.init.normal_(module.bias)
    model.train()
    with torch.no_grad():
        for batch in batches:
            call(model, batch)
    return model.eval()


def norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


LAYERS: dict[str, tuple[Callable[[bool], nn.Module], Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "conv2d": (
        lambda bias: nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, padding_mode="reflect", bias=bias),
        lambda affine: nn.BatchNorm2d(8, eps=1e-3, affine=affine),
        (5, 4, 6, 6),
    ),
    "depthwise": (
        lambda bias: nn.Conv2d(4, 4, 3, groups=4, bias=bias),
        lambda affine: nn.BatchNorm2d(4, affine=affine),
        (5, 4, 6, 6),
    ),
    "conv1d": (
        lambda bias: nn.Conv1d(4, 8, 3, padding="same", bias=bias),
        lambda affine: nn.BatchNorm1d(8, affine=affine),
        (5, 4, 6),
    ),
    "conv3d": (
        lambda bias: nn.Conv3d(4, 8, 2, groups=2, bias=bias),
        lambda affine: nn.BatchNorm3d(8, affine=affine),
        (5, 4, 3, 4, 3),
    ),
    "transposed": (
        lambda bias: nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2, bias=bias),
        lambda affine: nn.BatchNorm2d(8, affine=affine),
        (5, 4, 3, 4),
    ),
    "linear": (
        lambda bias: nn.Linear(4, 8, bias=bias),
        lambda affine: nn.BatchNorm1d(8, affine=affine),
        (5, 4),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("bias", "affine"), [*product([True, False], repeat=2)])
def test_the_layer_computes_what_the_two_did(kind: str, bias: bool, affine: bool) -> None:
    build, build_norm, shape = LAYERS[kind]
    x = 3 * torch.randn(shape) + 1
    model = trained(nn.Sequential(build(bias), build_norm(affine), nn.ReLU()), x, 2 * x)
    layer, weight, old_bias = model[0], model[0].weight, model[0].bias
    exact = model.double()(x.double())  # in float64, so that the difference is what folding rounds
    model.float()
    before = model(x)
    assert fuse(model, x) is model
    assert isinstance(model[1], nn.Identity)
    assert norms(model) == []
    assert model[0] is layer
    assert model[0].weight is weight
    assert model[0].bias is old_bias or old_bias is None
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    # Weights and bias of the folded layer are the float64 ones, rounded once: 2^-24 of each of their terms.
    folded = model.double()(x.double())
    scale = weight.double().flatten(1).norm(dim=1).max() * x.norm() + model[0].bias.abs().max()
    assert (folded - exact).abs().max() <= 2**-24 * scale


def test_torchs_own_folding_agrees() -> None:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    x = torch.randn(5, 4, 6, 6)
    model = trained(nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)), x)
    expected = fuse_conv_bn_eval(*model)
    fuse(model, x)
    torch.testing.assert_close(model[0].weight, expected.weight)
    torch.testing.assert_close(model[0].bias, expected.bias)


def test_a_cnn_has_no_norm_left_and_quantizes_what_runs() -> None:
    x = images(4)
    model = trained(Residual(), x, images(8))
    before = run(model, x)
    fuse(model, x)
    assert norms(model) == []
    torch.testing.assert_close(run(model, x), before, rtol=1e-4, atol=1e-5)
    plan = resolve(model, "w8a8-static")
    assert set(plan.modules) == {"stem.0", "depthwise", "grouped"}
    assert "norm" not in plan.kept.values()
    prepare(model, plan)


@every_model
def test_a_model_without_batchnorm_is_not_even_run(row: Row) -> None:
    model = row.build()
    if norms(model):
        return
    before = list(model.modules())
    model.forward = None  # would raise
    assert fuse(model, row.batch()) is model
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_the_table_has_a_model_with_batchnorm() -> None:
    assert any(norms(row.build()) for row in MODELS)


class Net(nn.Module):
    """Two layers and a norm; `forward` says who reads what."""

    def __init__(self, forward: Callable[["Net", Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.second = norm or nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.compute = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def relu_in_place(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.relu_()
    return net.norm(y)


NOT_A_PAIR: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "a ReLU between": lambda net, x: net.norm(net.conv(x).relu()),
    "a ReLU in place between": relu_in_place,
    "a sum between": lambda net, x: net.norm(net.conv(x) + net.other(x)),
    "a copy between": lambda net, x: net.norm(y := net.conv(x).clone()) + y,
    "the norm runs twice": lambda net, x: net.norm(net.conv(x)) + net.norm(net.other(x)),
    "the layer runs twice": lambda net, x: net.norm(net.conv(x)) + net.conv(x + 1),
    "two norms read the layer": lambda net, x: net.norm(y := net.conv(x)) + net.second(y),
    "no layer before": lambda net, x: net.norm(torch.cat([x, x[:, :1]], dim=1)) + net.conv(x),
    "by keyword, after a sum": lambda net, x: net.norm(input=net.conv(x) + 1),
}


@pytest.mark.parametrize("forward", NOT_A_PAIR.values(), ids=NOT_A_PAIR)
def test_what_is_no_pair_stays(forward: Callable[[Net, Tensor], Tensor]) -> None:
    x = torch.randn(4, 3, 5, 5)
    model = trained(Net(forward), x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fuse(model, x)
    assert "norm" in norms(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # "norm" is what a plan says of it
    rules = {"scheme": "w8a8-static"}
    assert resolve(model, rules["scheme"]).kept["norm.weight"] == "norm"


def test_by_keyword_it_is_a_pair_too() -> None:
    x = torch.randn(4, 3, 5, 5)
    model = trained(Net(lambda net, x: net.norm(input=net.conv(x)) + net.second(net.other(x))), x)
    fuse(model, x)
    assert norms(model) == []


def test_a_norm_without_statistics_stays() -> None:
    x = torch.randn(4, 3, 5, 5)
    model = Net(lambda net, x: net.norm(net.conv(x)), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert norms(fuse(model, x)) == ["norm", "second"]


def test_the_channels_of_tokens_are_not_a_norms() -> None:
    """BatchNorm1d on (N, L, C) is of L, a Linear's outputs are C; here they are as many."""
    x = torch.randn(4, 8, 8)
    model = trained(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), x)
    assert norms(fuse(model, x)) == ["1"]


USED_ELSEWHERE: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "read twice": lambda net, x: net.norm(y := net.conv(x)) + y,
    "read twice, where another pair is fine": lambda net, x: (
        net.norm(y := net.conv(x)) + y + net.second(net.other(x))
    ),
}


@pytest.mark.parametrize("forward", USED_ELSEWHERE.values(), ids=USED_ELSEWHERE)
def test_a_layer_that_others_read_too_is_refused_by_name_and_nothing_is_changed(
    forward: Callable[[Net, Tensor], Tensor],
) -> None:
    x = torch.randn(4, 3, 5, 5)
    model = trained(Net(forward), x).train()
    model.norm.eval()
    before = dict(vars(model)["_modules"])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    modes = [module.training for module in model.modules()]
    message = (
        r"^conv: with norm folded into it the model's outputs differ by [\d.]+ \(relative, RMS\), where "
        r"rounding explains [\d.]+e-0\d, as when its output is used elsewhere too; give the norm a copy "
        r"\(x\.clone\(\)\), and it stays as it is$"
    )
    with pytest.raises(ValueError, match=message):
        fuse(model, x)
    assert dict(vars(model)["_modules"]) == before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_tied_weight_is_refused() -> None:
    x = torch.randn(4, 3, 5, 5)
    model = Net(lambda net, x: net.norm(net.conv(x)) + net.other(x))
    model.other.weight = model.conv.weight
    trained(model, x)
    with pytest.raises(ValueError, match=r"^conv: with norm folded into it"):
        fuse(model, x)


def test_training_and_evaluation_modes_are_left_as_they_were() -> None:
    model = trained(Residual(), images(4)).train()
    model.stem.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    tracked = int(model.norm.num_batches_tracked)
    fuse(model, images(2))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert tracked == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_frozen_layer_gets_a_frozen_bias() -> None:
    x = torch.randn(5, 4, 6, 6)
    model = trained(nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)), x)
    model[0].weight.requires_grad_(False)
    fuse(model, x)
    assert not model[0].bias.requires_grad


def test_a_norm_under_two_names_is_replaced_at_both() -> None:
    x = torch.randn(5, 4, 6, 6)
    model = trained(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)), x)
    model.alias = model[1]
    model.forward = lambda x: model[1](model[0](x))
    fuse(model, x)
    assert model[1] is model.alias
    assert isinstance(model.alias, nn.Identity)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("depth", [1, 8])
def test_rounding_of_deep_networks_is_no_reason_to_refuse(depth: int, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    x = 5 * torch.randn(8, 8, 6, 6) + 3
    model = trained(nn.Sequential(*layers), *([x] * 5))
    model[1].running_var[0] = 1e-4  # a channel that is nearly dead, and loud
    assert norms(fuse(model, x)) == []


@dataclass
class Output:
    found: Any
    name: str = "logits"


class Opaque:
    def __init__(self, found: Tensor) -> None:
        self.found = found


def test_the_fields_of_a_dataclass_are_compared() -> None:
    x = torch.randn(4, 3, 5, 5)
    good = trained(Net(lambda net, x: Output(found=[net.norm(net.conv(x))])), x)
    assert norms(fuse(good, x)) == ["second"]
    bad = trained(Net(lambda net, x: Output(found=net.norm(y := net.conv(x)) + y)), x)
    with pytest.raises(ValueError, match=r"^conv: with norm folded into it"):
        fuse(bad, x)


def test_where_nothing_can_be_compared_every_norm_stays() -> None:
    x = torch.randn(4, 3, 5, 5)
    model = trained(Net(lambda net, x: Opaque(net.norm(net.conv(x)))), x)
    assert norms(fuse(model, x)) == ["norm", "second"]


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_pruned_layer_is_left_alone(what: str) -> None:
    from torch.nn.utils import prune

    x = torch.randn(4, 3, 5, 5)
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x)
    prune.random_unstructured(model[0], what, amount=0.5)
    expected = model(x)
    assert norms(fuse(model, x)) == ["1"]
    assert torch.equal(model(x), expected)
