"""A file that is not what was trained is caught, and the error names the module."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from recoup.export import TARGETS, Parity, ParityError

from .conftest import Exported

Damage = Callable[[onnx.ModelProto], None]


def stored(file: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in file.graph.initializer if tensor.name == name)


def change(name: str, edit: Callable[[np.ndarray], None]) -> Damage:
    """Edits one stored tensor."""

    def damage(file: onnx.ModelProto) -> None:
        tensor = stored(file, name)
        array = numpy_helper.to_array(tensor).copy()
        before = array.copy()
        edit(array)
        assert not np.array_equal(array, before)
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return damage


def one_bit(array: np.ndarray) -> None:
    array.reshape(-1)[5] ^= 1


def one_ulp(array: np.ndarray) -> None:
    array.reshape(-1)[3] = np.nextafter(array.reshape(-1)[3], np.float32(9))


def doubled(array: np.ndarray) -> None:
    array *= 2


def one_less(array: np.ndarray) -> None:
    array -= 1


def accuracy_level(path: str, level: int) -> Damage:
    def damage(file: onnx.ModelProto) -> None:
        node = next(node for node in file.graph.node if f"{path}.codes" in node.input)
        (attribute,) = [a for a in node.attribute if a.name == "accuracy_level"]
        assert attribute.i != level
        attribute.i = level

    return damage


def swapped(file: onnx.ModelProto) -> None:
    first, second = stored(file, "floats.codes"), stored(file, "again.codes")
    first.raw_data, second.raw_data = second.raw_data, first.raw_data


def other_inputs(file: onnx.ModelProto) -> None:
    """`again` reads what `floats` reads."""
    nodes = {node.input[1]: node for node in file.graph.node if len(node.input) > 1}
    nodes["again.codes"].input[0] = nodes["floats.codes"].input[0]


def without_a_module(file: onnx.ModelProto) -> None:
    for node in file.graph.node:
        node.input[:] = ["renamed" if name == "floats.codes" else name for name in node.input]
    stored(file, "floats.codes").name = "renamed"


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a code": (change("blocks.codes", one_bit), "blocks: the codes read back"),
    "a code of integers": (change("integers.codes", one_bit), "integers: the codes read back"),
    "a scale by one ulp": (change("floats.scale", one_ulp), "floats: the scale read back"),
    "a scale of integers": (change("integers.scale", one_ulp), "integers: the scale read back"),
    "a zero point": (change("integers.zero_point", one_less), "integers: the zero point read back"),
    "two modules' codes swapped": (swapped, "floats: the codes read back"),
    "a module that is no longer quantized": (without_a_module, "other modules than the plan: floats"),
    "inputs quantized that were in float": (accuracy_level("floats", 4), "floats: onnxruntime's output"),
    "inputs in float that were quantized": (accuracy_level("blocks", 1), "blocks: onnxruntime's output"),
    "another input lattice": (change("tokens.input_hi", one_less), "tokens: onnxruntime's"),
    "another bias": (change("tokens.bias", doubled), "tokens: onnxruntime's output"),
    "what stays in float": (change("head.weight", doubled), "outputs differ from the trained model's"),
    "a wire": (other_inputs, "again: onnxruntime's output"),
}  # fmt: skip


@pytest.fixture
def copied(chain: Exported, tmp_path: Path) -> Path:
    return shutil.copytree(chain.folder, tmp_path / "copy")


def test_an_untouched_copy_is_proven(chain: Exported, copied: Path) -> None:
    found: Parity = TARGETS["onnx"].verify(chain.converted, copied, torch.randn(3, 64))
    assert (found.modules, found.codes, found.scales) == (5, 5 * 64 * 64, 4 * 64 * 2 + 64)
    assert found.codes == chain.parity.codes


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_caught(chain: Exported, copied: Path, damage: Damage, message: str) -> None:
    damage(file := onnx.load(copied / "model.onnx"))
    onnx.save(file, copied / "model.onnx")
    with pytest.raises(ParityError) as error:
        TARGETS["onnx"].verify(chain.converted, copied, torch.randn(3, 64))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_left_in_the_folder(chain: Exported, copied: Path) -> None:
    before = sorted(copied.iterdir())
    TARGETS["onnx"].verify(chain.converted, copied, torch.randn(3, 64))
    assert sorted(copied.iterdir()) == before
