"""What an ONNX file claims is there, before onnxruntime or onnx get to see it.

A file is a protobuf message: fields with a number, a length and a payload, one inside the other. They are
walked here on the mapped bytes, so nothing is allocated for what a length or a shape claims. Every tensor
must have the bytes that its shape and type need, in the file or beside it: a tensor whose data lie outside
the file names a file in the same folder, and nothing else. (onnxruntime takes some names for addresses in
memory.)

What is computed from the tensors is not looked at: a graph is a program, and runs in the engine's kernels.
"""

import mmap
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath

_SPARSE = "sparse tensor"
# By the numbers of onnx.proto (onnx 1.19): message -> field -> the message in it that may hold tensors.
_INNER: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: _SPARSE},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: _SPARSE, 23: _SPARSE},
}
_DIMS, _TYPE, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 8, 9, 13, 14
_TYPED = (4, 5, 6, 7, 10, 11)  # lists of numbers, which hold a tensor where raw data do not
_BITS: dict[int, int] = {  # of an element, by the type of a tensor
    1: 32,
    2: 8,
    3: 8,
    4: 16,
    5: 16,
    6: 32,
    7: 64,
    8: 8,
    9: 8,
    10: 16,
    11: 64,
    12: 32,
    13: 64,
    14: 64,
    15: 128,
    16: 16,
    17: 8,
    18: 8,
    19: 8,
    20: 8,
    21: 4,
    22: 4,
    23: 4,
    24: 8,
    25: 2,
    26: 2,
}
_DEPTH = 100  # of messages in each other, protobuf's own limit
_AXES = 64
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Span = tuple[int, int]


def check_onnx(file: Path) -> None:
    """Look through a file.

    Raises:
        ValueError: it is damaged, claims more than it holds, or names data outside of its folder. One line.
        OSError: it cannot be read.
    """
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _File(file, content).check()
    except (ValueError, struct.error) as error:
        raise ValueError(f"{file}: no whole ONNX file ({error}); export it again") from None


class _File:
    def __init__(self, file: Path, content: mmap.mmap) -> None:
        self.folder, self.content = file.parent, content

    def check(self) -> None:
        graphs = 0
        pending: list[tuple[str, Span, int]] = [("model", (0, len(self.content)), 0)]
        while pending:
            kind, span, depth = pending.pop()
            if depth > _DEPTH:
                raise ValueError(f"more than {_DEPTH} messages in each other")
            if kind == "tensor":
                self._tensor(span)
                continue
            for number, payload in self._fields(span):
                inner = _INNER[kind].get(number)
                if inner is None:
                    continue
                if not isinstance(payload, tuple):
                    raise ValueError(f"a number where a {inner} should be")
                if inner == _SPARSE:
                    raise ValueError("a sparse tensor, which becomes as large as it says")
                graphs += (kind, inner) == ("model", "graph")
                pending.append((inner, payload, depth + 1))
        if not graphs:
            raise ValueError("it has no graph")

    def _tensor(self, span: Span) -> None:
        dims: list[int] = []
        kind, stored, typed, external, name = 0, 0, False, False, ""
        entries: dict[str, str] = {}
        for number, payload in self._fields(span):
            if number == _DIMS:
                dims += [payload] if isinstance(payload, int) else self._varints(payload)
            elif isinstance(payload, int):
                kind = payload if number == _TYPE else kind
                external = payload == 1 if number == _LOCATION else external
            elif number == _NAME:
                name = self._text(payload)
            elif number == _EXTERNAL:
                entries |= [self._entry(payload)]
            elif number == _RAW or number in _TYPED:
                stored, typed = stored + payload[1] - payload[0], typed or number in _TYPED
        if len(dims) > _AXES or any(dim >= 2**63 for dim in dims) or kind not in _BITS:
            raise ValueError(f"the tensor {name!r} has the shape {dims[:_AXES]} and the type {kind}")
        needed = -(-prod(dims) * _BITS[kind] // 8)
        if external:
            stored = self._beside(name, entries)
        elif typed:  # a list of numbers, of a byte or more for each
            stored *= 16
        if needed > stored:
            raise ValueError(f"the tensor {name!r} needs {needed} bytes, there are {stored}")

    def _beside(self, name: str, entries: dict[str, str]) -> int:
        """The bytes of a tensor whose data lie in a file of the same folder."""
        location = entries.get("location", "")
        paths = PurePosixPath(location), PureWindowsPath(location)
        found = (self.folder / location).resolve()
        if (
            any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)
            or not found.is_relative_to(self.folder.resolve())
            or not found.is_file()
        ):
            raise ValueError(f"the tensor {name!r} lies in {location!r}, which is no file of its folder")
        size, offset = found.stat().st_size, int(entries.get("offset", "0"))
        length = int(entries.get("length", size - offset))
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(
                f"the tensor {name!r} is {length} bytes at {offset} of {location}, which has {size}"
            )
        return length

    def _entry(self, span: Span) -> tuple[str, str]:
        found = {number: self._text(payload) for number, payload in self._fields(span)
                 if isinstance(payload, tuple)}  # fmt: skip
        return found.get(1, ""), found.get(2, "")

    def _text(self, span: Span) -> str:
        return self.content[slice(*span)].decode("utf-8")

    def _varints(self, span: Span) -> list[int]:
        found: list[int] = []
        place = span[0]
        while place < span[1]:
            value, place = self._varint(place, span[1])
            found.append(value)
        return found

    def _varint(self, place: int, end: int) -> tuple[int, int]:
        """A number of 7 bits to the byte, and where the next one begins."""
        value = 0
        for shift in range(0, 70, 7):
            if place >= end:
                raise ValueError("a number is cut off")
            byte = self.content[place]
            value, place = value | (byte & 127) << shift, place + 1
            if byte < 128:
                return value & 2**64 - 1, place
        raise ValueError("a number of more than 10 bytes")

    def _fields(self, span: Span) -> Iterator[tuple[int, int | Span]]:
        """The fields of a message: number, and value or place of the payload."""
        place, end = span
        while place < end:
            tag, place = self._varint(place, end)
            number, wire = tag >> 3, tag & 7
            if wire == _VARINT:
                value, place = self._varint(place, end)
                yield number, value
                continue
            if wire == _BYTES:
                length, place = self._varint(place, end)
            elif wire in (_FIXED64, _FIXED32):
                length = 8 if wire == _FIXED64 else 4
            else:
                raise ValueError(f"a field of the kind {wire}, which ONNX does not have")
            if not number or length > end - place:
                raise ValueError(f"a field of {length} bytes where {end - place} are left")
            yield number, (place, place + length)
            place += length
