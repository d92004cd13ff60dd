"""Every format that a compressed-tensors folder has, on a Llama: written, decoded by others, and damaged."""

import copy
import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jaxtyping
import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
)

from recoup import Recipe, calibrate, convert, export, prepare, resolve
from recoup.export import Parity, ParityError
from recoup.numerics import BFLOAT16, E8M0, FLOAT16, dequantize

from .llamas import FORMATS, SCHEMES, TARGET, TIED, Processor, Written, batch, llama, quantized, written

writer = importlib.import_module("recoup.export.compressed_tensors")


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """The same draws for every test; no type checks of numerics, which cost more than the rest together."""
    torch.manual_seed(1)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Written]:
    """Of one scheme each, written once."""
    made: dict[tuple[str, bool], Written] = {}
    root = tmp_path_factory.mktemp("folders")

    def get(name: str, tied: bool = False) -> Written:
        if (name, tied) not in made:
            made[name, tied] = written(SCHEMES[name], root / f"{name}-{tied}", tied=tied)
        return made[name, tied]

    return get


every_format = pytest.mark.parametrize("name", SCHEMES)
every_folder = pytest.mark.parametrize(
    ("name", "tied"), [*((n, False) for n in SCHEMES), *((n, True) for n in TIED)]
)


def as_float(tensor: Tensor) -> np.ndarray[Any, Any]:
    """By ml_dtypes, which is not ours."""
    raw = tensor.contiguous().view(torch.uint8).numpy()
    kinds = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.bfloat16: ml_dtypes.bfloat16}
    return raw.view(kinds.get(tensor.dtype, raw.dtype)) if tensor.dtype in kinds else tensor.numpy()


ROWS = slice(0, None, 9)  # enough of them for a decoder that goes bit by bit


def decoded(path: str, tensors: dict[str, Tensor], group: dict[str, Any]) -> np.ndarray[Any, Any]:
    """A second decoder, slow and plain: rows of the dense weight in float64, from stored bytes."""
    scale_tensor = tensors[f"{path}.weight_scale"]
    if scale_tensor.dtype == torch.uint8:
        scale = scale_tensor.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    else:
        scale = as_float(scale_tensor).astype(np.float64)
    if group["format"] == "pack-quantized":
        columns, bits = tensors[f"{path}.weight_shape"].tolist()[1], group["weights"]["num_bits"]
        words = tensors[f"{path}.weight_packed"].numpy()
        values = np.zeros((len(words), columns))
        for row in range(len(words))[ROWS]:
            stream = int.from_bytes(words[row].tobytes(), "little")
            values[row] = [(stream >> i * bits) % 2**bits - 2 ** (bits - 1) for i in range(columns)]
    elif f"{path}.weight_packed" in tensors:
        packed = tensors[f"{path}.weight_packed"].numpy()
        nibbles = np.dstack([packed % 16, packed // 16]).reshape(len(packed), -1).astype(np.uint8)
        values = nibbles.view(ml_dtypes.float4_e2m1fn)
    else:
        values = as_float(tensors[f"{path}.weight"])
    values = values.astype(np.float64)
    scale = scale.reshape(-1, 1) if scale.ndim == 1 else scale
    blocks = [-(-size // count) for size, count in zip(values.shape, scale.shape, strict=True)]
    divisor = tensors.get(f"{path}.weight_global_scale", torch.ones(1))
    return (values * np.kron(scale, np.ones(blocks)) / divisor.double().numpy())[ROWS]


@every_folder
def test_another_decoder_reads_the_trained_weights(
    name: str, tied: bool, folders: Callable[[str, bool], Written]
) -> None:
    found = folders(name, tied)
    (group,) = found.config["quantization_config"]["config_groups"].values()
    tensors = found.tensors
    assert len(found.coded) == 7
    for path, module in found.coded.items():
        trained = dequantize(module.weight.codes, module.weight.qparams, module.weight.spec).double()
        # One float32 product of code and step; a global scale is one product and one reciprocal more.
        np.testing.assert_allclose(
            decoded(path, tensors, group), trained.numpy()[ROWS], rtol=3 * 2**-24, atol=0
        )
    assert found.parity.modules == 7
    assert found.parity.divergence is not None
    assert 0 <= found.parity.divergence < 0.01
    assert found.parity.codes == sum(m.weight.codes.numel() for m in found.coded.values())


@every_format
def test_the_librarys_decompressor_reads_the_trained_weights(
    name: str, folders: Callable[[str, bool], Written]
) -> None:
    found = folders(name, False)
    config = QuantizationConfig.model_validate(found.config["quantization_config"])
    (scheme,) = cast(Any, config.config_groups.values())
    compressor = cast(Any, BaseCompressor.get_value_from_registry(scheme.format))
    for path, module in found.coded.items():
        state = {n.removeprefix(f"{path}."): t for n, t in found.tensors.items() if n.startswith(f"{path}.")}
        dense = compressor.decompress(state, scheme)["weight"]
        spec = module.weight.spec
        trained = dequantize(module.weight.codes, module.weight.qparams, spec).to(dense.dtype)
        if spec.global_scale or spec.scale_format in (BFLOAT16, FLOAT16):
            # Rounded to a short dtype, from a product that may differ in its last float32 bit.
            assert ((dense - trained).abs() <= torch.finfo(dense.dtype).eps * trained.abs()).all()
        else:
            assert dense.dtype == (torch.bfloat16 if spec.scale_format == E8M0 else torch.float32)
            assert torch.equal(dense, trained)


@every_format
def test_config_json_says_what_the_scheme_is(name: str, folders: Callable[[str, bool], Written]) -> None:
    config = folders(name, True).config
    quantization, scheme = config["quantization_config"], SCHEMES[name]
    format_ = next((f for f, names in FORMATS.items() if name in names), "pack-quantized")
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["quantization_status"] == "compressed"
    assert quantization["format"] == format_
    assert quantization["ignore"] == ["lm_head"]
    (group,) = quantization["config_groups"].values()
    assert (group["targets"], group["format"]) == (["Linear"], format_)
    assert group["weights"]["num_bits"] == scheme.weights.format.bits
    assert (group["input_activations"] is None) == (scheme.inputs is None)
    # The 4-bit floats and mxfp8 decompress to bfloat16 only, so the rest has to be bfloat16 as well.
    assert config["dtype"] == ("bfloat16" if format_[:2] in ("mx", "nv") else "float32")


def test_what_is_in_a_folder(folders: Callable[[str, bool], Written]) -> None:
    for tied in (False, True):
        found = folders("w4a16", tied)
        assert sorted(path.name for path in found.folder.iterdir()) == [
            *("artefact.json", "artefact.tensors", "config.json", "generation_config.json"),
            *("model.safetensors", "parity.json", "tokenizer.json"),
        ]
        assert ("lm_head.weight" in found.tensors) == (not tied)
        assert found.tensors["model.embed_tokens.weight"].dtype == torch.float32
        assert found.config["architectures"] == ["LlamaForCausalLM"]
        assert str(found.folder) not in (found.folder / "config.json").read_text()


@pytest.mark.parametrize("name", ["w4a8", "nvfp4a16", "mxfp8"])
def test_transformers_loads_the_folder_without_being_told_anything(
    name: str, folders: Callable[[str, bool], Written]
) -> None:
    found = folders(name, True)
    model = AutoModelForCausalLM.from_pretrained(found.folder)
    with torch.no_grad():
        logits = model(**batch()).logits
    assert logits.dtype == getattr(torch, found.config["dtype"])
    assert model.lm_head.weight is model.model.embed_tokens.weight


@every_format
def test_a_damaged_code_is_found(name: str, tmp_path: Path, folders: Callable[[str, bool], Written]) -> None:
    found = folders(name, False)
    path = "model.layers.0.mlp.up_proj"
    for part in ("weight", "weight_scale"):
        tensors = found.tensors
        stored = f"{path}.{part}" if f"{path}.{part}" in tensors else f"{path}.weight_packed"
        tensors[stored].view(torch.uint8).reshape(-1)[-1] ^= 1
        what = "scale" if part == "weight_scale" else "codes"
        with pytest.raises(ParityError, match=rf"up_proj: the {what} read back from the file differ"):
            verified(found, tensors, tmp_path / part)


def verified(found: Written, tensors: dict[str, Tensor], folder: Path) -> Parity:
    """The proof again, with other tensors in the folder."""
    shutil.copytree(found.folder, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return TARGET.compare(TARGET.trained(found.model, found.folder, batch()), folder)


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _added(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name] + 1})


_UP = "model.layers.0.mlp.up_proj"
DAMAGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "kept tensor": ("w4a16", _added("model.norm.weight"), "model.norm.weight: transformers does not load it"),
    "bias": ("w4a16", _added("model.layers.0.self_attn.q_proj.bias"), "q_proj.bias: transformers does not"),
    "no scale": ("w4a16", _without(f"{_UP}.weight_scale"), f"scales for other modules than the plan: {_UP}"),
    "global scale": ("nvfp4", _added(f"{_UP}.weight_global_scale"), f"{_UP}: the global divisor read"),
    "its input": ("nvfp4", _added(f"{_UP}.input_global_scale"), f"{_UP}: the input global divisor read"),
    "static input": ("w8a8-static", _added(f"{_UP}.input_scale"), f"{_UP}: the input scale read back"),
    "no input": ("fp8-static", _without(f"{_UP}.input_scale"), f"{_UP}: input_scale is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_any_other_damage_is_found(
    name: str,
    damage: Callable[[dict[str, Tensor]], None],
    message: str,
    tmp_path: Path,
    folders: Callable[[str, bool], Written],
) -> None:
    found = folders(name, False)
    tensors = found.tensors
    damage(tensors)
    with pytest.raises(ParityError, match=message):
        verified(found, tensors, tmp_path / "damaged")


def test_a_config_that_quantizes_less_is_found(
    tmp_path: Path, folders: Callable[[str, bool], Written]
) -> None:
    found = folders("w8a8", False)
    shutil.copytree(found.folder, tmp_path / "less")
    config = found.config
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [
        p for p in found.coded if p != _UP
    ]
    (tmp_path / "less" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ParityError, match=f"{_UP}: config.json does not say how it is quantized"):
        TARGET.compare(TARGET.trained(found.model, found.folder, batch()), tmp_path / "less")


def test_a_model_that_changed_meanwhile_is_found(
    tmp_path: Path, folders: Callable[[str, bool], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the bytes cannot show: transformers runs the right weights in another way."""
    found = folders("w4a16", False)
    parity = importlib.import_module("recoup.export.compressed_tensors_parity")
    load = parity.load

    def scaled(folder: Path, part: str) -> nn.Module:
        engine = load(folder)
        engine.get_submodule(part).register_forward_hook(lambda _, inputs, output: 1.01 * output)
        return engine

    for part, message in (
        (_UP, f"{_UP}: transformers' output is .* times its bound"),
        ("lm_head", r"in transformers the outputs differ from the trained model's by 0\.01"),
    ):
        monkeypatch.setattr(parity, "load", lambda folder, part=part: scaled(folder, part))
        with pytest.raises(ParityError, match=message):
            TARGET.verify(found.model, found.folder, batch())


def test_a_folder_of_several_files_is_read_whole(
    tmp_path: Path, folders: Callable[[str, bool], Written]
) -> None:
    found = folders("w4a16", True)
    shutil.copytree(found.folder, tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    saved = cast(Any, found.model)
    quiet = importlib.import_module("recoup.engines.transformers").quiet
    with quiet():
        saved.save_pretrained(
            tmp_path / "parts", state_dict=writer.state_dict(found.model), max_shard_size="40KB"
        )
    for file in (tmp_path / "parts").glob("model*"):
        shutil.copy2(file, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert TARGET.verify(found.model, tmp_path / "shards", batch()).modules == 7


def test_several_schemes_are_several_groups(tmp_path: Path) -> None:
    rules = [
        {"match": "*.mlp.down_proj", "scheme": "none"},
        {"match": "*.mlp", "scheme": "w8a8"},
        {"match": "*.o_proj", "scheme": "w4a8"},
    ]
    found = written(Recipe.model_validate({"scheme": "w4a16", "rules": rules}), tmp_path / "out")
    quantization = found.config["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert [(g["targets"], g["format"]) for g in quantization["config_groups"].values()] == [
        ([f"{attention}.{name}_proj" for name in "qkv"], "pack-quantized"),
        ([f"{attention}.o_proj"], "pack-quantized"),
        ([f"{mlp}.gate_proj", f"{mlp}.up_proj"], "int-quantized"),
    ]
    assert quantization["ignore"] == [f"{mlp}.down_proj", "lm_head"]


def test_every_other_format_stands_beside_others(tmp_path: Path) -> None:
    formats = {
        "self_attn.[qkv]_proj": ("nvfp4", "nvfp4-pack-quantized"),
        "self_attn.o_proj": ("mxfp8", "mxfp8-quantized"),
        "mlp.[gu]*_proj": ("mxfp4", "mxfp4-pack-quantized"),
    }
    rules = [{"match": f"*.{where}", "scheme": scheme} for where, (scheme, _) in formats.items()]
    found = written(Recipe.model_validate({"scheme": "fp8-block", "rules": rules}), tmp_path / "out")
    quantization = found.config["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    assert [group["format"] for group in quantization["config_groups"].values()] == [
        *(format_ for _, format_ in formats.values()),
        "float-quantized",
    ]
    assert found.parity.modules == 7


def test_an_encoder_says_no_next_words(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=16, hidden_size=32, **sizes)).eval()
    prepared = calibrate(prepare(model, resolve(model, "w8a8-static")), [batch()])
    parity = export(prepared, tmp_path / "out", "compressed-tensors", processor=Processor())
    assert (parity.modules, parity.divergence, parity.same_word) == (7, None, None)


def test_a_bfloat16_model_makes_a_bfloat16_folder(tmp_path: Path) -> None:
    trained = quantized("w8a16", tied=True)
    model = convert(copy.deepcopy(trained)).to(torch.bfloat16)
    export(model, tmp_path / "out", "compressed-tensors", processor=Processor(), example=batch())
    export(trained, tmp_path / "float32", "compressed-tensors", processor=Processor())
    whole = load_file(tmp_path / "float32" / "model.safetensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors[f"{_UP}.weight_scale"].dtype == torch.float32
    assert torch.equal(tensors[f"{_UP}.weight_packed"], whole[f"{_UP}.weight_packed"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["w4a16", "nvfp4"])
def test_writing_changes_nothing_in_the_model(name: str, tmp_path: Path) -> None:
    model = quantized(name, tied=True)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    dtype = cast(Any, model).config.dtype
    export(model, tmp_path / "out", "compressed-tensors", processor=Processor())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[n]) for n, tensor in before.items())
    assert cast(Any, model).config.dtype == dtype


def test_a_float_model_is_written_and_loaded_as_it_is(tmp_path: Path) -> None:
    model, example = llama(tied=True), batch()
    TARGET.write(model, tmp_path, example)
    with torch.no_grad():
        assert torch.equal(TARGET.load(tmp_path)(**example).logits, model(**example).logits)


def test_costs_are_sizes_and_say_why(tmp_path: Path, folders: Callable[[str, bool], Written]) -> None:
    TARGET.write(llama(), tmp_path, batch())
    before, after = TARGET.costs((tmp_path, folders("w4a16", False).folder), batch())
    assert before.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert after.bytes < before.bytes / 4
    assert (after.seconds, after.peak_bytes, after.batch) == (None, None, "2 x 8")
    assert "serve it with vLLM" in after.unmeasured
