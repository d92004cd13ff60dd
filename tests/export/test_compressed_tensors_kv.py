"""Scales of keys and values are in the folder, and transformers' cache holds what was trained."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from recoup import Recipe, convert, export, resolve
from recoup.export import TARGETS, ParityError, preflight, verify
from recoup.export import compressed_tensors_config as schema
from recoup.nn import cache_quantizers
from recoup.numerics import E5M2, FLOAT32, IntFormat, QuantSpec
from recoup.schemes.presets import KV_PRESETS

from .llamas import TARGET, Processor, Written, batch, llama, quantized, written

FP8 = KV_PRESETS["fp8"]
INT8 = replace(FP8, format=IntFormat(8))
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """No type checks of numerics, which cost more than the rest together."""
    torch.manual_seed(1)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(
        Recipe.model_validate({"scheme": "fp8", "kv": "fp8"}), tmp_path_factory.mktemp("kv") / "out"
    )


# One that computes in float32, one whose rest is bfloat16, and with it the scales as transformers holds them.
@pytest.mark.parametrize("scheme", ["w4a16", "nvfp4"])
def test_folders_of_every_dtype_are_proved(scheme: str, tmp_path: Path) -> None:
    folder = written(Recipe.model_validate({"scheme": scheme, "kv": "fp8"}), tmp_path / "out")
    assert folder.parity.modules == 7


def test_config_json_says_what_vllm_and_sglang_ask_for(found: Written) -> None:
    arguments = found.config["quantization_config"]["kv_cache_scheme"]
    asked = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    assert asked.items() <= arguments.items()
    assert "recoup" not in json.dumps(
        found.config
    )  # the function of attention stays with the model that has it


def test_the_scales_are_the_trained_ones(found: Written) -> None:
    ((key, value),) = cache_quantizers(found.model).values()
    for name, quantizer in (("k_scale", key), ("v_scale", value)):
        stored = found.tensors[f"{ATTENTION}.{name}"]
        assert quantizer.scale is not None
        assert stored.dtype == torch.float32
        assert torch.equal(stored, quantizer.scale.reshape(1))
    assert not [name for name in found.tensors if "quantizer" in name]


def test_the_cache_of_transformers_holds_the_trained_codes(found: Written) -> None:
    model, example = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32), batch()
    cache = DynamicCache(config=model.config)
    model(**example, past_key_values=cache)
    (layer,) = cache.layers
    for name, kept in (("k_scale", layer.keys), ("v_scale", layer.values)):
        assert kept is not None
        steps = kept / found.tensors[f"{ATTENTION}.{name}"]
        assert torch.equal(steps.to(torch.float8_e4m3fn).float(), steps)
        assert steps.abs().amax() > 100  # the range is used


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "another scale": (
        lambda tensors: tensors[f"{ATTENTION}.v_scale"].mul_(1.01),
        r"self_attn\.value: the scale read back from the file differ"),
    "a scale too few": (
        lambda tensors: tensors.pop(f"{ATTENTION}.k_scale"),
        r"scales of keys and values for other modules than the plan: .*self_attn\.key"),
    "a scale too many": (
        lambda tensors: tensors.update({"model.layers.1.self_attn.k_scale": torch.ones(1)}),
        r"scales of keys and values for other modules than the plan: model\.layers\.1"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found(case: str, found: Written, tmp_path: Path) -> None:
    damage, message = DAMAGES[case]
    tensors = found.tensors
    damage(tensors)
    shutil.copytree(found.folder, tmp_path / "out")
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    loading = r"1 (missing|unexpected) keys \(.*self_attn\.k_scale\)"  # transformers finds these itself
    with pytest.raises((ParityError, ValueError), match=f"{message}|{loading}"):
        TARGET.verify(found.model, tmp_path / "out", batch())


def test_a_config_that_keeps_them_in_float_is_found(found: Written, tmp_path: Path) -> None:
    shutil.copytree(found.folder, tmp_path / "out")
    config = found.config
    config["quantization_config"]["kv_cache_scheme"] = None
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="2 unexpected keys"):
        TARGET.verify(found.model, tmp_path / "out", batch())


def test_the_folder_alone_says_that_it_is_what_was_exported(found: Written) -> None:
    checks = {check.what: check for check in verify(found.folder).checks}
    assert {check.outcome for check in checks.values()} == {"same"}
    assert checks["cache"].found == "2 scales of keys and values"


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found_later_from_the_folder_alone(case: str, found: Written, tmp_path: Path) -> None:
    damage, message = DAMAGES[case]
    tensors = found.tensors
    damage(tensors)
    folder = shutil.copytree(found.folder, tmp_path / "out")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edited(folder, lambda record: record.update(files={}))  # the sums are not what finds it here
    said = {check.what: check for check in verify(folder).checks}
    assert said["codes"].outcome == "same"
    assert said["cache"].outcome == "different"
    assert re.search(message, said["cache"].found)


NONSENSE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a name without a scale": (
        lambda cache: cache.update(names=["model.layers.0.self_attn.query"]),
        r"self_attn\.query: not the state of its quantizer"),
    "codes that no reader keeps": (
        lambda cache: cache.update(spec=TypeAdapter(QuantSpec).dump_python(INT8, mode="json")),
        "^kv: .* cannot be written"),
    "a key that nobody knows": (
        lambda cache: cache.update(heads=2),
        r"artefact\.json: cache\.heads: "),
}  # fmt: skip


@pytest.mark.parametrize("case", NONSENSE)
def test_a_record_that_makes_no_sense_is_one_line(case: str, found: Written, tmp_path: Path) -> None:
    edit, message = NONSENSE[case]
    folder = shutil.copytree(found.folder, tmp_path / "out")
    edited(folder, lambda record: edit(record["cache"]))
    with pytest.raises(ValueError, match=message) as error:
        verify(folder)
    assert "\n" not in str(error.value)


def test_scales_that_nobody_recorded_are_found(found: Written, tmp_path: Path) -> None:
    folder = shutil.copytree(found.folder, tmp_path / "out")
    edited(folder, lambda record: record.pop("cache"))
    said = {check.what: check.outcome for check in verify(folder).checks}
    assert said["cache"] == "different"


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / "artefact.json").read_text())
    edit(record)
    (folder / "artefact.json").write_text(json.dumps(record))


def test_a_cache_that_holds_something_else_is_found(found: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    from recoup.export import compressed_tensors_parity as parity

    load = parity.load

    @torch.no_grad()
    def shifted(folder: Path) -> Any:
        engine = load(folder)
        engine.get_parameter(f"{ATTENTION}.k_scale").mul_(0.25)  # the largest keys saturate
        return engine

    monkeypatch.setattr(parity, "load", shifted)
    with pytest.raises(ParityError, match=r"self_attn\.key: transformers' output is .* times its bound"):
        TARGET.verify(found.model, found.folder, batch())


@pytest.mark.parametrize(
    "spec",
    [
        INT8,
        replace(FP8, format=E5M2),
        replace(FP8, scale_format=FLOAT32),
        replace(FP8, scale_rule="affine", format=IntFormat(8, signed=False)),
    ],
    ids=["int8", "e5m2", "float32 scales", "zero points"],
)
def test_what_no_reader_keeps_is_refused(spec: Any) -> None:
    with pytest.raises(ValueError, match=r"^kv: .* cannot be written for .* take kv: fp8$"):
        schema.check_cache(spec)


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"compressed-tensors"}))
def test_other_targets_refuse_it_before_any_work(target: str) -> None:
    model = llama()
    schemes = {"gguf": "q8_0"}
    plan = resolve(model, Recipe.model_validate({"scheme": schemes.get(target, "w8a8-static"), "kv": "fp8"}))
    with pytest.raises(ValueError, match=r"^kv: e4m3 per tensor, static asked, this target's artefacts"):
        preflight(model, plan, target)


def test_other_targets_refuse_to_export_it(tmp_path: Path) -> None:
    model = quantized(Recipe.model_validate({"scheme": "w8a8-static", "kv": "fp8"}))
    model.config.use_cache = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    with pytest.raises(ValueError, match=r"^kv: "):
        export(model, tmp_path / "out", "onnx", processor=Processor())
    with pytest.raises(ValueError, match=r"^kv: "):
        export(convert(model), tmp_path / "out", "onnx", processor=Processor())


def test_a_recipe_says_it_in_a_word_or_in_whole() -> None:
    recipe = Recipe.model_validate({"scheme": "fp8", "kv": "fp8"})
    assert recipe.kv == FP8
    assert recipe.model_dump()["kv"] == "fp8"
    own = Recipe(scheme="fp8", kv=replace(FP8, ranges="learned"))  # pyright: ignore[reportArgumentType]
    assert Recipe.model_validate(own.model_dump(mode="json")) == own
    assert Recipe.model_validate({"scheme": "fp8", "kv": "none"}).kv is None
    with pytest.raises(ValueError, match="no spec of keys and values 'int8'; there are fp8"):
        Recipe.model_validate({"scheme": "fp8", "kv": "int8"})
    with pytest.raises(ValueError, match="an engine writes keys and values token by token"):
        Recipe(scheme="fp8", kv=replace(FP8, ranges="dynamic"))  # pyright: ignore[reportArgumentType]
