"""Promise 2: every parameter is accounted for, once, from the plan to the converted model."""

import torch

from recoup import calibrate, convert, explain, prepare, resolve
from recoup.schemes import Scheme
from tests.models import Row, every_pair


@every_pair
def test_every_number_of_the_float_model_is_in_the_converted_one(row: Row, scheme: Scheme) -> None:
    model = row.build()
    before = {name: value.clone() for name, value in model.named_parameters()}
    plan = resolve(model, scheme)
    lines = {line.parameter: line for line in explain(model, plan).rows}
    assert list(lines) == list(before)
    prepare(model, plan)
    convert(calibrate(model, [row.batch()]))
    after = model.state_dict()
    for name, value in before.items():
        if lines[name].reason == "bias: int32 steps of the products":
            assert lines[name].scheme == scheme.name
            module = name.removesuffix(".bias")
            step = (after[f"{module}.input_quantizer.scale"] * after[f"{module}.weight.scale"]).flatten()
            assert ((after[name] - value).abs() <= step / 2 + 2**-22 * value.abs()).all()  # three roundings
        elif lines[name].reason:
            assert lines[name].scheme == "float"
            assert torch.equal(after[name], value)
        else:
            assert lines[name].scheme == scheme.name
            assert name not in after
            assert after[f"{name}.codes"].numel() == value.numel()
