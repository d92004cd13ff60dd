"""Promise 1: the fake quantizer is the encode-decode of what ships."""

import torch

from recoup import calibrate, convert, prepare, resolve
from recoup.nn import call, is_coded, is_prepared, quantization_off
from recoup.schemes import Scheme
from tests.models import Row, every_pair, recipe, run, same, tensors


@every_pair
def test_trained_converted_and_decoded_are_one(row: Row, scheme: Scheme) -> None:
    model, batch = row.build().eval(), row.batch()
    prepare(model, resolve(model, recipe(scheme, weight_ranges="learned")))
    calibrate(model, [batch])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sum(output.square().mean() for output in tensors(call(model, batch))).backward()
    optimizer.step()

    trained = {
        name: module.weight_quantizer(module.matrix(module)).detach()
        for name, module in model.named_modules()
        if is_prepared(module)
    }
    computed = run(model, batch)
    with quantization_off(model):
        assert not same(run(model, batch), computed)
    convert(model)
    coded = {name: module for name, module in model.named_modules() if is_coded(module)}
    assert set(coded) == set(trained) == row.quantized
    for name, module in coded.items():
        assert torch.equal(module.weight.decode(), trained[name])
        grid = module.weight.spec.format
        values = grid.decode(module.weight.codes)
        assert values.isfinite().all()
        assert grid.lo <= float(values.min()) < float(values.max()) <= grid.hi
        assert torch.equal(grid.encode(values), module.weight.codes)
    assert same(run(model, batch), computed)
