"""What stays in float without a rule, and with which reason."""

import pytest
import torch
from torch import nn

from recoup import prepare, resolve
from recoup.nn import quantization_off


class Scaled(nn.Embedding):
    """As Gemma's: an embedding that multiplies."""


class PlaceEmbeddings(nn.Module):
    """As those of vision models: a Parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(64, 32))


def test_embeddings_of_types_of_their_own_stay_as_embeddings() -> None:
    plan = resolve(nn.Sequential(Scaled(64, 32), PlaceEmbeddings(), nn.Linear(32, 32)), "w4a16")
    assert list(plan.modules) == ["2"]
    for path in ("0.weight", "1.places"):
        assert plan.kept[path].startswith(
            "embedding, and no quantized form of tests.prepare.test_left_in_float."
        )


@pytest.mark.parametrize(("width", "is_little"), [(16, True), (20, False)])
def test_one_part_in_twenty_of_the_matrices_may_be_without_a_form(width: int, is_little: bool) -> None:
    """8 x 4 x `width` numbers next to 96 x 128: 4.0 and 5.0 %."""
    model = nn.Sequential(nn.Linear(128, 96), nn.Bilinear(4, width, 8), nn.Bilinear(2, 2, 2))
    if is_little:
        assert resolve(model, "w4a16").kept["1.weight"].startswith("no quantized form of torch.nn")
        return
    with pytest.raises(
        ValueError, match=r"^5% of the matrices would stay in float: 1.weight \(8 x 4 x 20, no"
    ):
        resolve(model, "w4a16")


def test_falcons_linear_layer_is_one() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    layer, x = FalconLinear(64, 8, bias=False), torch.randn(3, 64)
    model = prepare(nn.Sequential(layer), resolve(nn.Sequential(layer), "w4a16"))
    with quantization_off(model):
        torch.testing.assert_close(model(x), layer(x), rtol=1e-5, atol=1e-5)
