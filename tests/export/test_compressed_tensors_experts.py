"""Layers of experts in compressed-tensors folders: a Linear for each matrix, as checkpoints have them."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.utils.match import is_match
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from recoup import Recipe, calibrate, convert, export, prepare, resolve
from recoup.engines.transformers import load, load_stacks
from recoup.export import ParityError, preflight, verify
from recoup.export.compressed_tensors_experts import as_linears
from recoup.export.routing import routed, routing_of
from recoup.nn import CodedLinear, ExpertsOfLinears, call
from tests.nn.mixtures import EXPERTS, experts_of, mixture, words

from .llamas import TARGET, Processor, Written

parity = importlib.import_module("recoup.export.compressed_tensors_parity")

SPLIT = ("qwen3", "qwen2, shared expert", "mixtral", "olmoe", "deepseek")  # checkpoints have plain matrices
every_layout = pytest.mark.parametrize("name", SPLIT)
# One of each storage format, and one with a scale for the inputs of all experts.
SCHEMES = ("w3a16", "w4a8", "w8a8", "w8a8-static", "fp8", "fp8-static", "mxfp8", "mxfp4", "nvfp4", "nvfp4a16")
MIXED = {"scheme": "fp8", "rules": [{"match": "*.experts", "scheme": "w4a16"}]}


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """No type checks of numerics, which cost more than the rest together."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """Of one model and scheme each, written once."""
    made: dict[str, Written] = {}
    root = tmp_path_factory.mktemp("folders")

    def get(name: str = "qwen3", scheme: Any = "w4a16") -> Written:
        key = f"{name} {scheme}"
        if key not in made:
            made[key] = written(name, scheme, root / str(len(made)))
        return made[key]

    return get


def ready(name: str, scheme: Any) -> nn.Module:
    """Prepared, calibrated, settled."""
    model = mixture(name)
    torch.manual_seed(0)
    scheme = Recipe.model_validate(scheme) if isinstance(scheme, dict) else scheme
    return TARGET.settle(calibrate(prepare(model, resolve(model, scheme)), [words()], observer="minmax"))


def written(name: str, scheme: Any, folder: Path) -> Written:
    model = ready(name, scheme)
    found = export(model, folder, "compressed-tensors", processor=Processor())
    return Written(model=convert(model), folder=folder, parity=found)


def codes_of(found: Written) -> dict[str, CodedLinear]:
    return {path: m for path, m in as_linears(found.model).named_modules() if isinstance(m, CodedLinear)}


@every_layout
def test_experts_have_the_names_of_a_float_checkpoint(
    name: str, folders: Callable[..., Written], tmp_path: Path
) -> None:
    mixture(name).save_pretrained(tmp_path)
    plain = {key for key in load_file(tmp_path / "model.safetensors") if ".experts." in key}
    found = {key for key in folders(name).tensors if ".experts." in key}
    parts = ("weight_packed", "weight_scale", "weight_shape")
    assert len(plain) == 3 * EXPERTS
    assert found == {key.replace(".weight", f".{part}") for key in plain for part in parts}


@every_layout
def test_the_library_decodes_the_codes_of_the_stacks(name: str, folders: Callable[..., Written]) -> None:
    found = folders(name)
    _, stacks = experts_of(found.model)
    gates = ("w1", "w3") if name == "mixtral" else ("gate_proj", "up_proj")
    leaves = {"gate_up_proj": gates, "down_proj": ("w2",) if name == "mixtral" else ("down_proj",)}
    for stack, names in leaves.items():
        rows: list[Tensor] = []
        for expert in range(EXPERTS):
            for leaf in names:
                (path,) = {
                    key.rpartition(".")[0] for key in found.tensors if f".experts.{expert}.{leaf}." in key
                }
                packed, shape = (found.tensors[f"{path}.weight_{part}"] for part in ("packed", "shape"))
                rows.append(unpack_from_int32(packed, 4, torch.Size(shape.tolist())))
        assert torch.equal(torch.cat(rows), getattr(stacks, stack).codes)


@every_layout
def test_from_pretrained_computes_what_was_trained(name: str, folders: Callable[..., Written]) -> None:
    found = folders(name)
    model = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32).eval()
    torch.manual_seed(3)
    batch = words()
    with torch.no_grad():
        expected = call(found.model, batch)["logits"]
        torch.testing.assert_close(call(model, batch)["logits"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_format_is_proved_and_verified_from_the_folder_alone(
    scheme: str, folders: Callable[..., Written]
) -> None:
    found = folders("qwen3", scheme)
    assert found.parity.modules == 4 + 3 * EXPERTS
    again = verify(found.folder)
    assert again.same, again
    assert again.parity is not None
    assert again.parity.codes == found.parity.codes


def test_a_static_scale_of_inputs_is_one_for_all_experts(folders: Callable[..., Written]) -> None:
    found = folders("qwen3", "fp8-static").tensors
    for leaves in (("gate_proj", "up_proj"), ("down_proj",)):
        scales = [t for key, t in found.items() if ".experts." in key and key.endswith("input_scale")
                  and key.split(".")[-2] in leaves]  # fmt: skip
        assert len(scales) == EXPERTS * len(leaves)
        assert len({float(scale) for scale in scales}) == 1


def test_a_scale_for_each_expert_is_that_of_its_gate_and_its_up(folders: Callable[..., Written]) -> None:
    found = folders("qwen3", "fp8-static")
    _, stacks = experts_of(found.model)
    for expert, scale in enumerate(stacks.gate_up_proj.scale.flatten()):
        path = f"model.layers.0.mlp.experts.{expert}"
        for leaf in ("gate_proj", "up_proj"):
            assert torch.equal(found.tensors[f"{path}.{leaf}.weight_scale"], scale.reshape(1))


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_routers_are_named_as_float_by_both_their_names(name: str, folders: Callable[..., Written]) -> None:
    ignored = folders(name).config["quantization_config"]["ignore"]
    names = {"qwen3": ["mlp.gate"], "mixtral": ["mlp.gate", "block_sparse_moe.gate"]}[name]
    assert ignored == ["lm_head", *(f"model.layers.0.{leaf}" for leaf in names)]


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_a_group_of_experts_is_found_by_every_name_that_readers_ask_for(
    name: str, folders: Callable[..., Written]
) -> None:
    found = folders(name, MIXED)
    groups = found.config["quantization_config"]["config_groups"].values()
    (group,) = [group for group in groups if group["format"] == "pack-quantized"]
    assert found.config["quantization_config"]["format"] == "mixed-precision"
    block = {"qwen3": "mlp", "mixtral": "block_sparse_moe"}[name]
    for leaf in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"):
        path = f"model.layers.0.{block}.experts.0.{leaf}"
        assert is_match(path, nn.Linear(1, 1), group["targets"])
    assert not is_match("model.layers.0.self_attn.q_proj", nn.Linear(1, 1), group["targets"])
    assert any(target.startswith("re:") and "experts" in target for target in group["targets"])


def test_experts_as_linears_compute_what_the_stacks_do(folders: Callable[..., Written]) -> None:
    found = folders("qwen3", "w8a8")
    with torch.no_grad():
        outputs = [call(model, words_of())["logits"] for model in (found.model, as_linears(found.model))]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def words_of() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return words()


def test_transformers_alone_leaves_the_inputs_of_experts_in_float(folders: Callable[..., Written]) -> None:
    found = folders("qwen3", "fp8")
    stacks, linears = load_stacks(found.folder), load(found.folder)
    path, layer = experts_of(stacks)
    assert isinstance(linears.get_submodule(path), ExpertsOfLinears)
    dense = {key: module for key, module in linears.named_modules() if ".experts." in key}
    assert torch.equal(layer.down_proj[1], dense[f"{path}.1.down_proj"].weight)
    with torch.no_grad():
        apart = call(stacks, words_of())["logits"] - call(linears, words_of())["logits"]
    assert apart.abs().max() > 1e-3


def test_the_engine_is_asked_with_the_choices_of_the_trained_model(folders: Callable[..., Written]) -> None:
    engine = load(folders("qwen3", "w8a8").folder)
    batch = words_of()
    own = routing_of(engine, batch)
    path, _ = experts_of(engine)
    others = {**own, f"{path}.index": (own[f"{path}.index"] + 1) % EXPERTS}
    with torch.no_grad(), routed(engine, others):
        other = call(engine, batch)["logits"]
    with torch.no_grad():
        assert not torch.equal(call(engine, batch)["logits"], other)
        with routed(engine, own):
            told = call(engine, batch)["logits"]
        assert torch.equal(call(engine, batch)["logits"], told)


# Damage


def damaged(found: Written, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    folder.mkdir()
    for file in found.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_gate_and_up_in_each_others_place_are_another_model(
    folders: Callable[..., Written], tmp_path: Path
) -> None:
    found = folders()

    def swap(tensors: dict[str, Tensor]) -> None:
        gate, up = (f"model.layers.0.mlp.experts.2.{leaf}.weight_packed" for leaf in ("gate_proj", "up_proj"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    folder = damaged(found, tmp_path / "swapped", swap)
    trained = parity.trained(found.model, found.folder, words_of())
    with pytest.raises(ParityError, match=r"experts\.2\.gate_proj: .* codes differ|experts\.2\.gate_proj"):
        parity.compare(trained, folder)
    assert not verify(folder).same


def test_an_expert_that_is_missing_is_named(folders: Callable[..., Written], tmp_path: Path) -> None:
    found = folders()

    def drop(tensors: dict[str, Tensor]) -> None:
        for part in ("packed", "scale", "shape"):
            del tensors[f"model.layers.0.mlp.experts.3.up_proj.weight_{part}"]

    folder = damaged(found, tmp_path / "less", drop)
    trained = parity.trained(found.model, found.folder, words_of())
    with pytest.raises(ParityError, match=r"other modules than the plan: .*experts\.3\.up_proj"):
        parity.compare(trained, folder)


# Refused, before any work

REFUSED = {
    "gpt-oss, transposed": r"^model\.layers\.0\.mlp\.experts: in checkpoints of GptOssForCausalLM experts "
    r"have biases, and folders hold quantized Linears without; keep it with \{match: ",
    "nemotron, no gate": r"^model\.layers\.0\.mixer\.shared_experts\.up_proj: checkpoints of "
    r"NemotronHForCausalLM call it backbone\.layers\.0\.mixer\.shared_experts\.up_proj, and config\.json has",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_layouts_are_refused_before_work(name: str) -> None:
    model = mixture(name)
    with pytest.raises(ValueError, match=REFUSED[name]) as error:
        preflight(model, resolve(model, "w4a16"), "compressed-tensors")
    assert "\n" not in str(error.value)
