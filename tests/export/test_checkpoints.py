"""Folders that other tools wrote are decoded, and compared with the float model.

The oracle is each tool itself: beside every folder lie weights as it dequantizes them (tests/export/peers).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recoup import export, ptq
from recoup.cli import main
from recoup.export import checkpoints, verify
from recoup.export.float_model import distance
from recoup.schemes import PRESETS

from . import gguf_models, llamas
from .peers.float_model import FLOAT, HERE, ROWS

PEERS = {path.name: path for path in sorted(HERE.glob("*-*")) if path.is_dir()}
untokenized = pytest.mark.filterwarnings("ignore:the artefact has no tokenizer")
every_peer = pytest.mark.parametrize("peer", PEERS)
_BFLOAT16 = 2.0**-8  # its unit roundoff


def float_weights() -> dict[str, Tensor]:
    return {
        name.removesuffix(".weight"): w.float() for name, w in load_file(FLOAT / "model.safetensors").items()
    }


@every_peer
def test_a_weight_is_what_the_tool_says_it_is(peer: str) -> None:
    """Tools compute in bfloat16 or float32: a scale, its product with a zero point, a weight is rounded."""
    said = load_file(PEERS[peer].with_suffix(".safetensors"))
    found, plain = dict(checkpoints.read(PEERS[peer]).weights()), float_weights()
    assert {path.rpartition(".")[2] for path in said} == {"k_proj", "down_proj"}
    for path, weight in said.items():
        decoded = found[path][::ROWS]
        apart = (decoded - weight).abs() > 3 * _BFLOAT16 * weight.abs()
        if peer == "modelopt-w4a16":  # in float32, but at a tie its fake quantization goes the other way
            apart = (decoded - weight).abs() > 2**-20 * weight.abs()
            middle = (decoded + weight) / 2
            tie = (middle - plain[path][::ROWS]).abs() <= 2**-20 * middle.abs()
            assert int(tie[apart].sum()) == int(apart.sum()) <= 5
            continue
        assert not apart.any()


@every_peer
def test_a_weight_is_within_a_step_of_the_float_one(peer: str) -> None:
    """What a wrong zero point, order or scale would not be."""
    bits = {"w2": 2, "w3": 3, "w8": 8, "fp8": 8}
    width = next(
        (bits[part] for part in reversed(peer.split("-")) if part in bits), 8 if "w8a8" in peer else 4
    )
    plain = float_weights()
    for path, weight in checkpoints.read(PEERS[peer]).weights():
        # Of values up to 4 deviations in 2^bits steps, each is rounded by a step or less.
        relative = float((weight - plain[path]).norm() / plain[path].norm())
        assert 0 < relative < 8 / 2 ** (width if width < 8 else 7)


@every_peer
def test_a_report_names_what_is_quantized_and_how_far_it_is(peer: str) -> None:
    found = verify(PEERS[peer], model=FLOAT)
    assert found.same
    assert found.distance is not None
    assert len(found.distance.layers) == 7
    said = str(found)
    assert "in float: model.embed_tokens" in said
    assert "with these weights, inputs in float: " in said
    assert f"{PEERS[peer]} is a quantization of that model" in said
    assert {check.what: check.outcome for check in found.checks} == {
        "layers": "measured", "weights": "measured", "engine": "not checked", "float": "measured",
    }  # fmt: skip


def test_without_a_float_model_every_layer_is_decoded_and_no_more() -> None:
    found = verify(PEERS["gptqmodel-gptq-v1"])
    assert [check.outcome for check in found.checks] == ["measured", "not checked", "not checked"]
    assert "each was decoded; --model compares with a float model" in str(found)


# Of another model


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    return lambda peer: shutil.copytree(PEERS[peer], tmp_path / peer)


def test_weights_of_another_model_are_a_difference(tmp_path: Path) -> None:
    other = shutil.copytree(FLOAT, tmp_path / "other")
    tensors = load_file(FLOAT / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = -tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.gate_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"][
        :64
    ].clone()
    save_file(tensors, other / "model.safetensors")
    found = verify(PEERS["modelopt-fp8"], model=other)
    assert not found.same
    assert found.distance is not None
    assert found.distance.absent == ("model.layers.0.mlp.gate_proj",)
    assert found.distance.foreign == ("model.layers.0.mlp.up_proj",)
    assert "different    not of this model: model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj" in str(
        found
    )


def test_a_quantized_model_is_no_float_model() -> None:
    with pytest.raises(ValueError, match=r"quantized itself \(gptq\); --model takes the float model"):
        verify(PEERS["modelopt-fp8"], model=PEERS["gptqmodel-gptq-v1"])


def test_a_checkpoint_of_the_inner_model_is_found_by_the_end_of_the_names(tmp_path: Path) -> None:
    inner = {name.removeprefix("model."): w for name, w in load_file(FLOAT / "model.safetensors").items()}
    save_file(inner, tmp_path / "model.safetensors")
    apart = distance(checkpoints.read(PEERS["modelopt-fp8"]).weights(), tmp_path)
    assert (len(apart.layers), apart.absent) == (7, ())


# What is not understood is refused by name


def changed(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(values)


def _group(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["config_groups"]["group_0"].update(values)


def _weights(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(values)


_W4, _K = "llm-compressor-w4a16", "model.layers.0.mlp.down_proj"
_V1 = "gptqmodel-gptq-v1"
REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "another tool": (_W4, changed(quant_method="quark"), "quant_method 'quark' is not read here; there are"),
    "another format": (_W4, _group(format="marlin-24"), f"{_K}: the format 'marlin-24' of"),
    "an old packing": (_W4, _weights(num_bits=3), "3 bits not in one stream, as compressed-tensors before"),
    "no group": (_W4, _group(targets=["Conv2d"]), f"{_K}: no group of the config is for it"),
    "an endless pattern": (_W4, _group(targets=["re:(a+)+$"]), "pattern '(a+)+$' is too much to look for"),
    "a broken pattern": (_W4, _group(targets=["re:["]), "no quantization config of compressed-tensors"),
    "no groups": (_W4, lambda c: c.pop("config_groups"), "no quantization config of compressed-tensors"),
    "groups of numbers": (_W4, changed(config_groups=[1]), "no quantization config of compressed-tensors"),
    "a layout of GPTQ": (_V1, changed(checkpoint_format="marlin"), "'marlin' is not read here"),
    "words of 16 bits": (_V1, changed(pack_dtype="int16"), "pack_dtype 'int16' is not read"),
    "rules for layers": (_V1, changed(dynamic={"a": {"bits": 8}}), "(`dynamic`) are not read"),
    "a layout of AWQ": ("auto-round-auto-awq", changed(version="gemv"), "the layout 'gemv' are not read"),
    "a packing": ("auto-round-w4", changed(packing_format="auto_round:x"), "'auto_round:x' is not read here"),
}  # fmt: skip


@pytest.mark.parametrize(("peer", "edit", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_refused_by_name(
    peer: str, edit: Callable[[dict[str, Any]], object], message: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(peer)
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:  # noqa: PT011 (what follows is the match)
        verify(folder, model=FLOAT)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_algorithm_of_modelopt_that_is_not_understood_is_named(copied: Callable[[str], Path]) -> None:
    folder = copied("modelopt-fp8")
    config = json.loads((folder / "hf_quant_config.json").read_text())
    config["quantization"]["quant_algo"] = "W4A8_AWQ"
    (folder / "hf_quant_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="ModelOpt's quant_algo 'W4A8_AWQ' is not read here"):
        verify(folder)


def test_layers_of_several_algorithms_are_each_read_as_their_own(copied: Callable[[str], Path]) -> None:
    folder, other = copied("modelopt-fp8"), load_file(PEERS["modelopt-nvfp4"] / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    own = {path: {"quant_algo": "FP8"} for path in checkpoints.read(folder).layers}
    tensors |= {name: tensor for name, tensor in other.items() if name.startswith(_K)}
    own[_K] = {"quant_algo": "NVFP4", "group_size": 16}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "hf_quant_config.json").read_text())
    config["quantization"] |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": own}
    (folder / "hf_quant_config.json").write_text(json.dumps(config))
    mixed = dict(checkpoints.read(folder).weights())
    for path, weight in checkpoints.read(PEERS["modelopt-fp8"]).weights():
        assert torch.equal(mixed[path], weight) == (path != _K)
    assert torch.equal(mixed[_K], dict(checkpoints.read(PEERS["modelopt-nvfp4"]).weights())[_K])


DAMAGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "no scales": (_W4, lambda t: t.pop(f"{_K}.weight_scale"), "are no packed integers weight"),
    "scales of another shape": ("modelopt-nvfp4", lambda t: t.update(
        {f"{_K}.weight_scale": t[f"{_K}.weight_scale"][:, :3].contiguous()}), "for blocks of 1 x 16"),
    "no zero points": (_V1, lambda t: t.pop(f"{_K}.qzeros"), "are no gptq weight"),
    "a group that there is not": (_V1, lambda t: t[f"{_K}.g_idx"].fill_(99), "are no gptq weight"),
    "weights in float": ("modelopt-fp8", lambda t: t.update({f"{_K}.weight": torch.zeros(64, 128)}),
                         "a weight in torch.float32"),
    "words of 8 bits": ("auto-round-auto-awq", lambda t: t.update({f"{_K}.qweight": torch.zeros(
        128, 8, dtype=torch.int8)}), "words in torch.int8"),
}  # fmt: skip


@pytest.mark.parametrize(("peer", "damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_tensors_that_are_no_such_weight_are_one_line(
    peer: str, damage: Callable[[dict[str, Tensor]], object], message: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(peer)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        verify(folder)
    assert str(error.value).startswith(f"{_K}: its tensors (")
    assert message in str(error.value)


def test_two_files_with_one_tensor_are_refused(copied: Callable[[str], Path]) -> None:
    folder = copied(_W4)
    shutil.copy2(folder / "model.safetensors", folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: .* is in model\.safetensors, too; remove one"):
        verify(folder)


# What recoup wrote itself


@untokenized
@pytest.mark.parametrize(
    "name", ["w3a16", "w4a16", "w8a8-static", "fp8", "fp8-block", "mxfp8", "mxfp4", "nvfp4"]
)
def test_a_folder_of_recoup_is_decoded_as_that_of_another_tool(name: str, tmp_path: Path) -> None:
    """By other code than `export` proves it with: the same weights."""
    from recoup import convert
    from recoup.export import share_global_scales
    from recoup.nn import CodedLinear

    model = share_global_scales(llamas.quantized(name))
    export(model, tmp_path / "out", "compressed-tensors", example=llamas.batch())
    coded = {path: m for path, m in convert(model).named_modules() if isinstance(m, CodedLinear)}
    found = dict(checkpoints.read(tmp_path / "out").weights())
    assert set(found) == set(coded)
    # NVFP4: the divisor and its reciprocal are each rounded once.
    exact = 0.0 if PRESETS[name].weights.global_scale is False else 2 * 2.0**-24
    for path, module in coded.items():
        weight = module.weight.decode().float()
        assert ((found[path] - weight).abs() <= exact * weight.abs()).all()


@untokenized
@pytest.mark.parametrize("target", ["compressed-tensors", "gguf"])
def test_an_artefact_is_compared_with_the_float_model(target: str, tmp_path: Path) -> None:
    float_model = gguf_models.small("llama 3")
    float_model.save_pretrained(tmp_path / "float")
    scheme = "q8_0" if target == "gguf" else "w8a16"
    export(gguf_models.quantized(scheme, float_model), tmp_path / "out", target)
    found = verify(tmp_path / "out", model=tmp_path / "float")
    assert found.same
    assert found.distance is not None
    assert len(found.distance.layers) == 7
    assert 0 < found.distance.total < 1 / 127  # half a step of 255, or less
    (said,) = [check.found for check in found.checks if check.what == "float"]
    assert said.startswith("outputs 0.0")
    assert "next words" in said


def test_a_float_model_that_does_not_run_is_not_compared(tmp_path: Path) -> None:
    """A model of one's own: its weights are compared by name, and its class is nobody's."""
    layers = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    (tmp_path / "float").mkdir()
    save_file(dict(layers.state_dict()), tmp_path / "float" / "model.safetensors")
    export(ptq(layers, "w4a16-g16", [torch.randn(8, 32)]), tmp_path / "out", "onnx")
    found = verify(tmp_path / "out", model=tmp_path / "float")
    assert found.same
    assert {check.what: check.outcome for check in found.checks}["weights"] == "measured"
    assert {check.what: check.outcome for check in found.checks}["float"] == "not checked"


def test_the_command_takes_a_float_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["verify", str(PEERS[_W4]), "--model", str(FLOAT)])
    assert error.value.code == 0
    assert "7 quantized (packed integers, 4 bits); in float: model.embed_tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        main(["verify", str(PEERS[_W4]), "--model", str(FLOAT / "none")])
    assert error.value.code == 2
    assert "no such folder; expected the float model's" in capsys.readouterr().err
