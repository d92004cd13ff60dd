"""A folder is verified later, from the folder alone; folders of all formats are read."""

import copy
import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recoup import convert, export, ptq
from recoup.cli import main
from recoup.export import TARGETS, verify
from recoup.export.artefact import FORMAT
from recoup.export.migrations import MIGRATIONS
from recoup.nn import FakeQuantizer, call
from recoup.schemes import PRESETS

from .artefacts import write as golden
from .conftest import Exported
from .test_parity import DAMAGES, Damage

FORMATS = range(FORMAT + 1)
GOLDEN = {
    f"{name}, format {number}": (name, number)
    for name, row in golden.MODELS.items()
    for number in FORMATS[row.since :]
}
every_golden = pytest.mark.parametrize(("name", "number"), GOLDEN.values(), ids=GOLDEN)
every_name = pytest.mark.parametrize("name", golden.MODELS)


def folder_of(name: str, number: int = FORMAT) -> Path:
    return golden.HERE / f"format-{number}" / name


@pytest.fixture
def copied(name: str, tmp_path: Path) -> Path:
    return shutil.copytree(folder_of(name), tmp_path / "copy")


# Formats


def test_there_are_folders_of_every_format_and_target() -> None:
    assert {row.target for row in golden.MODELS.values() if row.since == 0} == set(TARGETS)
    assert all(folder_of(name, number).is_dir() for name, number in GOLDEN.values())
    assert sorted(path.name for path in golden.HERE.glob("format-*")) == [f"format-{n}" for n in FORMATS]
    assert list(MIGRATIONS) == list(range(FORMAT))


@every_golden
def test_a_folder_of_every_format_runs_as_it_did(name: str, number: int) -> None:
    recorded = load_file(folder_of(name, number).with_suffix(".safetensors"))
    row = golden.MODELS[name]
    with torch.no_grad():
        engine = TARGETS[row.target].load(folder_of(name, number))
        found = golden.logits(call(engine, {row.batch: recorded["ids"]}))
    difference = (found - recorded["answers"]).norm() / recorded["answers"].norm()
    assert float(difference) <= float(recorded["allowed"])


@every_golden
def test_a_folder_of_every_format_is_verified_as_far_as_it_says(name: str, number: int) -> None:
    found, row = verify(folder_of(name, number)), golden.MODELS[name]
    assert found.same
    assert found.written.startswith(f"{row.target}, format {number}, written by ")
    if number == 0:
        assert {check.outcome for check in found.checks} == {"not checked"}
        assert "codes      not checked  format 0 has no digests of codes and scales" in str(found)
        assert str(found).endswith("is readable; what was exported is not known")
        return
    assert {check.what: check.outcome for check in found.checks} == {
        "files": "same",
        "codes": "same",
        "modules": "not checked" if row.target == "gguf" else "same",
        "outputs": "same",
        **dict.fromkeys(row.checks, "same"),
    }
    assert str(found).endswith("is what was exported")


@every_name
def test_a_folder_of_a_newer_format_is_refused(copied: Path) -> None:
    edited(copied, lambda data: data.update(format=FORMAT + 1))
    with pytest.raises(ValueError, match=rf"format {FORMAT + 1}, this recoup reads up to {FORMAT}; update"):
        verify(copied)


# Differences


@every_name
def test_verifying_changes_nothing(copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    verify(copied)
    assert {path.name: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["onnx", "onnx-qdq", "compressed-tensors", "gguf"])
def test_a_byte_that_changed_is_found(name: str, copied: Path) -> None:
    """In the middle of a quantized matrix: the file's sum and the digest of the codes say so."""
    file, place = middle_of_a_matrix(name, copied)
    content = bytearray((copied / file).read_bytes())
    content[place] ^= 1
    (copied / file).write_bytes(content)
    found = {check.what: check for check in verify(copied).checks}
    assert found["files"].outcome == found["codes"].outcome == "different"
    assert found["files"].found == f"{file} has other bytes"
    assert found["codes"].found.endswith((": other codes", ": other scale"))
    assert "\n" not in found["codes"].found


def middle_of_a_matrix(target: str, folder: Path) -> tuple[str, int]:
    name = {"gguf": "model.gguf", "compressed-tensors": "model.safetensors"}.get(target, "model.onnx")
    content = (folder / name).read_bytes()
    if target == "gguf":
        import gguf

        reader = gguf.GGUFReader(folder / name)
        tensor = next(tensor for tensor in reader.tensors if tensor.tensor_type.name == "Q4_0")
        return name, tensor.data_offset + 5
    if target == "compressed-tensors":
        codes = load_file(folder / name)["model.layers.0.mlp.up_proj.weight_packed"]
        return name, content.index(codes.numpy().tobytes()) + 5
    file = onnx.load(folder / name)
    codes = next(tensor for tensor in file.graph.initializer if tensor.name == "blocks.codes")
    return name, content.index(codes.raw_data) + 5


def test_a_program_has_sums_of_its_own(tmp_path: Path) -> None:
    copied = shutil.copytree(folder_of("pytorch"), tmp_path / "copy")
    content = bytearray((copied / "model.pt2").read_bytes())
    content[len(content) // 4] ^= 1
    (copied / "model.pt2").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt2: "):
        verify(copied)


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_export_catches_is_caught_later(
    chain: Exported, tmp_path: Path, damage: Damage, message: str
) -> None:
    copied = shutil.copytree(chain.folder, tmp_path / "copy")
    assert verify(copied).same
    damage(file := onnx.load(copied / "model.onnx"))
    onnx.save(file, copied / "model.onnx")
    edited(copied, lambda data: data.update(files={}))  # the sums are not what finds it here
    found = verify(copied)
    different = [check.found for check in found.checks if check.outcome == "different"]
    later = message.replace(" the codes read back", " other codes").replace(" read back", "")
    later = later.replace("floats: the scale", "floats: other scale")
    later = later.replace("integers: the scale", "integers: other scale")
    later = later.replace(
        "integers: the zero point", "integers: the zero point read back from the file is not 0"
    )
    assert any(later in text for text in different), (later, different)
    assert not found.same


def test_a_file_that_is_missing_or_new_bytes_are_named(tmp_path: Path) -> None:
    copied = shutil.copytree(folder_of("compressed-tensors"), tmp_path / "copy")
    (copied / "generation_config.json").unlink()
    (copied / "config.json").write_text((copied / "config.json").read_text() + "\n")
    (copied / "README.md").write_text("a file of one's own is nobody else's business")
    found = {check.what: check for check in verify(copied).checks}
    assert found["files"].found == "config.json has other bytes, generation_config.json is missing"
    assert found["codes"].outcome == found["modules"].outcome == found["outputs"].outcome == "same"


def test_other_answers_than_the_recorded_are_found(tmp_path: Path) -> None:
    """What is not quantized has no digest of its own; its file has a sum, and its answers show it."""
    copied = shutil.copytree(folder_of("compressed-tensors"), tmp_path / "copy")
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"] += 0.1
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    found = {check.what: check for check in verify(copied).checks}
    assert found["engine"].found.startswith("in transformers the outputs differ from the trained model's by")
    assert found["codes"].outcome == "same"


# What artefact.json says is not trusted


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / "artefact.json").read_text())
    edit(data)
    (folder / "artefact.json").write_text(json.dumps(data))


def _module(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["modules"]["along"].update(values)


def _convolution(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["modules"]["along"]["convolution"].update(values)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no format": (lambda data: data.pop("format"), "its format is None, and should be a number"),
    "a format that is true": (lambda data: data.update(format=True), "its format is True, and should be"),
    "a negative format": (lambda data: data.update(format=-1), "its format is -1, and should be"),
    "a key of its own": (lambda data: data.update(run="code"), "run: Unexpected keyword argument"),
    "no target": (lambda data: data.pop("target"), "target: "),
    "a target that there is not": (lambda data: data.update(target="os"), "no export target 'os'"),
    "a kind that there is not": (_module(kind="Module"), "modules.along: no kind 'Module'; there are Linear"),
    "a scheme that there is not": (_module(scheme="w9"), "modules.along: no scheme 'w9'; there are"),
    "a scheme that is none": (lambda data: data["schemes"].update({"w4a16": {"name": 1}}), "schemes.w4a16"),
    "a dtype that there is not": (_module(dtype="int3"), "modules.along.dtype: Input should be"),
    "places of numbers": (_module(places=[3]), "modules.along.places.0: Input should be a valid string"),
    "a convolution without": (_module(convolution=None), "along: a convolution without its strides"),
    "an endless padding": (_convolution(padding=[2**40]), "is no convolution of 96 columns"),
    "two axes": (_convolution(stride=[1, 1]), "is no convolution of 96 columns"),
    "no groups": (_convolution(groups=0), "is no convolution of 96 columns"),
    "a stride of 0": (_convolution(stride=[0]), "is no convolution of 96 columns"),
    "an example that is none": (lambda data: data["example"].update(batch="tensor"), "not the batch"),
    "answers that there are not": (lambda data: data["example"].update(answers=["a"]), "not the batch"),
    "every row of none": (lambda data: data["example"].update(every=0), "not the batch"),
    **{
        f"the file {name}": (lambda data, name=name: data.update(files={name: {"bytes": 1, "sha256": ""}}),
                             "is no file of its folder")
        for name in ("/etc/passwd", "../other", "a/../../b", "C:\\x", "", "..\\x")
    },
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_record_that_is_none_is_one_line(
    edit: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    copied = shutil.copytree(folder_of("onnx"), tmp_path / "copy")
    edited(copied, edit)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (what follows is the match)
        verify(copied)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


DIFFERENT: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a module less": (lambda data: data["modules"].pop("along"), "other modules than the plan: along"),
    "a module more": (lambda data: data["modules"].update(head=data["modules"]["blocks"]), "plan: head"),
    "another shape": (_module(shape=[16, 96]), "along: no codes of the shape (16, 96)"),
    "another scheme": (_module(scheme="w4a16"), "along: no scale of the shape (32, 3)"),
    "another kind": (_module(kind="Embedding"), "cannot be read as the recorded onnx folder"),
    "another padding": (_convolution(padding=[2]), "cannot be read as the recorded onnx folder"),
    "other digests": (lambda data: data["modules"]["along"]["digests"].clear(), "along: other codes"),
    "allowed nothing": (lambda data: data["example"].update(allowed=-1), "rounding explains -1"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_a_record_of_another_file_is_a_difference(
    edit: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    copied = shutil.copytree(folder_of("onnx"), tmp_path / "copy")
    edited(copied, edit)
    found = verify(copied)
    assert not found.same
    assert message in str(found)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b"3"])
def test_a_record_that_is_no_json_is_one_line(content: bytes, tmp_path: Path) -> None:
    copied = shutil.copytree(folder_of("onnx"), tmp_path / "copy")
    (copied / "artefact.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"artefact\.json: [^\n]*; export it again"):
        verify(copied)


_ANYTHING = (None, True, -1, 0, 2**31, 2**70, 1e300, "", "x", "w4a16", "../x", "\0", [], [1], {}, {"a": 1})


def test_a_record_changed_at_random_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    data = json.loads((folder_of("onnx") / "artefact.json").read_text())
    places = [place for place in _places(data) if place and place[0] != "files"]
    copied = shutil.copytree(folder_of("onnx"), tmp_path / "copy")
    read, refused = 0, list[str]()
    for seed in range(150):
        draw, changed = random.Random(seed), copy.deepcopy(data)
        *path, last = draw.choice(places)
        owner = functools.reduce(lambda owner, key: owner[key], path, changed)
        owner[last] = draw.choice(_ANYTHING)
        (copied / "artefact.json").write_text(json.dumps(changed))
        try:
            str(verify(copied))
            read += 1
        except ValueError as error:
            refused.append(str(error))
    assert read > 10
    assert len(refused) > 10
    assert not [message for message in refused if "\n" in message]


def _places(data: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [above, *(place for key, value in inner for place in _places(value, (*above, key)))]


def test_a_folder_that_is_no_artefact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder; expected one that recoup export wrote"):
        verify(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no artefact\.json; expected a folder that recoup export wrote"):
        verify(tmp_path)


# What is recorded


class Named(nn.Module):
    """Takes a number beside its tensor, and a list where it is given one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 8)

    def forward(self, x: Tensor, times: Any = 1) -> Tensor:
        return self.linear(x) * (times if isinstance(times, int) else len(times))


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "artefact.json").read_text())


def test_a_large_batch_is_cut_and_so_are_its_answers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1024, 4096)).eval()
    example = torch.randn(2000, 1024)
    export(ptq(model, "w4a16", [example[:8]]), tmp_path / "out", "onnx", example=example)
    tensors = load_file(tmp_path / "out" / "artefact.tensors")
    assert tensors["example.0"].shape == (1024, 1024)
    every = record(tmp_path / "out")["example"]["every"]
    assert every == 4
    assert tensors["answer."].shape == (256, 4096)
    assert torch.equal(tensors["example.0"], example[:1024])
    assert verify(tmp_path / "out").same


def test_a_batch_that_no_file_keeps_is_said_to_be_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recoup.export import record as recorded
    from recoup.export.answers import answers
    from recoup.export.trained import Trained, coded

    model = convert(ptq(Named(), "w4a16", [torch.randn(4, 32)])).eval()
    modules, places = coded(model)
    for name, times, kept in (("number", 3, True), ("list", [1, 2], False)):
        batch = {"x": torch.randn(4, 32), "times": times}
        whole, part = answers(model, batch)
        (tmp_path / name).mkdir()
        found = Trained(modules=modules, places=places, example=batch, answers=whole, recorded=part)
        recorded.write(tmp_path / name, "onnx", found)
        example = record(tmp_path / name)["example"]
        assert (example is not None) == kept
    assert example is None


def test_a_quantizer_of_its_own_is_recorded(tmp_path: Path) -> None:
    """One that belongs to no quantized module: of an output, of keys and values."""
    from recoup.export import artefact, migrations
    from recoup.export import record as recorded
    from recoup.export.answers import answers
    from recoup.export.rebuilt import quantizer
    from recoup.export.trained import Trained, coded, lattices

    spec = PRESETS["w8a8-static"].inputs
    assert spec is not None
    model = convert(ptq(nn.Sequential(nn.Linear(32, 8)), "w8a8-static", [torch.randn(4, 32)])).eval()
    model.add_module("own", FakeQuantizer(spec, rows=None, columns=None))
    model.own.set_range(torch.tensor([[-1.0]]), torch.tensor([[3.0]]))
    (modules, places), x = coded(model), torch.randn(4, 32)
    whole, part = answers(model, x)
    found = Trained(
        modules=modules, places=places, example=x, answers=whole, recorded=part, lattices=lattices(model)
    )
    assert set(found.lattices) == {"own"}
    recorded.write(tmp_path, "onnx", found)
    _, read = migrations.read(tmp_path)
    assert read is not None
    tensors = load_file(tmp_path / "artefact.tensors")
    again = quantizer(
        "own", read.lattices["own"], columns=None, state=artefact.state_of("lattice", "own", tensors)
    )
    assert torch.equal(again(x), model.own(x))


# The command


def exit_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as error:
        main(list(arguments))
    assert isinstance(error.value.code, int)
    return error.value.code


def test_the_command_says_0_1_or_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = shutil.copytree(folder_of("onnx"), tmp_path / "copy")
    assert exit_of("verify", str(copied)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{copied} is what was exported"
    edited(copied, lambda data: data["modules"]["blocks"]["digests"].update(codes="0"))
    assert exit_of("verify", str(copied)) == 1
    said = capsys.readouterr().out
    assert "codes      different    blocks: other codes" in said
    assert said.splitlines()[-1] == f"{copied} is NOT what it should be"
    assert exit_of("verify", str(tmp_path / "none")) == 2
    assert capsys.readouterr().err.startswith(f"recoup: {tmp_path / 'none'}: no such folder")
