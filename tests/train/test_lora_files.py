"""Adapters go to PEFT and come from it with the same values; its layers around ours are refused."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from recoup import (
    add_lora,
    convert,
    export,
    load_lora,
    merge_lora,
    prepare,
    ptq,
    resolve,
    save_lora,
    train,
)
from recoup.nn import LoRA
from recoup.train.lora_files import CONFIG, TENSORS
from tests.models import MLP, WIDTH, features, gpt2, ids, llama, run

# PEFT asks transformers by a name that transformers is renaming.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "mlp": (MLP, ["up", "down"]),
    "llama": (llama, ["q_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "mlp.c_proj"]),
}
every_model = pytest.mark.parametrize("name", MODELS)


def quantized(model: nn.Module) -> nn.Module:
    return prepare(model, resolve(model, "w4a16")).eval()


def with_products(model: nn.Module) -> nn.Module:
    """B is no longer zero."""
    for name, parameter in model.named_parameters():
        if name.endswith((".lora.B", "lora_B.default.weight")):
            nn.init.normal_(parameter)
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if "quantizer" not in name}


def assert_merged_alike(ours: nn.Module, theirs: nn.Module, *, exactly: bool) -> None:
    one, other = weights(merge_lora(ours)), weights(theirs)
    assert list(one) == list(other)
    for name, value in one.items():
        # A transposed weight's product is a transposed one, whose sums of four may run in another order.
        assert torch.equal(value, other[name]) or (
            not exactly and torch.allclose(value, other[name], rtol=0, atol=1e-5)
        )


@every_model
def test_peft_reads_what_is_saved_and_merges_it_to_the_same_weights(name: str, tmp_path: Path) -> None:
    build, targets = MODELS[name]
    plain = build()
    ours = with_products(add_lora(quantized(copy.deepcopy(plain)), rank=4, alpha=12, targets=targets))
    save_lora(ours, tmp_path / "adapter")
    read = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "adapter"))
    assert_merged_alike(ours, read.merge_and_unload(), exactly=name != "gpt2")


@every_model
def test_what_peft_saved_is_read_and_merges_to_the_same_weights(name: str, tmp_path: Path) -> None:
    build, targets = MODELS[name]
    plain = build()
    asked = LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, use_rslora=True, fan_in_fan_out=name == "gpt2"
    )
    theirs = with_products(get_peft_model(copy.deepcopy(plain), asked))
    theirs.save_pretrained(str(tmp_path))
    ours = load_lora(quantized(copy.deepcopy(plain)), tmp_path)
    adapters = [module for module in ours.modules() if isinstance(module, LoRA)]
    assert {lora.settings.scaling for lora in adapters} == {6}
    assert len(adapters) == len([name for name in theirs.state_dict() if "lora_A" in name])
    assert all(p.requires_grad == ("lora" in path) for path, p in ours.named_parameters())
    assert_merged_alike(ours, theirs.merge_and_unload(), exactly=name != "gpt2")


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    plain, x = MLP().eval(), features()
    ours = with_products(add_lora(quantized(copy.deepcopy(plain)), rank=4, targets="up", dropout=0.25))
    save_lora(ours, tmp_path / "adapter")
    read = load_lora(quantized(plain), tmp_path / "adapter")
    assert read.up.lora.settings.dropout == 0.25
    assert read.down.lora is None
    assert torch.equal(run(read, x)[0], run(ours, x)[0])


def test_a_name_that_ends_another_is_saved_so_that_peft_takes_it_alone(tmp_path: Path) -> None:
    plain = nn.ModuleDict({"up": nn.Linear(WIDTH, 8), "in": nn.ModuleDict({"up": nn.Linear(WIDTH, 8)})})
    save_lora(add_lora(quantized(copy.deepcopy(plain)), targets="up"), tmp_path / "adapter")
    read = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    assert [name for name, _ in read.named_parameters() if "lora_A" in name] == [
        "base_model.model.up.lora_A.default.weight"
    ]


# --- what is not plain, or not this model's --------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_lora(add_lora(quantized(MLP()), rank=4), tmp_path / "adapter")
    return tmp_path / "adapter"


ONLY_PLAIN = "; only plain LoRA is read: merge these adapters with PEFT, and prepare the merged model"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora is True" + ONLY_PLAIN),
    "ranks": ({"rank_pattern": {"up": 2}}, "rank_pattern is {'up': 2}" + ONLY_PLAIN),
    "bias": ({"bias": "all"}, "bias is 'all'" + ONLY_PLAIN),
    "modules": ({"modules_to_save": ["head"]}, "modules_to_save is ['head']" + ONLY_PLAIN),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'" + ONLY_PLAIN),
    "unheard of": ({"use_something": 1}, "use_something is 1" + ONLY_PLAIN),
    "type": ({"peft_type": "IA3"}, "no configuration of LoRA; load_lora reads PEFT's adapters of that type"),
    "no rank": ({"r": None}, "r: None found; it is a number above 0"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_other_adapters_than_plain_ones_are_refused_by_name(case: str, saved: Path) -> None:
    change, message = CONFIGS[case]
    config = json.loads((saved / CONFIG).read_text()) | change
    (saved / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^{re.escape(f'{saved / CONFIG}: {message}')}$"):
        load_lora(quantized(MLP()), saved)


TENSOR_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "embedding": (
        {"base_model.model.tokens.lora_embedding_A": torch.zeros(4, 8)},
        "base_model.model.tokens.lora_embedding_A is no factor of plain LoRA; save adapters of linear layers "
        "alone",
    ),
    "another model's": (
        {"base_model.model.q_proj.lora_A.weight": torch.zeros(4, 8)},
        "has an adapter for q_proj, which this model has not",
    ),
    "another shape": (
        {"base_model.model.up.lora_A.weight": torch.zeros(4, 8)},
        "up has {'lora_A': (4, 8), 'lora_B': (256, 4)}, but rank 4 makes it lora_A (4, 256) and lora_B "
        "(256, 4) in this model",
    ),
    "half": (
        {"base_model.model.down.lora_B.weight": None},
        "down has {'lora_A': (4, 256)}, but rank 4 makes it lora_A (4, 256) and lora_B (256, 4) in this "
        "model",
    ),
}


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_tensors_that_do_not_fit_are_named(case: str, saved: Path) -> None:
    change, message = TENSOR_CASES[case]
    tensors = load_file(saved / TENSORS) | change
    save_file({name: value for name, value in tensors.items() if value is not None}, saved / TENSORS)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{saved / TENSORS}: {message}')}$"):
        load_lora(quantized(MLP()), saved)


def test_damaged_files_are_named(saved: Path) -> None:
    whole = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{TENSORS}: no whole safetensors file"):
        load_lora(quantized(MLP()), saved)
    (saved / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=f"{CONFIG}: not JSON"):
        load_lora(quantized(MLP()), saved)


def test_a_folder_is_not_written_over_and_nothing_is_left_of_one_that_cannot_be(saved: Path) -> None:
    model = add_lora(quantized(MLP()))
    with pytest.raises(ValueError, match="adapter: exists and is not empty; choose another folder"):
        save_lora(model, saved)
    with pytest.raises(
        OSError, match=r"inside: cannot be written \(Not a directory\); nothing of it is left"
    ):
        save_lora(model, saved / CONFIG / "inside")


# --- PEFT around our modules -----------------------------------------------------------------------------

VERBS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "resolve": lambda model, _: resolve(model, "w4a16"),
    "train": lambda model, _: train(model, [features()]),
    "convert": lambda model, _: convert(model),
    "export": lambda model, folder: export(model, folder / "artefact", "onnx"),
    "add_lora": lambda model, _: add_lora(model),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("wrapped", [True, False], ids=["model", "layers"])
def test_peft_around_quantized_layers_is_refused(verb: str, wrapped: bool, tmp_path: Path) -> None:
    model = ptq(MLP(), "w4a16", [features()])
    outer = get_peft_model(model, LoraConfig(r=4, target_modules=["up"]))
    found, name = (outer, "base_model.model.up") if wrapped else (model, "up")
    message = (
        f"{name}: a Linear of peft adds its adapter outside of the quantized weight, so what ships would not "
        "be what is trained; call peft's merge_and_unload() before recoup.prepare, or train adapters with "
        "recoup.add_lora(model)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        VERBS[verb](found, tmp_path)


def test_a_float_model_of_peft_is_not_prepared() -> None:
    model = MLP()
    plan = resolve(model, "w4a16")
    with pytest.raises(ValueError, match=r"train adapters with recoup.add_lora\(model\)$"):
        prepare(get_peft_model(model, IA3Config(target_modules=["up"], feedforward_modules=[])), plan)


def test_after_merging_with_peft_a_model_is_a_model() -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"])).merge_and_unload()
    assert run(ptq(model, "w4a16", [ids()]), ids())
