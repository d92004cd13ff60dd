"""Layers that run fused against layers that run as their equation; and when a weight's codes are decided."""

import copy
import logging
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recoup import calibrate, prepare, resolve
from recoup.nn import call, kept_weight, quantization_off
from recoup.nn.fake_quantizer import NonFiniteError
from recoup.numerics.kernels import place
from recoup.schemes import Scheme
from tests.models import MLP, PAIRS, WIDTH, Row, built, features, name_of, recipe, tensors


def prepared(
    model: nn.Module, scheme: Scheme | str, batch: Any, impl: str = "fused", **fields: Any
) -> nn.Module:
    return calibrate(prepare(model, resolve(model, recipe(scheme, **fields)), impl=impl), [batch])


def mlp(scheme: str = "w4a8", impl: str = "fused", **fields: Any) -> nn.Module:
    torch.default_generator.manual_seed(0)
    return prepared(MLP(), scheme, features(), impl, **fields)


def passes(model: nn.Module, batch: Any) -> list[Tensor | None]:
    """The outputs, and every gradient."""
    outputs = list(tensors(call(model, batch))) if not isinstance(batch, Tensor) else [model(batch)]
    loss = sum((y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum() for y in outputs)
    loss.backward()
    return [*(y.detach() for y in outputs), *(parameter.grad for parameter in model.parameters())]


def assert_same(one: list[Tensor | None], other: list[Tensor | None]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize(("row", "scheme"), PAIRS, ids=name_of)
def test_every_model_in_every_scheme_has_the_equations_bits(row: Row, scheme: Scheme) -> None:
    model, batch = built(row), row.batch()
    found = [
        passes(prepared(copy.deepcopy(model), scheme, batch, impl), batch) for impl in ("reference", "fused")
    ]
    assert_same(*found)


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8-static", "nvfp4a16", "q4_1", "w2a16-seq"])
def test_learned_scales_train_as_the_equations_do(scheme: str) -> None:
    x = features()
    models = [mlp(scheme, impl, weight_ranges="learned") for impl in ("reference", "fused")]
    assert_same(*(passes(model, x) for model in models))
    assert models[1].up.weight_quantizer.scale.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_half_weights_too(dtype: torch.dtype) -> None:
    x = features()
    found = []
    for impl in ("reference", "fused"):
        model = mlp("w4a8", impl)
        with torch.autocast("cpu", dtype):
            y = model(x)
        y.float().square().sum().backward()
        half = mlp("w4a8", impl).to(dtype)
        z = half(x.to(dtype))
        z.float().square().sum().backward()
        found.append([y, z, *(p.grad for each in (model, half) for p in each.parameters())])
    assert_same(*found)


def test_a_frozen_weight_gets_no_gradient_and_inputs_still_do() -> None:
    x = features().requires_grad_()
    model = mlp()
    model.down.weight.requires_grad_(False)
    model(x).sum().backward()
    assert model.down.weight.grad is None
    assert x.grad.abs().sum() > 0


def test_what_is_kept_is_a_byte_for_a_value() -> None:
    sizes = {}
    for impl in ("reference", "fused"):
        model, x = mlp("w4a8", impl), torch.randn(512, WIDTH, requires_grad=True)
        held: dict[int, int] = {}

        def pack(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model.up(x)
        sizes[impl] = sum(held.values())
        del y
    values = 512 * WIDTH + WIDTH * WIDTH
    scales = 4 * (512 + WIDTH * WIDTH // 32)
    assert (
        sizes["fused"] <= values + scales + 4 * WIDTH * WIDTH
    )  # and the master weight, which is there anyway
    assert sizes["reference"] > 4 * values


# --- when codes are decided ------------------------------------------------------------------------------


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weights whose codes were decided, in turn."""
    names: list[str] = []
    decide = kept_weight._decided

    def counted(quantizer: Any, weight: Tensor, over: Tensor | None = None) -> Any:
        names.append(quantizer.path)
        return decide(quantizer, weight, over)

    monkeypatch.setattr(kept_weight, "_decided", counted)
    return names


BOTH = ["up.weight", "down.weight"]


def test_once_for_a_step_under_accumulation_and_checkpointing(decided: list[str]) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in (1, 2):
        for _ in range(3):
            checkpoint(model, features(), use_reentrant=False).sum().backward()
        assert decided == BOTH * step
        optimizer.step()
        optimizer.zero_grad()


def assert_noticed(model: nn.Module, decided: list[str]) -> None:
    """The next pass has what a fresh model with this state computes."""
    x = features()
    fresh = mlp("w4a8", "reference")
    fresh.load_state_dict(model.state_dict())
    before = list(decided)
    assert torch.equal(model(x), fresh(x))
    assert len(decided) > len(before)


def test_a_weight_that_is_changed_in_place_is_noticed(decided: list[str]) -> None:
    model = mlp()
    model(features())
    with torch.no_grad():
        model.up.weight.mul_(1.5)
    assert_noticed(model, decided)
    assert decided[2:] == ["up.weight"]


def test_one_element_is_enough(decided: list[str]) -> None:
    model = mlp()
    model(features())
    with torch.no_grad():
        model.down.weight[3, 5] = 0.0
    assert_noticed(model, decided)


def test_an_optimizer_that_writes_through_data_is_noticed(decided: list[str]) -> None:
    class Old(torch.optim.Optimizer):
        def step(self) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(parameter.grad.data, alpha=-0.1)

    model = mlp()
    optimizer = Old(model.parameters(), {})
    model(features()).sum().backward()
    optimizer.step()
    assert_noticed(model, decided)


def test_another_parameter_is_noticed(decided: list[str]) -> None:
    model = mlp()
    model(features())
    model.up.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    assert_noticed(model, decided)


def test_scales_that_change_are_noticed(decided: list[str]) -> None:
    model = mlp()
    model(features())
    calibrate(model, [features()], observer="mse")
    assert_noticed(model, decided)


def test_a_loaded_state_is_noticed(decided: list[str]) -> None:
    model, other = mlp(), mlp()
    with torch.no_grad():
        other.up.weight.neg_()
    model(features())
    model.load_state_dict(other.state_dict())
    assert_noticed(model, decided)


def test_inference_mode_and_training_take_turns() -> None:
    model, x = mlp(), features()
    place._places.held.clear()  # as in a process that evaluates first
    with torch.inference_mode():
        y = model(x)
    model(x).sum().backward()
    with torch.inference_mode():
        assert torch.equal(model(x), y)


def test_every_other_tensor_is_another_weight() -> None:
    found = []
    for impl in ("reference", "fused"):
        model, x = mlp("w4a16", impl), features()
        rows = []
        with torch.no_grad():
            for turn in range(5):  # the allocator hands out the same address again
                weight = model.up.weight + 0.3 * turn
                rows.append(torch.func.functional_call(model, {"up.weight": weight}, (x,)))
                del weight
        found.append(rows)
    assert_same(*found)


def test_an_evaluation_is_right_whatever_hands_wrote() -> None:
    model, other, x = mlp(), mlp("w4a8", "reference"), features()
    with torch.no_grad():
        model(x)
        for each in (model, other):
            each.up.weight.data.mul_(-1)
        assert torch.equal(model(x), other(x))


def test_codes_are_no_state_and_copies_have_their_own() -> None:
    model, x = mlp(), features()
    y = model(x)
    assert not any("codes" in name or "kept" in name for name in model.state_dict())
    size = len(pickle.dumps(model))
    assert size < 4.2 * sum(parameter.numel() for parameter in model.parameters()) + 20_000
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.up.weight.zero_()
        assert not torch.equal(other(x), y)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 2, 3)], ids=str)
def test_what_follows_may_write_in_place(shape: tuple[int, ...]) -> None:
    found = []
    for impl in ("reference", "fused"):
        model, x = mlp("w4a8", impl), torch.linspace(-1, 1, WIDTH).repeat(*shape, 1)
        y = model.up(x.reshape(*shape, WIDTH))
        y.mul_(2)
        y += 1
        y.sum().backward()
        found.append([y, model.up.weight.grad])
    assert_same(*found)


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8-static", "w8a8-ort", "mxfp4", "w4a16"])
@pytest.mark.parametrize("ranges", ["static", "learned"])
def test_no_tokens_at_all(scheme: str, ranges: str) -> None:
    model = mlp(scheme, weight_ranges=ranges)
    y = model(torch.zeros(0, WIDTH))
    assert y.shape == (0, 3)
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# --- when the equation runs ------------------------------------------------------------------------------


def test_switched_off_or_listened_to_it_is_the_equation() -> None:
    model, x = mlp(), features()
    seen: list[str] = []
    handle = model.up.input_quantizer.register_forward_hook(lambda *_: seen.append("input"))
    y = model(x)
    assert seen == ["input"]
    handle.remove()
    assert torch.equal(model(x), y)
    assert seen == ["input"]
    with quantization_off(model):
        assert torch.equal(model.up(x), nn.functional.linear(x, model.up.weight, model.up.bias))


def test_another_input_quantizer_is_called() -> None:
    found = []
    for impl in ("reference", "fused"):
        model, x = mlp("w4a8", impl), features()
        model.up.input_quantizer = nn.Sequential(model.up.input_quantizer)
        found.append([model(x)])
    assert_same(*found)


def test_a_default_device_is_not_the_models() -> None:
    model, x = mlp(), features()
    place._places.held.clear()
    with torch.device("meta"):
        y = model(x)
    assert torch.equal(model(x), y)


def test_what_is_not_finite_is_named(decided: list[str]) -> None:
    model, x = mlp(), features()
    with pytest.raises(NonFiniteError, match=r"up\.input"):
        model(x.clone().fill_(torch.nan))
    with torch.no_grad():
        model.down.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"down\.weight"):
        model(x)


def test_prepare_says_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="recoup"):
        model = mlp(impl="auto")
    assert "fake quantization: fused (131,072 weights are too few to compile kernels for)" in caplog.messages
    assert model.up.weight_quantizer.impl == "fused"


def test_compiled_without_a_compiler_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = MLP()
    with pytest.raises(ValueError, match=r"no C\+\+ compiler 'no-such-compiler' is there; install it"):
        prepare(model, resolve(model, "w4a8"), impl="compiled")
    assert type(model.up) is nn.Linear


ELSEWHERE = """
import copy, sys, torch
from torch import nn
import recoup

def model(impl):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    return recoup.prepare(made, recoup.resolve(made, "w4a8"), impl=impl)

torch.manual_seed(1)
batches = [torch.randn(16, 64) for _ in range(6)]

def train(made, wrapped, steps):
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    outputs = []
    for x in steps:
        y = wrapped(x)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(y.detach())
    return outputs
"""
CALLED_COMPILED = """
plain, compiled = model("reference"), model("fused")
expected = train(plain, plain, batches)
got = train(compiled, torch.compile(compiled, backend="eager", fullgraph=True), batches)
assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
print("same")
"""
SHARDED = """
import os, tempfile
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
plain, sharded = model("reference"), model("fused")
later = copy.deepcopy(plain.state_dict())
for module in (sharded[0], sharded[2], sharded):
    fully_shard(module, mesh=mesh)
expected, got = train(plain, plain, batches), train(sharded, sharded, batches)
assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
assert not torch.equal(got[0], got[1])
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
plain.load_state_dict(later)
set_model_state_dict(sharded, later, options=StateDictOptions(full_state_dict=True))
assert torch.equal(sharded(batches[0]), plain(batches[0]))
dist.destroy_process_group()
print("same")
"""


@pytest.mark.parametrize("script", [CALLED_COMPILED, SHARDED], ids=["compiled", "fsdp2"])
def test_a_compiled_model_and_a_sharded_one_train_as_a_plain_one(script: str) -> None:
    # In a process of its own: Dynamo cannot trace this one's type checks, and process groups are global.
    command = [sys.executable, "-W", "error::UserWarning", "-c", ELSEWHERE + script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr[-3000:]
