"""Files that are almost right: bytes changed at random, and fields that lie about a file of their own format.

A mutation is a function of the file and of a generator, so a case is its seed.
"""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import onnx

INTEGERS = [
    *(0, 1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 128, 255, 256, 2**15, 2**16, 2**20, 2**31 - 1, 2**31),
    *(2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, -1, -(2**63)),
]
Mutation = Callable[[bytes, random.Random], bytes]


def noise(raw: bytes, rng: random.Random) -> bytes:
    """Cut, changed, lost or repeated bytes, and numbers in the place of others; mostly near the beginning."""
    changed = bytearray(raw)
    top = min(len(raw), 3000) if rng.random() < 0.7 else len(raw)
    place = rng.randrange(top)
    match rng.randrange(6):
        case 0:
            del changed[place:]
        case 1:
            for _ in range(rng.randrange(1, 6)):
                changed[rng.randrange(top)] = rng.randrange(256)
        case 2:
            changed[place : place + 8] = struct.pack("<q", rng.choice(INTEGERS))
        case 3:
            changed[place : place + 4] = struct.pack("<I", rng.choice(INTEGERS) % 2**32)
        case 4:
            del changed[place : place + rng.randrange(1, 64)]
        case _:
            start = rng.randrange(top)
            changed[place:place] = raw[start : start + rng.randrange(1, 64)]
    return bytes(changed)


def safetensors(raw: bytes, rng: random.Random) -> bytes:
    """Offsets that overlap, reach out or leave holes, other shapes and types, a header of another length."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    match rng.randrange(6):
        case 0:
            entry["data_offsets"][rng.randrange(2)] = rng.choice(INTEGERS)
        case 1:
            entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
        case 2:
            entry["shape"] = [rng.choice(INTEGERS) for _ in range(rng.randrange(4))]
        case 3:
            entry["dtype"] = rng.choice(["F32", "F4", "I64", "F8_E8M0", "BOOL", "F6_E2M3", "C64", "X"])
        case 4:
            del entry[rng.choice(list(entry))]
        case _:
            text = json.dumps(header).encode()
            return struct.pack("<Q", rng.choice(INTEGERS) % 2**64) + text + data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_WIDTHS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def gguf(raw: bytes, rng: random.Random) -> bytes:
    """Metadata with other values and types, tensors with other shapes, types, places and names."""
    values, tensors, data = _opened_gguf(raw)
    for _ in range(rng.randrange(1, 3)):
        if rng.random() < 0.6:
            _change_value(values, rng)
        else:
            tensor = rng.choice(tensors)
            match rng.randrange(5):
                case 0:
                    tensor[1] = [rng.choice(INTEGERS) for _ in range(rng.randrange(6))]
                case 1:
                    tensor[2] = rng.choice([0, 1, 2, 3, 8, 12, 14, 30, 35, 39, 99, 2**31])
                case 2:
                    tensor[3] = rng.choice([*INTEGERS, len(data), *(other[3] for other in tensors)])
                case 3:
                    tensor[0] = rng.choice(tensors)[0]
                case _:
                    tensor[1] = tensor[1][::-1]
    return _closed_gguf(values, tensors, data)


def with_value(raw: bytes, key: bytes, value: int) -> bytes:
    """The same GGUF file but for one number of its metadata."""
    values, tensors, data = _opened_gguf(raw)
    next(entry for entry in values if entry[0] == key)[2] = value
    return _closed_gguf(values, tensors, data)


def _change_value(values: list[list[Any]], rng: random.Random) -> None:
    entry = rng.choice(values)
    _, kind, value = entry
    if rng.random() < 0.1:
        values.remove(entry)
    elif rng.random() < 0.1:
        entry[1] = rng.choice([*_WIDTHS, _STRING, _ARRAY, 13, 2**32 - 1])
    elif kind == _ARRAY and value[1]:
        place = rng.randrange(len(value[1]))
        if rng.random() < 0.4:
            del value[1][place:]
        else:
            value[1][place] = _other(value[0], rng)
    elif kind != _ARRAY:
        entry[2] = _other(kind, rng)


def _other(kind: int, rng: random.Random) -> Any:
    if kind == _STRING:
        return rng.choice([b"", b"llama", b"gemma2", b"bert", b"mamba", b"phi3", b"\xff", b"x" * 999])
    return rng.choice([0.0, -1.0, float("nan"), 1e30] if _WIDTHS.get(kind) in ("f", "d") else INTEGERS)


def _opened_gguf(raw: bytes) -> tuple[list[list[Any]], list[list[Any]], bytes]:
    stream = io.BytesIO(raw)

    def number(layout: str) -> Any:
        return struct.unpack(f"<{layout}", stream.read(struct.calcsize(f"<{layout}")))[0]

    def text() -> bytes:
        return stream.read(number("Q"))

    def value(kind: int) -> Any:
        if kind == _ARRAY:
            items, count = number("I"), number("Q")
            return [items, [value(items) for _ in range(count)]]
        return text() if kind == _STRING else number(_WIDTHS[kind])

    _, _, tensors, values = stream.read(4), number("I"), number("Q"), number("Q")
    metadata: list[list[Any]] = []
    for _ in range(values):
        key, kind = text(), number("I")
        metadata.append([key, kind, value(kind)])
    infos = [
        [text(), [number("Q") for _ in range(number("I"))], number("I"), number("Q")] for _ in range(tensors)
    ]
    return metadata, infos, raw[-(-stream.tell() // 32) * 32 :]


def _closed_gguf(values: list[list[Any]], tensors: list[list[Any]], data: bytes) -> bytes:
    def text(content: bytes) -> bytes:
        return struct.pack("<Q", len(content)) + content

    def value(kind: int, given: Any) -> bytes:
        if isinstance(given, bytes):
            return text(given)
        if isinstance(given, list):
            items, listed = given
            return struct.pack("<IQ", items, len(listed)) + b"".join(value(items, item) for item in listed)
        if isinstance(given, float):
            return struct.pack("<d" if kind == 12 else "<f", given)
        size = struct.calcsize(f"<{_WIDTHS.get(kind, 'Q')}")
        return (given % 2 ** (8 * size)).to_bytes(size, "little")

    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    for key, kind, given in values:
        parts += [text(key), struct.pack("<I", kind), value(kind, given)]
    for name, shape, kind, offset in tensors:
        parts += [text(name), struct.pack("<I", len(shape)), *(struct.pack("<Q", n % 2**64) for n in shape)]
        parts += [struct.pack("<IQ", kind, offset % 2**64)]
    head = b"".join(parts)
    return head + bytes(-len(head) % 32) + data


def onnx_fields(raw: bytes, rng: random.Random) -> bytes:
    """Other numbers, names and bytes in fields anywhere in the graph; parts of it lost or repeated."""
    file = onnx.ModelProto.FromString(raw)
    for _ in range(rng.randrange(1, 4)):
        fields: list[tuple[Any, Any]] = []
        pending: list[Any] = [file]
        while pending:
            message = pending.pop()
            for field, value in message.ListFields():
                fields.append((message, field))
                if field.message_type:
                    pending += list(value) if field.is_repeated else [value]
        _change_field(*rng.choice(fields), [node.op_type for node in file.graph.node], rng)
    return file.SerializeToString()


def _change_field(message: Any, field: Any, operators: list[str], rng: random.Random) -> None:
    value = getattr(message, field.name)
    if field.message_type:
        if field.is_repeated and rng.random() < 0.5:
            del value[rng.randrange(len(value))]
        elif field.is_repeated:
            value.add().CopyFrom(value[rng.randrange(len(value))])
        return
    if field.is_repeated:
        place = rng.randrange(len(value))
        if rng.random() < 0.3:
            del value[place]
            return
    old = value[place] if field.is_repeated else value
    if isinstance(old, bytes):
        new: Any = old[: rng.randrange(len(old) + 1)] + bytes(rng.randrange(64))
    elif isinstance(old, str):
        new = rng.choice([*operators, "", "../x", "If", "Loop", "ConstantOfShape", "Expand", "Range", "Pad"])
    elif isinstance(old, float):
        new = rng.choice([0.0, -1.0, float("nan"), 1e30])
    else:
        legal = field.enum_type.values_by_number if field.enum_type else range(27)
        new = rng.choice(INTEGERS if field.type == field.TYPE_INT64 else list(legal))
    if field.is_repeated:
        value[place] = new
    else:
        setattr(message, field.name, new)


def archive(raw: bytes, rng: random.Random) -> bytes:
    """Other values in the JSON of a .pt2 file, or other bytes in its records, under checksums that fit."""
    with zipfile.ZipFile(io.BytesIO(raw)) as opened:
        records = {entry.filename: opened.read(entry) for entry in opened.infolist()}
    described = [name for name in records if name.endswith(".json")]
    graph = next(name for name in described if name.endswith("model.json"))
    name = rng.choice([*records, *described, graph, graph])
    if name in described:
        content = json.loads(records[name])
        _change_json(content, rng)
        records[name] = json.dumps(content).encode()
    elif records[name]:
        records[name] = noise(records[name], rng)
    closed = io.BytesIO()
    with zipfile.ZipFile(closed, "w", zipfile.ZIP_STORED) as written:
        for name, content in records.items():
            written.writestr(name, content)
    return closed.getvalue()


def _change_json(content: Any, rng: random.Random) -> None:
    places: list[tuple[Any, Any]] = []
    pending = [content]
    while pending:
        inner = pending.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        places += [(inner, key) for key in keys]
        pending += [inner[key] for key in keys if isinstance(inner[key], (dict, list))]
    inner, key = rng.choice(places)
    old = inner[key]
    if isinstance(old, bool):
        inner[key] = not old
    elif isinstance(old, int):
        inner[key] = rng.choice(INTEGERS)
    elif isinstance(old, str):
        inner[key] = rng.choice(["", f"{old}x", "torch.ops.aten.relu.default", "os.system"])
    elif isinstance(old, (dict, list)) and old and rng.random() < 0.7:
        del old[rng.choice(list(old) if isinstance(old, dict) else range(len(old)))]
    else:
        inner[key] = rng.choice([None, 0, "", [], {}])
