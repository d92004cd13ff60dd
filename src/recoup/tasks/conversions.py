"""What the files of an opened package become: formats that tasks read, and nothing that needs pickle.

Every function takes the folder of the opened package and an empty folder that it fills.
"""

import gzip
import io
import json
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recoup.engines.transformers import quiet
from recoup.progress import busy, watched


def copied(package: Path, to: Path, *, under: str, names: Sequence[str]) -> None:
    """Files as they are."""
    for name in names:
        shutil.copy(package / under / name, to / name)


def jsonl_of_tables(package: Path, to: Path, *, tables: Mapping[str, str]) -> None:
    """Tables of category, tab, text under three header rows, as JSON lines with keys text and label."""
    for name, table in tables.items():
        rows = (package / table).read_bytes().decode("utf-8").split("\n")[3:]
        pairs = (row.split("\t", 1) for row in rows if row.strip())
        _write_lines(to / name, ({"text": text.strip(), "label": label} for label, text in pairs))


def jsonl_of_speeches(package: Path, to: Path, *, test_since: int) -> None:
    """One JSON file per speech as JSON lines with keys text, year and president, split by year.

    A year with two speeches is on one side as a whole.
    """
    speeches = [json.loads(path.read_bytes()) for path in sorted((package / "package/data").glob("*.json"))]
    rows = [{"text": s["text"].strip(), "year": s["year"], "president": s["name"]} for s in speeches]
    _write_lines(to / "train.jsonl", (row for row in rows if row["year"] < test_since))
    _write_lines(to / "test.jsonl", (row for row in rows if row["year"] >= test_since))


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = (f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in rows)
    path.write_bytes(b"".join(lines))  # in bytes: a text file would get other line ends on Windows


def folder_of_gguf(package: Path, to: Path, *, file: str) -> None:
    """A language model in GGUF as transformers' own folder, dequantized to float32, with its tokenizer.

    transformers reads GGUF in a minute or two and does not save what it has read; a new model with the same
    weights it saves, and loads within a second.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {
        "gguf_file": Path(file).name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    folder = (package / file).parent
    with busy("rebuilding the model from GGUF, once; about two minutes"), quiet():
        read: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
        del read.config.quantization_config
        model = type(read)(read.config)
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        model.save_pretrained(to)
        AutoTokenizer.from_pretrained(folder, **source).save_pretrained(to)


def safetensors_of_pth(package: Path, to: Path, *, file: str) -> None:
    """A checkpoint of PyTorch as model.safetensors, every tensor under its own name."""
    import torch
    from safetensors.torch import save_file

    # weights_only: a pickle could run code, and this one holds tensors alone.
    tensors = torch.load(package / file, map_location="cpu", weights_only=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        to / "model.safetensors",
        metadata={"format": "pt"},
    )


def parquet_of_idx(
    package: Path, to: Path, *, under: str, parts: Mapping[str, str], classes: Sequence[str]
) -> None:
    """Images and labels in IDX files (LeCun's MNIST page) as parquet, PNG and label a row.

    Columns and schema metadata are those that Hugging Face's datasets writes for Image and ClassLabel.
    """
    import numpy as np
    import pyarrow as pa
    from PIL import Image
    from pyarrow import parquet

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(classes)}}
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata=told)
    for name, part in parts.items():
        images, labels = (
            np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(_shape(data))
            for data in (
                gzip.decompress((package / under / f"{part}-{what}-ubyte.gz").read_bytes())
                for what in ("images-idx3", "labels-idx1")
            )
        )
        rows: list[dict[str, Any]] = []
        for pixels in watched(list(images), f"writing {name}"):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            rows.append({"bytes": png.getvalue(), "path": None})
        columns = [pa.array(rows, image), pa.array(labels.astype(np.int64))]
        parquet.write_table(pa.table(columns, schema=schema), to / name)


def _shape(data: bytes) -> tuple[int, ...]:
    """Of an IDX file: its fourth byte is the number of dimensions, each then a big-endian integer."""
    return struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
