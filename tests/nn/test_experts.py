"""Layers of experts: their twin computes what a Linear for each expert would, and misses no weight."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from recoup import calibrate, convert, explain, prepare, resolve
from recoup.calibrate import gptq
from recoup.export import TARGETS, export, preflight
from recoup.nn import (
    FakeQuantizer,
    QuantExperts,
    call,
    kept_weight,
    matrices_of,
    quantization_off,
    quantizers_of,
)
from tests.models import recipe
from tests.nn.mixtures import CONFIGS, EXPERTS, experts_of, mixture, words

HIDDEN = 64
every_mixture = pytest.mark.parametrize("name", CONFIGS)
# One for each way in which weights and inputs have scales; the models' widths cut into their blocks.
LATTICES = ("w4a16", "w8a8", "w8a8-ort", "w4a8-ort", "fp8-static", "mxfp4", "nvfp4", "w1a16-seq")


class Layer(nn.Module):
    """One layer of experts alone, with what a router would give it."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts: Any = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


class LinearExperts(nn.Module):
    """The oracle: two Linears for every expert; a transposed stack is turned, biases are added after."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.like = experts  # for its gate and its biases alone
        self.projections = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    linear(m.T if experts.is_transposed else m) for m in getattr(experts, name)
                )
                for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
            }
        )

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(len(self.projections["down_proj"])):
            places, tokens = torch.where(index.T.eq(expert))
            h = x[tokens]
            for name, projections in self.projections.items():
                h = projections[expert](h)
                if self.like.has_bias:
                    h = h + getattr(self.like, f"{name}_bias")[expert]
                if name != "down_proj":
                    h = self.like._apply_gate(h) if self.like.has_gate else self.like.act_fn(h)
            y.index_add_(0, tokens, h * weights[tokens, places, None])
        return y


def linear(matrix: Tensor) -> nn.Linear:
    made = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    made.weight.data.copy_(matrix)
    return made


def layer_of(name: str = "qwen3") -> Layer:
    return Layer(experts_of(mixture(name))[1])


def routed(tokens: int = 12, among: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and two of the first so many experts for each of them."""
    index = torch.rand(tokens, among).argsort(dim=1)[:, :2]
    return torch.randn(tokens, HIDDEN), index, torch.rand(tokens, 2)


def ready(model: nn.Module, scheme: Any, batch: Any) -> Any:
    return calibrate(prepare(model, resolve(model, scheme)), [batch])


def as_oracle(oracle: Any, experts: Any) -> None:
    """Give an oracle the scales of a layer of experts."""
    for stack, quantizer in quantizers_of(experts).items():
        inputs = getattr(experts, f"{stack}_input_quantizer")
        for projection, scale in zip(oracle.projections[stack], quantizer.scale.chunk(EXPERTS), strict=True):
            if quantizer.global_scale is None:
                assert torch.equal(projection.weight_quantizer.scale, scale)
            projection.weight_quantizer.keep(replace(quantizer.stored_qparams, scale=scale))
            if isinstance(inputs, FakeQuantizer):  # a range that is not dynamic is one for all experts
                projection.input_quantizer.load_state_dict(inputs.state_dict())


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*((name, "w4a8") for name in CONFIGS), *(("qwen3", scheme) for scheme in LATTICES)],
)
def test_experts_are_linears_of_their_own_bit_for_bit(name: str, scheme: str) -> None:
    layer, batch = layer_of(name), routed()
    oracle = ready(LinearExperts(copy.deepcopy(layer.experts)), recipe(scheme, ("like", "none")), batch)
    layer = ready(layer, scheme, batch)
    as_oracle(oracle, layer.experts)
    torch.manual_seed(1)
    seen = [batch[0].clone().requires_grad_() for _ in range(2)]
    outputs = [model(x, *batch[1:]) for model, x in zip((layer, oracle), seen, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(seen[0].grad, seen[1].grad)
    for stack, projections in oracle.projections.items():
        expected = torch.stack([projection.weight.grad for projection in projections])
        found = layer.experts.get_parameter(stack).grad
        assert torch.equal(found.transpose(1, 2) if layer.experts.is_transposed else found, expected)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, "w4a8") for name in CONFIGS),
        *(("qwen3", scheme) for scheme in (*LATTICES, "w8a16", "mxint8", "fp8")),
        ("qwen3", recipe("w2a16", weight_ranges="learned")),
    ],
)
def test_kept_codes_have_the_bits_of_rounding_at_every_pass(name: str, scheme: Any) -> None:
    layer, seen, batch = layer_of(name), [routed()], routed(among=EXPERTS - 1)
    found: list[list[Tensor]] = []
    for impl in ("reference", "fused"):
        made: Any = copy.deepcopy(layer)
        calibrate(prepare(made, resolve(made, scheme), impl=impl), seen)
        x = batch[0].clone().requires_grad_()
        y = made(x, *batch[1:])
        y.square().sum().backward()
        gradients = [parameter.grad for parameter in made.parameters() if parameter.grad is not None]
        assert x.grad is not None
        found.append([y.detach(), x.grad, *gradients])
    assert len(found[0]) == len(found[1]) > 3
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss, transposed"])
def test_codes_are_decided_once_for_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = layer_of(name)
    calibrate(prepare(layer, resolve(layer, "w4a8"), impl="fused"), [routed()])
    decided: list[str] = []
    decide = kept_weight._decided

    def counted(quantizer: Any, weight: Tensor, over: Tensor | None = None) -> Any:
        decided.append(quantizer.path)
        return decide(quantizer, weight, over)

    monkeypatch.setattr(kept_weight, "_decided", counted)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    for step in (1, 2):
        for _ in range(3):
            layer(*routed()).sum().backward()
        assert decided == ["experts.gate_up_proj", "experts.down_proj"] * step
        fresh: Any = copy.deepcopy(layer)
        for quantizer in quantizers_of(fresh.experts).values():
            quantizer.impl = "reference"
        batch = routed()
        assert torch.equal(layer(*batch), fresh(*batch))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, "w4a16") for name in ("gpt-oss, transposed", "mixtral")),
        *(("qwen3", scheme) for scheme in ("w2a16", "fp8-static", "nvfp4")),
    ],
)
def test_gptq_moves_an_expert_as_linears_with_its_tokens(name: str, scheme: str) -> None:
    layer, batch = layer_of(name), routed(48, among=EXPERTS - 1)
    oracle = ready(LinearExperts(copy.deepcopy(layer.experts)), recipe(scheme, ("like", "none")), routed())
    layer = ready(layer, scheme, routed())
    as_oracle(oracle, layer.experts)
    before = {stack: view.clone() for stack, view in matrices_of(layer.experts).items()}
    for projections in oracle.projections.values():  # the last expert has no tokens, and gptq refuses that
        del projections[EXPERTS - 1]
    gptq(layer, [batch])
    gptq(oracle, [batch])
    for stack, projections in oracle.projections.items():
        *moved, last = matrices_of(layer.experts)[stack].chunk(EXPERTS)
        scales = quantizers_of(layer.experts)[stack].scale.chunk(EXPERTS)
        for matrix, scale, projection in zip(moved, scales, projections, strict=False):
            assert torch.equal(matrix, projection.weight)
            assert torch.equal(scale, projection.weight_quantizer.scale)
        assert torch.equal(last, before[stack].chunk(EXPERTS)[-1])
        assert not torch.equal(moved[0], before[stack].chunk(EXPERTS)[0])


@every_mixture
def test_nearly_every_matrix_is_quantized_by_default_and_routers_say_why_not(name: str) -> None:
    model = mixture(name)
    plan = resolve(model, "w4a8")
    kept = ("embedding", "head", "norm", "router")
    matrices = {
        path: parameter.numel()
        for path, parameter in model.named_parameters()
        if parameter.ndim > 1 and not plan.kept.get(path, "").startswith(kept)
    }
    quantized = sum(size for path, size in matrices.items() if path not in plan.kept)
    assert quantized >= 0.95 * sum(matrices.values())
    rows = {row.parameter: row for row in explain(model, plan).rows}
    experts, _ = experts_of(model)
    assert (rows[f"{experts}.down_proj"].scheme, rows[f"{experts}.down_proj"].bits) == ("w4a8", 5.0)
    block = experts.rpartition(".")[0]
    router = next(path for path in rows if path.startswith((f"{block}.gate.", f"{block}.router.")))
    assert rows[router].reason == "router, kept unless a rule names it"


@every_mixture
def test_it_trains_and_keeps_its_state_and_converting_changes_no_bit(name: str) -> None:
    model, batch = mixture(name), words()
    names = set(model.state_dict())
    model = ready(model, "w4a8", batch)
    assert names <= set(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    resumed = mixture(name)
    prepare(resumed, resolve(resumed, "w4a8")).load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        trained = model(**batch).logits
        assert torch.equal(resumed(**batch).logits, trained)
        coded = convert(resumed)
        assert torch.equal(coded(**batch).logits, trained)
        assert torch.equal(copy.deepcopy(coded)(**batch).logits, trained)
    experts, _ = experts_of(coded)
    assert f"{experts}.down_proj.codes" in coded.state_dict()
    assert f"{experts}.down_proj" not in coded.state_dict()


@every_mixture
def test_gradients_reach_every_expert_that_was_hit_and_no_other(name: str) -> None:
    layer, batch = layer_of(name), routed(among=EXPERTS - 1)
    layer = ready(layer, "w4a8", batch)
    layer(*batch).square().sum().backward()
    for parameter in layer.experts.parameters(recurse=False):
        reached = parameter.grad.flatten(1).count_nonzero(dim=1) > 0
        assert reached.tolist() == [expert in batch[1] for expert in range(EXPERTS)]


@every_mixture
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_switched_off_it_is_the_float_module_bit_for_bit(name: str, implementation: str) -> None:
    layer, batch = layer_of(name), routed()
    layer.experts.config._experts_implementation = implementation
    expected = layer(*batch)
    layer = ready(layer, "w4a8", batch)
    assert not torch.equal(layer(*batch), expected)
    with quantization_off(layer):
        assert torch.equal(layer(*batch), expected)


@pytest.mark.parametrize("ranges", ["static", "learned"])
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_a_scale_of_the_whole_tensor_is_one_for_each_expert(ranges: str, observer: str) -> None:
    layer, batch = layer_of(), routed()
    plan = resolve(layer, recipe("fp8-static", weight_ranges=ranges))
    layer = calibrate(prepare(layer, plan), [batch], observer=observer)
    scale = layer.experts.gate_up_proj_quantizer.scale
    assert scale.shape == (EXPERTS, 1)
    assert len(scale.unique()) == EXPERTS
    assert torch.equal(convert(copy.deepcopy(layer))(*batch), layer(*batch))


def test_tokens_without_an_expert_and_no_tokens_at_all_are_zeros() -> None:
    batch = routed()
    layer = ready(layer_of(), "w4a8", batch)
    nothing = torch.empty(0, HIDDEN), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)
    assert layer(*nothing).shape == (0, HIDDEN)


def test_two_layers_that_hold_one_stack_share_its_quantizer_and_its_codes() -> None:
    first, second = layer_of(), layer_of()
    second.experts.gate_up_proj = first.experts.gate_up_proj
    second.experts.down_proj = first.experts.down_proj
    model = nn.ModuleDict({"first": first, "second": second})
    plan = resolve(model, recipe("w4a16", ("first", "w4a16"), ("second", "w4a16")))
    model = prepare(model, plan)
    layers = model["first"].experts, model["second"].experts
    assert quantizers_of(layers[0]) == quantizers_of(layers[1])
    convert(model)
    assert model["first"].experts.down_proj is model["second"].experts.down_proj


def test_tied_stacks_are_kept_where_no_rule_names_them() -> None:
    model = nn.ModuleDict({"first": layer_of(), "second": layer_of(), "linear": nn.Linear(HIDDEN, HIDDEN)})
    model["second"].experts.down_proj = model["first"].experts.down_proj
    plan = resolve(model, "w4a16")
    assert set(plan.modules) == {"linear"}
    assert plan.kept["second.experts.down_proj"] == "tied to first.experts"


def test_a_rule_quantizes_a_router_that_is_a_linear() -> None:
    model = mixture("qwen2, shared expert")
    name = "model.layers.0.mlp.shared_expert_gate"
    assert resolve(model, "w8a8").kept[f"{name}.weight"] == "router, kept unless a rule names it"
    assert resolve(model, recipe("w8a8", (name, "w8a8"))).modules[name] == "w8a8"


def test_a_router_of_a_type_of_its_own_stays_and_says_so() -> None:
    model = mixture()
    plan = resolve(model, recipe("w8a8", ("model.layers.0.mlp", "w8a8")))
    assert plan.kept["model.layers.0.mlp.gate.weight"] == (
        "router, and no quantized form of transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter"
    )


def refused(layer: nn.Module, scheme: Any, message: str) -> None:
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        prepare(layer, resolve(layer, scheme))
    assert all(torch.equal(state, before[name]) for name, state in layer.state_dict().items())


_FORM = (
    r"^experts: by its attributes a Qwen3MoeExperts has gate_up_proj \(experts, 2 inner, width\), "
    r"down_proj \(experts, width, inner\), none of them empty, found "
)
_KEEP = r"; keep it in float with \{match: experts, scheme: none\}$"


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({"down_proj": (0, 64, 32), "gate_up_proj": (0, 64, 64)}, r"gate_up_proj \(0, 64, 64\)"),
        ({"down_proj": (4, 64, 0), "gate_up_proj": (4, 0, 64)}, r"gate_up_proj \(4, 0, 64\)"),
        ({"down_proj": (4, 64, 31)}, r"gate_up_proj \(4, 64, 64\), down_proj \(4, 64, 31\)"),
        ({"down_proj": (64, 32)}, r"gate_up_proj \(4, 64, 64\), down_proj \(64, 32\)"),
        ({"down_proj": (3, 64, 32), "gate_up_proj": (3, 64, 64)}, r"gate_up_proj \(3, 64, 64\)"),
        ({"more": (2,)}, r"gate_up_proj \(4, 64, 64\), down_proj \(4, 64, 32\), more \(2,\)"),
    ],
    ids=["no experts", "no inner width", "odd", "a matrix", "another number", "one more"],
)
def test_stacks_that_are_not_as_declared_are_refused(shapes: dict[str, Any], found: str) -> None:
    layer = layer_of()
    for name, shape in shapes.items():
        layer.experts.register_parameter(name, nn.Parameter(torch.ones(shape)))
    if not shapes.get("down_proj", (1,))[0]:
        layer.experts.num_experts = 0
    refused(layer, "w8a16", f"{_FORM}{found}.*{_KEEP}")


def resized(hidden: int, inner: int) -> Layer:
    layer = layer_of()
    layer.experts.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * inner, hidden))
    layer.experts.down_proj = nn.Parameter(torch.randn(EXPERTS, hidden, inner))
    return layer


def test_widths_that_no_group_divides_name_the_weight() -> None:
    message = "cannot be cut into groups of 32; use per_channel"
    refused(
        resized(64, 33), "w4a16", rf"^experts\.down_proj: 33 columns {message}, or a group size among \[3, "
    )
    refused(resized(1, 32), "w4a16", rf"^experts\.gate_up_proj: 1 columns {message}$")


def test_a_tile_of_scales_ends_where_its_expert_does() -> None:
    refused(
        resized(128, 32),  # 4 x 64 rows are two tiles of 128, of two experts each
        "fp8-block",
        r"^experts\.gate_up_proj: 64 rows cannot be cut into groups of 128; use per_channel, or a group size",
    )


def test_a_row_of_one_is_a_row() -> None:
    layer = ready(resized(1, 1), "w8a8", (torch.randn(5, 1), *routed(5)[1:]))
    assert layer.experts.gate_up_proj_quantizer.scale.shape == (2 * EXPERTS, 1)


def test_experts_on_other_devices_are_refused() -> None:
    layer = layer_of()
    layer.experts._is_expert_parallel = True
    refused(
        layer,
        "w8a16",
        r"^experts: its experts are spread over devices, and the twin computes all of them; load the model "
        r"without expert parallelism$",
    )


def test_a_block_whose_forward_was_replaced_may_not_ask_its_experts() -> None:
    model = mixture()
    block = model.model.layers[0].mlp
    block.forward = block.forward  # an attribute of the instance now, as kernels are put there
    message = (
        r"^model\.layers\.0\.mlp: its forward was replaced on the instance, as use_kernels=True does, and "
        r"may compute with the float weights of model\.layers\.0\.mlp\.experts; load the model without it$"
    )
    with pytest.raises(ValueError, match=message):
        prepare(model, resolve(model, "w8a16"))
    prepare(model, resolve(model, recipe("w8a16", ("*.experts", "none"))))


def test_integer_biases_are_refused() -> None:
    refused(
        layer_of("gpt-oss, transposed"),
        "w7a8-ort-static",
        r"^experts: 'w7a8-ort-static' has biases in steps of the products, and those of experts are floats; "
        r"use w8a8-ort-static$",
    )


def test_a_forward_of_ones_own_is_refused() -> None:
    experts = type(layer_of().experts)

    class Other(experts):
        def forward(self, *args: Any) -> Tensor:
            return 2 * super().forward(*args)

    other = Layer(Other(mixture().config))
    refused(
        other, "w8a16", r"of the matrices would stay in float: experts\.gate_up_proj .*no quantized form of"
    )


def test_what_the_decorator_did_not_initialize_is_refused() -> None:
    layer = layer_of()
    del layer.experts.is_transposed
    refused(
        layer, "w8a16", r"of the matrices would stay in float: experts\.gate_up_proj .*no quantized form of"
    )


def test_a_model_in_bfloat16_is_quantized_as_one_in_float32_is() -> None:
    layer = layer_of().to(torch.bfloat16)
    x, index, weights = routed()
    batch = x.to(torch.bfloat16), index, weights  # models weigh in float32
    layer.experts.config._experts_implementation = "eager"
    expected, layer = layer(*batch), ready(layer, "w8a8", batch)
    assert layer(*batch).dtype == torch.bfloat16
    assert torch.equal(convert(copy.deepcopy(layer))(*batch), layer(*batch))
    for quantizer in quantizers_of(layer.experts).values():
        quantizer.enabled = False  # and inputs go on
    torch.testing.assert_close(layer(*batch), expected, rtol=0, atol=0.1)


def test_a_gate_of_ones_own_is_used() -> None:
    experts = type(layer_of().experts)

    class Other(experts):
        def _apply_gate(self, x: Tensor) -> Tensor:
            return x.chunk(2, dim=-1)[1]

    layer, batch = Layer(Other(mixture().config)), routed()
    layer.experts.load_state_dict(layer_of().experts.state_dict())
    layer.experts.config._experts_implementation = "batched_mm"
    expected, layer = layer(*batch), ready(layer, "w8a16", batch)
    assert isinstance(layer.experts, QuantExperts)
    torch.testing.assert_close(layer(*batch), expected, rtol=0, atol=0.05)


def test_a_norm_of_every_experts_output_is_applied() -> None:
    @use_experts_implementation(has_post_expert_norm=True)
    class Normed(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            vars(self).update(vars(layer_of().experts))
            self.post_expert_norm = nn.LayerNorm(HIDDEN, elementwise_affine=False)

        def forward(self, *_: Any) -> Tensor:
            raise AssertionError

    config = mixture().config
    config._experts_implementation = "batched_mm"
    layer, batch = Layer(Normed(config)), routed()
    expected = layer(*batch)
    torch.testing.assert_close(ready(layer, "w8a16", batch)(*batch), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "compressed-tensors"])
def test_other_targets_refuse_experts_before_any_work(target: str, tmp_path: Any) -> None:
    message = (
        rf"^experts: {target} files do not hold quantized Experts yet; keep it in float with \{{match: exp"
    )
    layer, batch = layer_of(), routed()
    plan = resolve(layer, "w8a8")
    with pytest.raises(ValueError, match=message):
        preflight(layer, plan, target)
    with pytest.raises(ValueError, match=message):
        export(calibrate(prepare(layer, plan), [batch]), tmp_path / "artefact", target)
    assert call(layer, batch).isfinite().all()
