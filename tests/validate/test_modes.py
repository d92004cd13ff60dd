"""What behaves otherwise in training is caught when it runs in a measurement, before it changes anything."""

import pytest
import torch
from torch import Tensor, nn

from recoup import prepare, resolve
from recoup.nn import quantization_off
from recoup.validate.modes import evaluation


class Net(nn.Module):
    def __init__(self, norm: nn.Module, drop: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(norm, drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


X = {
    nn.BatchNorm1d: (4, 3),
    nn.BatchNorm2d: (4, 3, 2, 2),
    nn.BatchNorm3d: (4, 3, 2, 2, 2),
    nn.Dropout: (4, 3),
    nn.Dropout2d: (4, 3, 2, 2),
    nn.AlphaDropout: (4, 3),
}
NORMS = [kind for kind in X if "Norm" in kind.__name__]
DROPS = [kind for kind in X if "Drop" in kind.__name__]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_in_training_mode_is_named_and_its_statistics_are_not_moved(kind: type[nn.Module]) -> None:
    model = Net(kind(3), nn.Identity())
    message = (
        rf"^layers\.0: a {kind.__name__} runs in training mode, so its statistics come from the test "
        r"batches and are moved by them; call model\.eval\(\) in evaluate$"
    )
    with pytest.raises(ValueError, match=message), evaluation(model):
        model(torch.randn(X[kind]))
    assert int(model.layers[0].num_batches_tracked) == 0
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", DROPS)
def test_a_dropout_in_training_mode_is_named(kind: type[nn.Module]) -> None:
    model = Net(nn.Identity(), kind(0.1))
    message = (
        rf"^layers\.1: a {kind.__name__} runs in training mode, so it drops values at random from what "
        r"is measured; call model\.eval\(\) in evaluate$"
    )
    with pytest.raises(ValueError, match=message), evaluation(model):
        model(torch.randn(X[kind]))
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", X)
def test_in_evaluation_nothing_changes(kind: type[nn.Module]) -> None:
    layer = kind(3) if kind in NORMS else kind(0.5)
    model, x = Net(layer, nn.Identity()), torch.randn(X[kind])
    expected = model.eval()(x)
    model.train()
    with evaluation(model):
        assert torch.equal(model.eval()(x), expected)  # the code inside says it itself
    assert hooks(model) == 0


def test_what_does_not_run_or_drops_nothing_may_be_in_training_mode() -> None:
    model = Net(nn.LayerNorm(3), nn.Dropout(0.0)).train()
    model.unused = nn.Dropout(0.5)
    with evaluation(model):
        model(torch.randn(4, 3))
    assert model.training


def test_one_module_left_in_training_mode_is_enough() -> None:
    model = Net(nn.BatchNorm1d(3), nn.Dropout(0.5)).eval()
    model.layers[1].train()
    with pytest.raises(ValueError, match=r"^layers\.1: a Dropout runs"), evaluation(model):
        model(torch.randn(4, 3))


def test_a_model_that_is_itself_the_norm() -> None:
    with (
        pytest.raises(ValueError, match=r"^the model: a BatchNorm1d runs"),
        evaluation(model := nn.BatchNorm1d(3)),
    ):
        model(torch.randn(4, 3))


def test_hooks_go_when_the_code_inside_fails() -> None:
    model = Net(nn.BatchNorm1d(3), nn.Dropout(0.5))
    with pytest.raises(KeyError), evaluation(model):
        raise KeyError
    assert hooks(model) == 0


class StochasticDepth(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x


class Functional(nn.Module):
    """As attention in transformers: the share is an attribute, the dropout a function."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.attention_dropout = share
        self.config = {"hidden_dropout": 0.5}

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.attention_dropout, self.training)


class Attention(nn.Module):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, dropout=share)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


RANDOM = [
    (StochasticDepth, r"^layers\.1: a StochasticDepth runs .* drops values at random"),
    (Functional, r"^layers\.1: a Functional runs .* drops values at random"),
    (Attention, r"^layers\.1\.attention: a MultiheadAttention runs .* drops values at random"),
    (lambda share: nn.RReLU(share / 2, share) if share else nn.ReLU(), r"^layers\.1: a RReLU .* its slopes"),
]


@pytest.mark.parametrize(("build", "message"), RANDOM)
def test_whatever_is_random_in_training_mode_is_named(build: type[nn.Module], message: str) -> None:
    x = torch.randn(4, 3)
    model = Net(nn.Identity(), build(0.2)).train()
    with pytest.raises(ValueError, match=message), evaluation(model):
        model(x)
    with evaluation(model):
        model.eval()(x)
    quiet = Net(nn.Identity(), build(0.0)).train()
    with evaluation(quiet):
        quiet(x)
    assert hooks(model) == hooks(quiet) == 0


def test_a_quantizer_that_is_off_is_named() -> None:
    model = prepare(nn.Sequential(nn.Linear(32, 32)), resolve(nn.Sequential(nn.Linear(32, 32)), "w4a16"))
    x = torch.randn(4, 32)
    message = (
        r"^0\.weight: its quantizer is off, so what is measured is the float model; leave out "
        r"quantization_off in evaluate, or set its enabled to True$"
    )
    with pytest.raises(ValueError, match=message), evaluation(model), quantization_off(model):
        model(x)
    with evaluation(model):
        model(x)
    assert hooks(model) == 0
