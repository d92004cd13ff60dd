"""Adapters inside of the quantizer: what is trained is what is merged, to the bit, and nothing else moves."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from recoup import Recipe, add_lora, calibrate, convert, merge_lora, param_groups, prepare, resolve, train
from recoup.calibrate import gptq
from recoup.nn import Batch, Codes, LoRA
from recoup.nn.kept_weight import kept_weight
from recoup.schemes.training import TrainSettings
from recoup.train import NonFiniteLossError
from recoup.train.fingerprint import fingerprint
from tests.models import MLP, Residual, Tied, features, gpt2, ids, images, llama, recipe, run, same

from .test_train import batches, prepared, settings

LATTICES = [("w4a8", "static"), ("w4a16", "learned"), ("w2a16", "dynamic"), ("w8a8-static", "learned")]
every_lattice = pytest.mark.parametrize(("scheme", "ranges"), LATTICES)
LORA = {"rank": 4, "alpha": 8, "targets": ["up", "down"]}


def adapted(
    model: nn.Module, scheme: str, batch: Batch, ranges: str = "static", impl: Any = "fused", **lora: Any
) -> nn.Module:
    """With adapters whose products are not zero any more."""
    torch.manual_seed(0)
    plan = resolve(model, recipe(scheme, weight_ranges=ranges))
    add_lora(calibrate(prepare(model, plan, impl=impl), [batch]), **{"rank": 4, "alpha": 8} | lora)
    for module in model.modules():
        if isinstance(module, LoRA):
            nn.init.normal_(module.B, std=0.02)
    return model


def mlp(scheme: str = "w4a8", ranges: str = "static", impl: Any = "fused", **lora: Any) -> MLP:
    torch.manual_seed(0)
    model = MLP().eval()
    adapted(model, scheme, features(), ranges, impl, **lora)
    return model


def codes(model: nn.Module) -> list[Tensor]:
    return [module.codes for module in model.modules() if isinstance(module, Codes)]


# --- the promise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [MLP, gpt2])
@every_lattice
def test_merging_moves_no_code_and_no_output(build: Any, scheme: str, ranges: str) -> None:
    batch = features() if build is MLP else ids()
    model = adapted(build().eval(), scheme, batch, ranges)
    trained, unmerged = run(model, batch), convert(copy.deepcopy(model))
    merged = merge_lora(model)
    assert not any(isinstance(module, LoRA) for module in merged.modules())
    assert same(trained, run(merged, batch))
    converted = convert(merged)
    assert same(trained, run(converted, batch))
    assert same(trained, run(unmerged, batch))
    assert all(map(torch.equal, codes(converted), codes(unmerged)))
    assert codes(converted)


def test_adapters_begin_as_nothing() -> None:
    x, model = features(), MLP().eval()
    calibrate(prepare(model, resolve(model, "w4a8")), [x])
    before = run(model, x)
    assert same(before, run(add_lora(model, rank=4), x))


@every_lattice
def test_fused_adapters_have_the_equations_bits_and_gradients(scheme: str, ranges: str) -> None:
    x, found = features(), list[list[Tensor | None]]()
    for impl in ("reference", "fused"):
        model = mlp(scheme, ranges, impl)
        y = model(x)
        y.square().sum().backward()
        found.append([y, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_gradients_are_those_of_full_training_through_the_chain_rule() -> None:
    x, model = features(), mlp()
    whole = merge_lora(copy.deepcopy(model)).requires_grad_()
    for each in (model, whole):
        each(x).square().sum().backward()
    of_weight, lora = 2 * whole.up.weight.grad, model.up.lora  # alpha / rank is 2
    assert torch.equal(lora.A.grad, lora.B.T @ of_weight)
    assert torch.equal(lora.B.grad, of_weight @ lora.A.T)


def test_autocast_does_not_reach_the_sum() -> None:
    x, model = features(), mlp()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert torch.equal(y, merge_lora(model)(x))


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    assert mlp(rslora=True).up.lora.settings.scaling == 4


# --- what it costs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", ["static", "learned"])
def test_only_adapters_and_learned_scales_train(ranges: str) -> None:
    model = mlp("w4a16", ranges)
    model(features()).sum().backward()
    scales = {f"{name}.weight_quantizer.scale" for name in ("up", "down")} if ranges == "learned" else set()
    factors = {f"{name}.lora.{letter}" for name in ("up", "down") for letter in "AB"}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == (
        scales | factors
    )
    assert sum(len(group["params"]) for group in param_groups(model, 1e-3)) == len(scales | factors)


@pytest.mark.parametrize("ranges", ["static", "learned"])
def test_the_sum_is_not_kept_for_the_backward_pass(ranges: str) -> None:
    model, x = mlp("w4a16", ranges), features()
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.up(x)
    sizes.pop(model.up.weight.data_ptr(), None)  # the master weight is there anyway
    assert y.requires_grad
    assert sum(sizes.values()) < model.up.weight.nbytes / 2


def test_codes_serve_until_an_adapter_moves() -> None:
    model, x = mlp(), features()
    layer = model.up
    model(x).sum().backward()
    before = kept_weight(layer.weight_quantizer, layer.weight, layer.lora.low_rank)
    values = before.values.clone()
    model(x).sum().backward()
    assert kept_weight(layer.weight_quantizer, layer.weight, layer.lora.low_rank) is before
    torch.optim.SGD(param_groups(model, 1.0)).step()
    model(x)
    after = kept_weight(layer.weight_quantizer, layer.weight, layer.lora.low_rank)
    assert not torch.equal(after.values, values)


# --- dropout ---------------------------------------------------------------------------------------------


def test_dropout_leaves_out_columns_of_a_in_training_alone() -> None:
    lora = mlp(dropout=0.25).up.lora
    assert lora.drawn().A is lora.A
    drawn = lora.train().drawn().A
    kept = (drawn != 0).any(dim=0)
    assert 0.6 < kept.float().mean() < 0.9  # of 256 columns; five standard deviations are 0.14
    assert torch.equal(drawn, lora.A * (kept / 0.75))


def test_dropout_is_not_in_what_ships() -> None:
    x, model = features(), mlp(dropout=0.5)
    expected = run(model, x)
    assert same(expected, run(convert(copy.deepcopy(model).train()).eval(), x))
    assert same(expected, run(merge_lora(model.train()).eval(), x))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_activations_computed_again_see_the_same_adapter(dropout: float) -> None:
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = llama()
        data = [ids() | {"labels": ids()["input_ids"]} for _ in range(2)]
        calibrate(prepare(model, resolve(model, "w4a8")), data)
        given = settings(
            steps=2, loss="task", activation_checkpointing=again, lora={"rank": 2, "dropout": dropout}
        )
        torch.manual_seed(1)
        found.append(fingerprint(train(model, data, given).state_dict()))
    assert found[0] == found[1]


# --- in the loop -----------------------------------------------------------------------------------------


def test_training_with_lora_moves_the_targets_alone_and_merges() -> None:
    model, seen = prepared("w4a8"), list[Mapping[str, float]]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = settings(steps=40, evaluate_every=10, lora={"rank": 4, "targets": ["down"]})
    train(model, batches(8, 64), given, held_out=batches(2, 64), record=seen.append)
    after = model.state_dict()
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["down.weight"]
    assert list(after) == list(before)
    assert torch.linalg.matrix_rank((after["down.weight"] - before["down.weight"]).double(), atol=1e-6) == 4
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert min(entry["held_out"] for entry in seen if "held_out" in entry) < seen[0]["held_out"]


def test_a_training_with_lora_goes_on_to_the_same_bits_from_small_checkpoints(tmp_path: Path) -> None:
    def work(folder: Path, stop: int) -> str:
        torch.manual_seed(3)
        model, data = prepared("w4a8", weight_ranges="learned"), batches(3, labels=True)
        weight = model.up.weight.clone()

        def record(entry: Mapping[str, float]) -> None:
            if entry["step"] == stop:
                raise KeyboardInterrupt

        given = settings(
            steps=6, checkpoint_every=2, loss="task", lora={**LORA, "dropout": 0.5}, evaluate_every=3
        )
        try:
            train(model, data[1:], given, held_out=data[:1], checkpoints=folder, record=record)
        except KeyboardInterrupt:
            assert model.up.lora is None
            assert torch.equal(model.up.weight, weight)
        return fingerprint(model.state_dict())

    whole = work(tmp_path / "whole", stop=-1)
    work(tmp_path / "stopped", stop=5)
    with safe_open(next((tmp_path / "stopped").glob("*/weights.safetensors")), "pt") as file:
        assert {"up.lora.A", "up.lora.B", "up.weight_quantizer.scale"} <= set(file.keys())
        assert "up.weight" not in file.keys()  # noqa: SIM118 (it is no mapping)
    assert work(tmp_path / "stopped", stop=-1) == whole


def test_after_an_error_the_weights_are_as_they_were() -> None:
    model = prepared("w4a8")
    before = fingerprint(model.state_dict())
    broken = [{"x": torch.full((2, 32), torch.nan)}]
    with pytest.raises(NonFiniteLossError):
        train(model, [*batches(1), *broken], settings(lora=LORA))
    assert fingerprint(model.state_dict()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_of_ones_own_stay_through_training() -> None:
    model = add_lora(prepared("w4a8"), rank=4, targets=["up"])
    weight = model.up.weight.clone()
    train(model, batches(2), settings())
    assert model.up.lora.B.abs().sum() > 0
    assert torch.equal(model.up.weight, weight)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["up.lora.A", "up.lora.B"]


def test_scales_alone_train() -> None:
    model = prepared("w4a16", weight_ranges="learned")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, batches(4), settings(parameters="scales", scale_learning_rate=1e-2))
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved == ["up.weight_quantizer.scale", "down.weight_quantizer.scale"]
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- refusals --------------------------------------------------------------------------------------------


def quantized(model: nn.Module, scheme: str, batch: Batch, *rules: tuple[str, Any]) -> nn.Module:
    return calibrate(prepare(model, resolve(model, recipe(scheme, *rules))), [batch])


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "float": (
        MLP,
        {},
        "lora: the model is not prepared; adapters go between recoup.prepare and recoup.convert",
    ),
    "converted": (
        lambda: convert(quantized(MLP(), "w4a16", features())),
        {},
        "lora: the model is converted; adapters go between recoup.prepare and recoup.convert",
    ),
    "twice": (mlp, {}, "lora: the model has adapters; merge them first, with recoup.merge_lora(model)"),
    "nobody": (
        lambda: quantized(MLP(), "w4a16", features()),
        {"targets": ["dwon"]},
        "lora.targets: 'dwon' matches no module; did you mean down?",
    ),
    "part of a name": (
        lambda: quantized(MLP(), "w4a16", features()),
        {"targets": "u"},
        "lora.targets: 'u' matches no module; did you mean up?",
    ),
    "in float": (
        lambda: quantized(MLP(), "w4a16", features()),
        {"targets": ["up", "head"]},
        "head: an adapter asked of a Linear, which is no quantized linear layer; leave it out of targets, or "
        "quantize it by a rule",
    ),
    "without a weight": (
        lambda: quantized(llama(), "w4a16", ids()),
        {"targets": ["mlp"]},
        "model.layers.0.mlp: an adapter asked of a LlamaMLP, which is no quantized linear layer; leave it "
        "out of targets, or quantize it by a rule",
    ),
    "convolution": (
        lambda: quantized(Residual(), "w8a8-static", images()),
        {"targets": ["depthwise"]},
        "depthwise: an adapter asked of a QuantConv2d, which is no quantized linear layer; leave it out of "
        "targets, or quantize it by a rule",
    ),
    "tied": (
        lambda: quantized(Tied(), "w4a16", ids(), ("tokens", "w4a16"), ("lm_head", "w4a16")),
        {"targets": ["lm_head"]},
        "lm_head: an adapter asked, but its weight is that of tokens too, which would not have it; leave it "
        "out of targets",
    ),
    "half": (
        lambda: quantized(MLP().half(), "w4a16", features().half()),
        {},
        "up: an adapter asked of a weight in torch.float16, which could not hold the merged one; call "
        "model.float() before recoup.prepare",
    ),
    "rank": (MLP, {"rank": 0}, "lora: rank: input should be greater than or equal to 1, found 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_have_an_adapter_is_refused(case: str) -> None:
    build, fields, message = REFUSED[case]
    model = build()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        add_lora(model, **fields)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_merging_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no adapters; give it some with recoup.add_lora\(model, rank=16\)"):
        merge_lora(prepared())


def test_gptq_is_refused_beside_an_adapter() -> None:
    with pytest.raises(
        ValueError, match=r"up.weight: gptq moves the weight, and an adapter adds to it; call"
    ):
        gptq(mlp(), [features()])


def test_scales_alone_need_learned_ranges() -> None:
    with pytest.raises(ValueError, match="scales asked, but no range is learned; set weight_ranges: learned"):
        train(prepared(), batches(2), settings(parameters="scales"))


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"every parameter is frozen; call model.requires_grad_\(\) first"):
        train(prepared().requires_grad_(False), batches(2), settings())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"lora": {}, "parameters": "scales"},
            "lora and parameters: scales asked; adapters train, or scales",
        ),
        ({"lora": {"dropout": 0.1}}, "lora.dropout 0.1 asked, but a loss without task follows the float"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings.model_validate(fields)


def test_a_recipe_with_lora_reads_back_as_it_was_written(tmp_path: Path) -> None:
    written = recipe("w4a8", train={"lora": LORA | {"dropout": 0.0, "rslora": True}})
    (tmp_path / "recipe.yaml").write_text(written.dump())
    assert Recipe.load(tmp_path / "recipe.yaml") == written


def test_a_misspelt_key_of_lora_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("scheme: w4a8\ntrain: {lora: {rnak: 4}}\n")
    with pytest.raises(ValueError, match=r"train.lora.rnak: unknown key; did you mean 'rank'\?"):
        Recipe.load(tmp_path / "recipe.yaml")
