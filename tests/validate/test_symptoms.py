"""Each symptom is found in a tensor that was driven into it, with its figure and its remedy; and no other."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.models import recipe
from tests.numerics.tables import CODED, FIXED, INTS, LEVELS, numbers_of
from torch import Tensor, nn

from recoup import calibrate, prepare, resolve
from recoup.numerics import IntFormat, quantize
from recoup.numerics.granularity import cut
from recoup.schemes import PRESETS, Scheme
from recoup.validate.looks import SAMPLE, Look, looks
from recoup.validate.symptoms import half_steps, levels_of, of_an_evaluation, of_tensors, unchanged

WIDTH = 64
LEARNED = {"weight_ranges": "learned"}
SLOWER = "lower train.scale_learning_rate, which is train.learning_rate where it is absent"


def prepared(scheme: Scheme | str = "w4a16", **fields: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    prepare(model, resolve(model, recipe(scheme, **fields)))
    return calibrate(model, [inputs()])


def inputs() -> Tensor:
    return torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))


def constant(model: Any) -> None:
    model[0].weight.fill_(0.5)


def shrunk_in_blocks(model: Any) -> None:
    model[0].weight[:, :32] *= 1e-3  # the first of the two blocks in every row


def scales_on_the_floor(model: Any) -> None:
    model[0].weight_quantizer.scale[:32] = 0.0


def scales_through_zero(model: Any) -> None:
    model[0].weight_quantizer.scale[:32] *= -0.5


def scales_too_small(model: Any) -> None:
    model[0].weight_quantizer.scale /= 4


def weights_too_large(model: Any) -> None:
    model[0].weight *= 4


def scales_too_large(model: Any) -> None:
    model[0].weight_quantizer.scale *= 8


def weights_too_small(model: Any) -> None:
    model[0].weight /= 8


def inputs_too_large(model: Any) -> None:
    model[0].weight *= 16
    model[0].weight_quantizer.scale *= 16


# In w4a16 a uniform weight is within 7.5 steps of zero; four times as large, 1 - 16 / 60 of it saturates.
DRIVEN: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "constant": (
        constant, "w4a16", {},
        "0.weight: dead: all of 4,096 sampled codes are equal; calibrate it again, with the observer mse; or "
        "keep the module in float, by a rule"),
    "constant, learned": (
        constant, "w4a16", LEARNED,
        f"0.weight: dead: all of 4,096 sampled codes are equal; {SLOWER}; or keep the module in float, by a "
        "rule"),
    "dead blocks": (
        shrunk_in_blocks, "w4a16", {},
        "0.weight: dead: in 64 of 128 sampled blocks all codes are equal; calibrate it again, with the "
        "observer mse; or keep the module in float, by a rule"),
    "floor": (
        scales_on_the_floor, "w4a16", LEARNED,
        f"0.weight: scale collapsed: 64 of 128 learned scales fell, to 0 times what they were; {SLOWER}"),
    "through zero": (
        scales_through_zero, "w4a16", LEARNED,
        f"0.weight: scale collapsed: 64 of 128 learned scales fell, to -0.5 times what they were; {SLOWER}"),
    "too small": (
        scales_too_small, "w4a16", LEARNED,
        f"0.weight: saturates: 74% of its values saturate, and 1% did at the start; {SLOWER}"),
    "too large weights": (
        weights_too_large, "w4a16", {},
        "0.weight: saturates: 74% of its values saturate, and 1% did at the start; lower "
        "train.learning_rate, or let its range be learned"),
    "grown": (
        scales_too_large, "w4a16", LEARNED,
        f"0.weight: few codes: 3 of its codes are used, and 16 were at the start; its scale grew: {SLOWER}"),
    "shrunk": (
        weights_too_small, "w4a16", {},
        "0.weight: few codes: 3 of its codes are used, and 16 were at the start; its values shrank: lower "
        "train.weight_decay or train.learning_rate, or let its range be learned"),
    "inputs": (
        inputs_too_large, "w8a8-static", LEARNED,
        "2.input: saturates: 35% of its values saturate, and 0% did at the start; lower "
        "train.learning_rate, or let its range be learned"),
}  # fmt: skip


@pytest.mark.parametrize(("drive", "scheme", "fields", "message"), DRIVEN.values(), ids=DRIVEN)
def test_a_tensor_that_was_driven_into_it(drive: Any, scheme: str, fields: Any, message: str) -> None:
    model = prepared(scheme, **fields)
    start = looks(model, inputs())
    with torch.no_grad():
        drive(model)
    assert [str(symptom) for symptom in of_tensors(start, looks(model, inputs()))] == [message]


def test_what_is_constant_as_it_was_given_is_not_dead() -> None:
    """Pruned rows of zeros lose nothing, and a block of a few values may have one code by chance."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    with torch.no_grad():
        model[0].weight[:48] = 0
    prepare(model, resolve(model, "w4a16"))
    now = looks(model, None)
    assert list(of_tensors(now, now)) == []
    small = nn.Sequential(nn.Conv2d(16, 16, 1, groups=16))
    prepare(small, resolve(small, "w8a8-static"))
    now = looks(small, None)
    assert list(of_tensors(now, now)) == []


def test_scales_of_blocks_of_zeros_may_fall() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    with torch.no_grad():
        model[0].weight[:48] = 0
    prepare(model, resolve(model, recipe("w4a16", **LEARNED)))
    start = looks(model, None)
    with torch.no_grad():
        model[0].weight[:48] = model[0].weight[48:].repeat(3, 1)
        model[0].weight_quantizer.scale[:48] = model[0].weight_quantizer.scale[48:].repeat(3, 1)
    assert list(of_tensors(start, looks(model, None))) == []


def moved(model: Any, amount: float) -> None:
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight += amount


def test_updates_below_half_a_step_change_nothing() -> None:
    """Every scale is 1 here, so half a step is 0.5, and values are in the middle of their codes."""
    model = prepared("w4a16")
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.round_()
            layer.weight_quantizer.scale.fill_(1.0)
    start = looks(model, None)
    assert str(unchanged(start, start, 4, 4)) == (
        "all weights: nothing changes: no weight moved since the start; see that gradients reach them; and "
        "raise train.learning_rate, which float32 may round away"
    )
    moved(model, 0.0625)
    now = looks(model, None)
    assert str(unchanged(start, now, 4, 4)) == (
        "all weights: nothing changes: none of 8,192 sampled codes changed since the start; the largest "
        "update is 0.125 times half a step between codes; raise train.learning_rate or train.steps, together "
        "8 times or more"
    )
    early = unchanged(start, now, 4, 16)
    assert early is not None
    assert early.remedy.endswith("together 2 times or more")
    assert unchanged(start, now, 4, 32) is None  # at this pace it gets there
    moved(model, 0.5)
    assert unchanged(start, looks(model, None), 4, 4) is None
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert unchanged(looks(model, None), looks(model, None), 4, 4) is None  # nothing was to be trained


GRIDS = [*(row.grid for row in CODED), *INTS, *FIXED, *LEVELS]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_levels_are_those_of_the_format(grid: Any) -> None:
    assert torch.equal(levels_of(grid), numbers_of(grid))


def test_half_a_step_is_half_of_the_smaller_gap_beside_the_code() -> None:
    """Of E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6; at 2 the gaps are 0.5 and 1, at 6 there is 2 alone."""
    quantizer = prepared("mxfp4a16")[0].weight_quantizer
    values = torch.tensor([[0.0, 2.0, 3.0, 6.0, -6.0]])
    start = Look(quantizer=quantizer, trained=True, position=values, scale=None)
    now = replace(start, position=values + 0.25)
    assert half_steps(start, now).tolist() == [[1.0, 1.0, 0.5, 0.25, 0.25]]


AFFINE = replace(PRESETS["w4a16"].weights, scale_rule="affine", format=IntFormat(4, signed=False))
SAMPLED = [*(PRESETS[name] for name in ("w4a16", "w8a8", "fp8-static", "fp8-block", "nvfp4a16", "q4_1")),
           Scheme(name="affine", weights=AFFINE)]  # fmt: skip


@pytest.mark.parametrize("given", SAMPLED, ids=lambda given: given.name)
def test_a_sample_has_the_codes_that_conversion_decides(given: Scheme) -> None:
    model: Any = nn.Sequential(nn.Linear(512, 512))
    prepare(model, resolve(model, given))
    look = looks(model, None)["0.weight"]
    assert 0 < look.values.numel() <= SAMPLE
    quantizer, weight = model[0].weight_quantizer, model[0].weight.detach()
    codes = quantizer.spec.format.decode(quantize(weight, quantizer.qparams(weight), quantizer.spec))
    every = cut(codes, quantizer.spec.granularity).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    for index, sampled in enumerate(look.values):
        block = every[index * len(every) // len(look.values)]
        assert set(sampled.tolist()) <= set(block.tolist())
        if len(sampled) == len(block):
            assert torch.equal(sampled, block)


def test_inputs_with_dynamic_ranges_are_not_looked_at_and_nothing_runs_for_them() -> None:
    model = prepared("w8a8")
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    assert set(looks(model, inputs())) == {"0.weight", "2.weight"}


def test_a_few_samples_of_a_batch_are_enough_where_all_of_it_is_samples() -> None:
    class Gathered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, WIDTH)
            self.seen: list[int] = []

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            self.seen.append(len(x))
            return self.up(x)[index]

    model, x = Gathered(), inputs()
    calibrate(prepare(model, resolve(model, "w8a8-static")), [(x, torch.arange(2))])
    for batch in ({"x": x, "index": torch.arange(32) % 4}, (x, torch.arange(8)), {"x": x, "index": 3}):
        assert set(looks(model, batch)) == {"up.weight", "up.input"}
    assert model.seen[-3:] == [2, 32, 32]


class Stubborn(nn.BatchNorm1d):
    """Frozen by hand, the wrong way round: `eval` does not reach it."""

    def train(self, mode: bool = True) -> "Stubborn":
        self.training = True
        return self


def test_a_look_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Stubborn(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH))
    calibrate(prepare(model, resolve(model, "w8a8-static")), [inputs()])
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert set(looks(model, inputs())) == {"0.weight", "0.input", "3.weight", "3.input"}
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_modes_and_switches_of_an_evaluation() -> None:
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), nn.LayerNorm(WIDTH)
    )
    prepare(model, resolve(model, "w4a16"))
    assert of_an_evaluation(model.eval()) == []
    model[0].weight_quantizer.enabled = False
    assert [str(symptom) for symptom in of_an_evaluation(model.train())] == [
        "0.weight: quantizer off: its enabled is False at an evaluation, which is then of the float model; "
        "set it to True, and use quantization_off(model), which sets it back",
        "1: training mode: at an evaluation a BatchNorm1d is in training mode, so its statistics come from "
        "the test batches and are moved by them; call model.eval(), and see that it reaches this module",
        "2: training mode: at an evaluation a Dropout is in training mode, so it drops values at random from "
        "what is measured; call model.eval(), and see that it reaches this module",
    ]
