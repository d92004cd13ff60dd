"""The twins: what a float model was, the prepared one still is."""

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from recoup import Plan, calibrate, prepare, resolve
from recoup.nn import FakeQuantizer, QuantLinear, is_prepared, quantization_off
from recoup.schemes import Scheme
from tests.models import (
    MLP,
    MODELS,
    PAIRS,
    SCHEMES,
    WIDTH,
    Row,
    Shared,
    Tied,
    every_pair,
    every_scheme,
    features,
    name_of,
    recipe,
    run,
    same,
)


def ready(row: Row, scheme: Scheme | str, *rules: tuple[str, Any], **fields: Any) -> nn.Module:
    """Prepared and calibrated, in evaluation."""
    model = row.build().eval()
    prepare(model, resolve(model, recipe(scheme, *rules, **fields)))
    return calibrate(model, [row.batch()])


@every_pair
def test_parameters_stay_the_same_objects_under_the_same_names(row: Row, scheme: Scheme) -> None:
    model = row.build()
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {name: value.clone() for name, value in model.state_dict().items()}
    plan = resolve(model, scheme)
    assert prepare(model, plan) is model
    after = dict(model.named_parameters(remove_duplicate=False))
    assert set(after) == set(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in values.items())
    added = {name.rpartition(".")[0] for name in set(state) - set(values)}
    assert all(name.endswith(("weight_quantizer", "input_quantizer")) for name in added)
    assert {name for name, module in model.named_modules() if is_prepared(module)} == row.quantized


@every_pair
def test_switched_off_it_is_the_float_model_bit_for_bit(row: Row, scheme: Scheme) -> None:
    model, batch = row.build().eval(), row.batch()
    before = run(model, batch)
    prepare(model, resolve(model, scheme))
    with quantization_off(model):
        assert same(run(model, batch), before)
    calibrate(model, [batch])
    assert not same(run(model, batch), before)
    with quantization_off(model):
        assert same(run(model, batch), before)
    assert all(module.enabled for module in model.modules() if isinstance(module, FakeQuantizer))


@pytest.mark.parametrize(
    ("row", "scheme", "ranges"),
    [*((*pair, None) for pair in PAIRS), *((MODELS[0], scheme, "learned") for scheme in SCHEMES)],
    ids=name_of,
)
def test_a_checkpoint_loads_strictly_and_gives_the_same_bits(
    row: Row, scheme: Scheme, ranges: str | None
) -> None:
    model, batch = ready(row, scheme, weight_ranges=ranges), row.batch()
    for name, parameter in model.named_parameters():
        if name.endswith("quantizer.scale"):
            parameter.data *= 1.1  # as training would
    assert ranges is None or "quantizer.scale" in " ".join(name for name, _ in model.named_parameters())
    fresh = row.build().eval()
    prepare(fresh, resolve(fresh, recipe(scheme, weight_ranges=ranges)))
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert same(run(fresh, batch), run(model, batch))


def test_a_checkpoint_from_before_calibration_is_not_calibrated() -> None:
    model = prepare(MLP(), resolve(MLP(), "w8a8-static"))
    other = prepare(MLP(), resolve(MLP(), "w8a8-static"))
    calibrate(other, [features()])
    run(other, features())
    other.load_state_dict(model.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match=r"up\.input: its range is not known"):
        run(other, features())


@every_scheme
def test_copies_are_equal_and_apart(scheme: Scheme) -> None:
    model, x = calibrate(prepare(MLP(), resolve(MLP(), scheme)), [features()]), features()
    expected = run(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(run(other, x), expected)
        other.up.weight.data.zero_()
        other.up.weight_quantizer.scale.fill_(3.0)
        assert same(run(model, x), expected)


def test_an_optimizer_made_earlier_trains_the_prepared_model() -> None:
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepare(model, resolve(model, "w4a8"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(features()).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    prepare(model, resolve(model, recipe("w4a16", ("positions", "w8a16"))))
    assert model.lm_head.weight is model.tokens.weight
    assert is_prepared(model.positions)


def test_a_shared_module_is_replaced_at_every_place_by_one_twin() -> None:
    model = Shared()
    prepare(model, resolve(model, "w8a8-static"))
    assert isinstance(model.first, QuantLinear)
    assert model.later[1] is model.first
    assert model.later[0] is not model.first
    calibrate(model, [features()])
    assert len([module for module in model.modules() if isinstance(module, FakeQuantizer)]) == 4


def test_flags_survive() -> None:
    model = MLP()
    model.down.eval()
    model.up.weight.requires_grad_(False)
    model.up.note = "mine"
    prepare(model, resolve(model, "w4a16"))
    assert [model.up.training, model.down.training, model.head.training] == [True, False, True]
    assert not model.up.weight.requires_grad
    assert model.up.note == "mine"
    assert (model.up.in_features, model.down.bias) == (WIDTH, None)


def test_hooks_survive_and_their_handles_still_remove_them() -> None:
    model, seen = MLP(), []
    handles = [
        model.up.register_forward_pre_hook(lambda module, args: seen.append("before")),
        model.up.register_forward_hook(
            lambda module, args, kwargs, y: seen.append("after"), with_kwargs=True
        ),
        model.up.register_full_backward_hook(lambda module, grads, outs: seen.append("backward")),
    ]
    prepare(model, resolve(model, "w4a16"))
    model(features().requires_grad_()).sum().backward()
    assert seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(features()).sum().backward()
    assert len(seen) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_scheme
def test_a_cast_of_the_model_never_moves_a_scale(scheme: Scheme, dtype: torch.dtype) -> None:
    for ranges in (None, "learned"):
        model = prepare(MLP(), resolve(MLP(), recipe(scheme, weight_ranges=ranges)))
        calibrate(model, [features()])
        quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizer)]
        before = [state.clone() for module in quantizers for state in module.state_dict().values()]
        model.to(dtype)
        after = [state for module in quantizers for state in module.state_dict().values()]
        assert model.up.weight.dtype == dtype
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert run(model, features().to(dtype))[0].dtype == dtype


def test_half_is_a_cast_too() -> None:
    model = prepare(MLP(), resolve(MLP(), "w4a16"))
    scale = model.up.weight_quantizer.scale.clone()
    model.half()
    assert torch.equal(model.up.weight_quantizer.scale, scale)
    assert not torch.equal(scale, scale.half().float())  # half would have moved it


def test_attention_that_a_rule_keeps_is_not_touched_nor_its_last_layer() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(32, 32), "attention": nn.MultiheadAttention(32, 2)})
    attention, out = model["attention"], model["attention"].out_proj
    plan = resolve(model, recipe("w4a16", ("attention", "none")))
    prepare(model, plan)
    assert plan.modules == {"plain": "w4a16"}
    assert model["attention"] is attention
    assert attention.out_proj is out


def nan_weight(model: MLP) -> None:
    model.down.weight.data[1, 2] = torch.nan


def infinite_weight(model: MLP) -> None:
    model.down.weight.data[1, 2] = -torch.inf


def replaced_forward(model: MLP) -> None:
    model.down.forward = model.down.forward  # as accelerate's hooks do


def no_such_module(model: MLP) -> None:
    model.down = nn.Identity()


def gone(model: MLP) -> None:
    del model.down


def prepared_already(model: MLP) -> None:
    model.down = prepare(MLP(), resolve(MLP(), "w4a16")).down


REFUSED = {
    nan_weight: "down.weight: saw values that are not finite",
    infinite_weight: "down.weight: saw values that are not finite",
    replaced_forward: "down: its forward was replaced on the instance, as accelerate does for device_map",
    no_such_module: "down: a torch.nn.modules.linear.Identity has no quantized form, or is prepared already",
    gone: "the plan quantizes 'down', which the model has not; resolve it for this model",
    prepared_already: "down: a recoup.nn.modules.QuantLinear has no quantized form, or is prepared already",
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.items(), ids=[damage.__name__ for damage in REFUSED])
def test_what_is_refused_leaves_the_model_as_it_was(damage: Any, message: str) -> None:
    model = MLP()
    plan = resolve(model, "w4a8")
    damage(model)
    modules, attributes = list(model.modules()), [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=r".") as error:
        prepare(model, plan)
    assert str(error.value).startswith(message)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [set(vars(module)) for module in model.modules()] == [set(kept) for kept in attributes]
    assert type(model.up) is nn.Linear
    assert set(model.up._modules) == set()


def test_a_layer_alone_is_refused() -> None:
    layer = nn.Linear(32, 4)
    with pytest.raises(
        ValueError, match=r"the model is itself the only layer; wrap it, as in nn\.Sequential"
    ):
        prepare(layer, resolve(layer, "w4a16"))
    assert type(layer) is nn.Linear


def test_a_plan_for_another_model() -> None:
    with pytest.raises(ValueError, match="the plan quantizes 'block', which the model has not"):
        prepare(MLP(), resolve(Tied(), "w4a16"))


def test_nothing_is_prepared_twice() -> None:
    model = MLP()
    plan = resolve(model, "w4a16")
    prepare(model, plan)
    with pytest.raises(ValueError, match=r"up: a .*QuantLinear has no quantized form"):
        prepare(model, plan)


def test_an_empty_plan_changes_nothing() -> None:
    model = MLP()
    before = list(model.modules())
    prepare(model, Plan())
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_torchs_own_encoder_kernel_cannot_go_around_quantization() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)).eval()
    plan = resolve(model, recipe("w2a16", ("0.self_attn", "none")))
    with pytest.raises(
        ValueError, match=r"^0: nn\.TransformerEncoderLayer runs 0\.linear1 with its float weight"
    ):
        prepare(model, plan)
    assert type(model[0].linear1) is nn.Linear
    x = torch.randn(2, 3, 32)
    torch.backends.mha.set_fastpath_enabled(False)  # what the message says
    try:
        before = run(model, x)
        prepare(model, plan)
        assert not same(run(model, x), before)
        assert torch.equal(run(model, x)[0], model(x).detach())
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


COMPILED = """
import torch
from recoup import calibrate, prepare, resolve
from tests.models import MLP, Residual, Tied, features, ids, images, recipe

CASES = [
    (MLP, features(), "nvfp4", "learned", []),
    (MLP, features(), "w8a8-ort-static", None, []),
    (Residual, images(), "w8a8-ort-static", "learned", []),
    (Tied, ids()["input_ids"], "w4a16", "learned", [("tokens", "w4a16"), ("lm_head", "w4a8")]),
]
for build, x, name, ranges, rules in CASES:
    model = build()
    prepare(model, resolve(model, recipe(name, *rules, weight_ranges=ranges)))
    calibrate(model, [x])
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="eager")):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name
print("identical")
"""


def test_compiles_into_one_graph_with_the_same_output_and_gradients(pytestconfig: pytest.Config) -> None:
    # Without this process's type checks, which Dynamo cannot trace.
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "identical", done.stderr[-3000:]


def test_the_table_has_every_kind_of_state() -> None:
    specs = [spec for scheme in SCHEMES for spec in (scheme.weights, scheme.inputs) if spec]
    assert any(not spec.symmetric and spec.ranges == "static" for spec in specs)
    assert any(spec.global_scale and spec.ranges == "dynamic" for spec in specs)
