"""Where the error comes from."""

import copy

import pytest
import torch
from tests.models import recipe
from torch import Tensor, nn

from recoup import prepare, ptq, resolve
from recoup.nn import FakeQuantizer
from recoup.validate.layers import layer_errors


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 32)
        self.first = nn.Linear(32, 32)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(32, 32)
        self.head = nn.Linear(32, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.second(input=self.dropout(self.first(self.table(ids)))))


def test_every_module_is_compared_with_itself_on_the_inputs_it_gets() -> None:
    ids = torch.randint(0, 8, (4, 3))
    model = ptq(Two(), recipe("w4a8", ("table", "w4a16"), ("second", "w2a16")), [ids])
    float_model = copy.deepcopy(model).eval()
    found = layer_errors(model, ids)
    assert set(found) == {"table", "first", "second"}
    with torch.no_grad():
        x = ids
        for name in ("table", "first", "second"):
            layer = float_model.get_submodule(name)
            quantized = layer(x)
            for quantizer in layer.modules():
                if isinstance(quantizer, FakeQuantizer):
                    quantizer.enabled = False
            exact = layer(x)
            expected = float((quantized - exact).double().square().sum().sqrt())
            expected /= float(exact.double().square().sum().sqrt())
            # The difference is taken in float32 here and in float64 there.
            assert found[name] == pytest.approx(expected, rel=1e-5)
            x = quantized  # what the next one really gets
    assert found["second"] > found["first"] > 0


def test_the_model_is_as_it_was() -> None:
    model = prepare(Two(), resolve(Two(), "w4a16"))
    model.first.eval()
    modes = [module.training for module in model.modules()]
    layer_errors(model, torch.randint(0, 8, (2, 3)))
    assert [module.training for module in model.modules()] == modes
    assert all(module.enabled for module in model.modules() if isinstance(module, FakeQuantizer))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_batch_that_does_not_fit_leaves_no_hooks() -> None:
    model = prepare(Two(), resolve(Two(), "w4a16"))
    with pytest.raises(IndexError):
        layer_errors(model, torch.full((1, 1), 99))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_a_layer_whose_output_is_zero_gives_a_number() -> None:
    model = Two()
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.zero_()
    prepare(model, resolve(model, "w4a16"))
    assert layer_errors(model, torch.randint(0, 8, (2, 3)))["first"] == 0.0
