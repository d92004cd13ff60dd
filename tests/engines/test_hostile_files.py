"""10,000 damaged files: each is read, or one clear error; none hangs, ends the process or fills memory."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from recoup import convert, ptq
from recoup.engines import llama_cpp
from recoup.engines.onnx_file import check_onnx
from recoup.engines.onnxruntime import OnnxModel
from recoup.export import TARGETS
from tests.engines import mutations
from tests.export.gguf_models import batch, small

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
COUNTS = {
    "safetensors": 4500,
    "gguf": 2500,
    "onnx": 2200,
    "pt2": 600,  # looked through
    "onnxruntime": 200,
    "llama.cpp": 25,
    "torch": 15,  # and run by the engine itself
}
GROWN = 200 * 2**10  # KiB: two hundred times any of the files, and a small part of what headers claim


def linear(target: str, folder: Path) -> None:
    model = ptq(nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2)).eval(), "w8a8", [torch.randn(4, 32)])
    TARGETS[target].write(convert(model), folder, torch.randn(4, 32))


def a_few_values(folder: Path) -> None:
    """A file with every kind of metadata and three types of tensors."""
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(64)
    writer.add_float64("a.float", 1.5)
    writer.add_bool("a.bool", True)
    writer.add_int64("an.int", -5)
    writer.add_custom_alignment(32)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_types([1, 1, 1])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float16))
    blocks = np.ones((4, 34), np.uint8)
    writer.add_tensor("output.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama(folder: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(folder)


FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "safetensors": ("model.safetensors", llama),
    "gguf": ("model.gguf", a_few_values),
    "llama.cpp": ("model.gguf", lambda folder: TARGETS["gguf"].write(small("qwen2"), folder, batch())),
    "onnx": ("model.onnx", lambda folder: linear("onnx", folder)),
    "onnxruntime": ("model.onnx", lambda folder: linear("onnx", folder)),
    "pt2": ("model.pt2", lambda folder: linear("pytorch", folder)),
    "torch": ("model.pt2", lambda folder: linear("pytorch", folder)),
}


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    assert sum(COUNTS.values()) >= 10_000
    asked: list[str] = []
    for reader, count in COUNTS.items():
        name, write = FILES[reader]
        (tmp_path / reader).mkdir()
        write(tmp_path / reader)
        asked += [reader, str(tmp_path / reader / name), str(count)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.engines.reading", *asked],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"reader"')]
    assert [result["reader"] for result in found] == list(COUNTS)
    for result in found:
        assert result["wrong"] == [], result["reader"]
        assert result["read"] > 0  # some changes are legal: of a weight, or of a name
        assert result["refused"] > COUNTS[result["reader"]] // 10
        assert result["grown"] < GROWN
    print(*(f"{result['reader']}: {result['seconds']:.1f} s" for result in found))


@pytest.mark.parametrize("seed", range(1, 8))
def test_a_damaged_folder_of_transformers_is_refused(seed: int, tmp_path: Path) -> None:
    llama(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(mutations.safetensors(file.read_bytes(), random.Random(seed)))
    with pytest.raises(ValueError, match=r"model\.safetensors: no whole safetensors file \([^\n]*$"):
        TARGETS["compressed-tensors"].load(tmp_path)


def test_a_file_that_llama_cpp_ends_its_process_for_is_an_error(tmp_path: Path) -> None:
    TARGETS["gguf"].write(small("qwen2"), tmp_path, batch())
    file = tmp_path / "model.gguf"
    file.write_bytes(mutations.with_value(file.read_bytes(), b"qwen2.block_count", 0))
    message = (
        r"llama\.cpp does not load it \(it ended its process with SIGABRT: .*ASSERT.*\); export it again$"
    )
    with pytest.raises(ValueError, match=rf"model\.gguf: {message}"):
        TARGETS["gguf"].load(tmp_path)


def test_an_engine_that_ends_while_it_runs_is_an_error(tmp_path: Path) -> None:
    TARGETS["gguf"].write(small("qwen2"), tmp_path, batch())
    server = llama_cpp.Server(tmp_path, context=8, hidden=False, threads=1)
    os.kill(server._process.pid, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"llama\.cpp does not run it \(it ended its process with SIGKILL\)"):
        server.tokenize("a")


# What a tensor of an ONNX file says of its data

Change = Callable[[TensorProto], object]


def outside(location: str, **others: str) -> Change:
    def change(tensor: TensorProto) -> None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **others}.items():
            tensor.external_data.add(key=key, value=value)

    return change


TENSORS: dict[str, tuple[Change, str]] = {
    "above": (outside("../secret"), r"'weight' lies in '\.\./secret', which is no file of its folder"),
    "absolute": (outside("/etc/passwd"), "lies in '/etc/passwd', which is no file of its folder"),
    "a drive": (outside("C:\\secret"), "which is no file of its folder"),
    "a link": (outside("link"), "lies in 'link', which is no file of its folder"),
    "nothing": (outside("nothing"), "lies in 'nothing', which is no file of its folder"),
    "memory": (outside("*/_ORT_MEM_ADDR_/*", offset="4096", length="64"), "which is no file of its folder"),
    "beyond": (outside("data", offset="64", length="64"), "is 64 bytes at 64 of data, which has 64"),
    "before": (outside("data", offset="-8", length="64"), "is 64 bytes at -8 of data"),
    "short": (outside("data", offset="32", length="32"), "'weight' needs 64 bytes, there are 32"),
    "no number": (outside("data", offset="many"), "invalid literal"),
    "a shape": (lambda t: t.dims.__setitem__(0, 2**40), f"'weight' needs {2**44} bytes, there are 64"),
    "many axes": (lambda t: t.dims.extend([1] * 80), "'weight' has the shape"),
    "a negative shape": (lambda t: t.dims.__setitem__(0, -1), "'weight' has the shape"),
    "a type": (lambda t: setattr(t, "data_type", 77), r"'weight' has the shape \[4, 4\] and the type 77"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_claims_what_is_not_there(name: str, tmp_path: Path) -> None:
    change, message = TENSORS[name]
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(64))
    (folder / "data").write_bytes(bytes(64))
    (folder / "link").symlink_to(tmp_path / "secret")
    file = product()
    change(file.graph.initializer[0])
    (folder / "model.onnx").write_bytes(file.SerializeToString())
    with pytest.raises(ValueError, match=rf"model\.onnx: no whole ONNX file \([^\n]*{message}[^\n]*$"):
        OnnxModel(folder)


def test_data_beside_the_file_are_read(tmp_path: Path) -> None:
    file = product()
    outside("data", offset="0", length="64")(file.graph.initializer[0])
    (tmp_path / "model.onnx").write_bytes(file.SerializeToString())
    (tmp_path / "data").write_bytes(np.eye(4, dtype=np.float32).tobytes())
    x = torch.randn(2, 4)
    assert torch.equal(OnnxModel(tmp_path)(x)["y"], x)


def test_a_sparse_tensor_is_refused(tmp_path: Path) -> None:
    file = product()
    (dense,) = file.graph.initializer
    file.graph.sparse_initializer.add(values=dense, dims=[2**40])
    (tmp_path / "model.onnx").write_bytes(file.SerializeToString())
    with pytest.raises(ValueError, match="a sparse tensor, which becomes as large as it says"):
        check_onnx(tmp_path / "model.onnx")


def product() -> onnx.ModelProto:
    """y = x @ weight, 4 x 4."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    weight = onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], "g", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
