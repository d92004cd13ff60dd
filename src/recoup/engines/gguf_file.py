"""A GGUF file, looked through before the library or llama.cpp get to see it.

The library's reader takes counts, shapes and offsets as they are. Here they are compared with the size of the
file first, on the mapped bytes: every value of the header has room, every tensor is of a known type and lies
inside the file, at its alignment, and no two of them overlap.
"""

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any

FILE = "model.gguf"
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by the ids of GGUF's types
_ALIGNMENT, _UINT32 = b"general.alignment", 4
_LONGEST_LIST = 2**22  # the library makes an object for every item, and another
_LONGEST_NAME = 2**16
_AXES = 4


def model_file(path: str | Path) -> Path:
    """The file itself: the path, or model.gguf in the folder.

    Raises:
        FileNotFoundError: no such file.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected an exported GGUF model")
    return file


def size_bytes(folder: Path) -> int:
    """Bytes on disk of the file, without the tokenizer's own files and reports."""
    return model_file(folder).stat().st_size


def read(path: str | Path) -> Any:
    """A `gguf.GGUFReader` of a file that is whole.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged; says where.
        ImportError: the extra is not installed.
    """
    file = model_file(path)
    try:
        import gguf
    except ImportError:
        raise ImportError("running a GGUF file needs gguf: pip install 'recoup[gguf]'") from None
    widths = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Header(content).check(widths)
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: no whole GGUF file ({reason}); export it again") from None


def field(reader: Any, key: str) -> Any:
    """A value of the file's metadata; the file has it."""
    found = reader.get_field(key)
    if found is None:
        raise ValueError(f"the file's metadata has no {key}; export it again")
    return found.contents()


class _Header:
    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place, self.alignment = content, 0, 32

    def check(self, widths: dict[int, tuple[int, int]]) -> None:
        """Args: {id of a tensor type: (elements, bytes) of a block}."""
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensors, values = self._number("<I"), self._number("<Q"), self._number("<Q")
        if version not in (2, 3):
            raise ValueError(f"it is of version {version}, known are 2 and 3")
        for count, what in ((tensors, "tensors"), (values, "metadata values")):
            if count > len(self.content):
                raise ValueError(f"its header counts {count} {what} in {len(self.content)} bytes")
        for _ in range(values):
            self._value()
        infos = [self._tensor(widths) for _ in range(tensors)]
        start = -(-self.place // self.alignment) * self.alignment
        end, before = start, ""
        for offset, length, name in sorted(infos):
            if offset % self.alignment or start + offset + length > len(self.content):
                raise ValueError(f"{name!r} is {length} bytes at {offset}, which is not in the file")
            if start + offset < end:
                raise ValueError(f"{name!r} lies over {before!r}")
            end, before = start + offset + length, name

    def _value(self) -> None:
        key, kind = self._bytes(self._number("<Q")), self._number("<I")
        if kind == _ARRAY:
            items, count = self._number("<I"), self._number("<Q")
            if items == _STRING:
                for _ in range(self._count(count, 8)):
                    self._skip(self._number("<Q"))
            else:
                self._skip(self._width(items) * self._count(count, self._width(items)))
        elif kind == _STRING:
            self._skip(self._number("<Q"))
        elif key == _ALIGNMENT and kind == _UINT32:
            self.alignment = self._number("<I")
            if self.alignment.bit_count() != 1:
                raise ValueError(f"an alignment of {self.alignment}, which is no power of two")
        else:
            self._skip(self._width(kind))

    def _tensor(self, widths: dict[int, tuple[int, int]]) -> tuple[int, int, str]:
        """Its place, its bytes and its name."""
        length = self._number("<Q")
        if length > _LONGEST_NAME:
            raise ValueError(f"the name of a tensor has {length} bytes")
        name, axes = self._bytes(length).decode(), self._number("<I")
        if not 1 <= axes <= _AXES:
            raise ValueError(f"{name!r} has {axes} axes")
        shape = [self._number("<Q") for _ in range(axes)]
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in widths:
            raise ValueError(f"{name!r} is of type {kind}, which the installed gguf does not know")
        elements, width = widths[kind]
        if not prod(shape) or shape[0] % elements:
            raise ValueError(f"{name!r} has the shape {shape}, its blocks have {elements} elements")
        return offset, prod(shape) // elements * width, name

    def _width(self, kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"a value of type {kind} in the header, at {self.place}")
        return _SIZES[kind]

    def _count(self, count: int, width: int) -> int:
        """Items of a list, of at least so many bytes each."""
        if count > _LONGEST_LIST or count * width > len(self.content) - self.place:
            raise ValueError(
                f"a list of {count} items of {width} bytes in the header of a file of {len(self.content)}"
            )
        return count

    def _number(self, layout: str) -> int:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]

    def _bytes(self, length: int) -> bytes:
        start = self.place
        self._skip(length)
        return self.content[start : self.place]

    def _skip(self, length: int) -> None:
        if length > len(self.content) - self.place:
            raise ValueError(
                f"a value of {length} bytes in the header of a file of {len(self.content)}, at {self.place}"
            )
        self.place += length
