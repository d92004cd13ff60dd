"""Labelled images: found in folders or parquet, checked, and made into batches when those are asked for.

An image stays encoded, as its file holds it, until its batch is made: a training set of photographs would
not fit into memory as pixels.
"""

import hashlib
import io
import random
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, overload

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, field_validator, model_validator
from torch import Tensor

from recoup.tasks.documents import MEASURING_SEED
from recoup.tasks.task import Batch

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_COLUMNS = ("image", "label")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An encoded image and its label.

    Args:
        where: its file, or its row of a file; for messages.
        source: its file, or its bytes.
        label: the name of its class, or its number.
    """

    where: str
    source: Path | bytes
    label: str | int

    @property
    def encoded(self) -> bytes:
        """The bytes as they were found."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    @property
    def digest(self) -> bytes:
        """Equal for equal bytes alone."""
        return hashlib.blake2b(self.encoded, digest_size=16).digest()


class Preprocessing(BaseModel):
    """From an encoded image to what the model sees: resized, at most 1, less the mean, over the deviation.

    Args:
        size: height and width; one number for both.
        mean: of every channel, or of all of them.
        std: the same.
        interpolation: pillow's, which averages where it shrinks.
        channels: 3 for colours, 1 for grey.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[PositiveInt, PositiveInt]
    mean: tuple[FiniteFloat, ...]
    std: tuple[Annotated[FiniteFloat, Field(gt=0)], ...]
    interpolation: Interpolation = "bilinear"
    channels: Literal[1, 3] = 3

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, size: Any) -> Any:
        return (size, size) if isinstance(size, int) else size

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _for_all_channels(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _one_or_for_every_channel(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in {1, self.channels}:
                raise ValueError(
                    f"{name} has {len(values)} numbers for {self.channels} channels; write one number, or "
                    "one for every channel"
                )
        return self

    def __call__(self, pictures: Sequence[Picture]) -> Float[Tensor, "images channels height width"]:
        """Pixel values of pictures.

        Raises:
            ValueError: one of them is no image.
        """
        from PIL.Image import Resampling

        height, width = self.size
        resample = Resampling[self.interpolation.upper()]
        rows = [
            torch.frombuffer(
                bytearray(opened(picture, self.channels).resize((width, height), resample).tobytes()),
                dtype=torch.uint8,
            )
            for picture in pictures
        ]
        pixels = torch.stack(rows).reshape(-1, height, width, self.channels).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(value).reshape(1, -1, 1, 1) for value in (self.mean, self.std))
        return ((pixels - mean) / std).contiguous()


@dataclass(frozen=True, kw_only=True)
class Batches(Sequence[Batch]):
    """Batches of pictures, decoded when they are asked for.

    Args:
        pictures: in order.
        pixels: what a model sees of pictures.
        size: of every batch but the last.
        argument: of the model, for the pixels.
        label: from a picture to its class; None for batches without labels.
    """

    pictures: Sequence[Picture]
    pixels: Callable[[Sequence[Picture]], Tensor]
    size: int
    argument: str
    label: Callable[[Picture], int] | None = None

    def __len__(self) -> int:
        return -(-len(self.pictures) // self.size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        start = range(len(self))[index] * self.size
        chosen = self.pictures[start : start + self.size]
        batch = {self.argument: self.pixels(chosen)}
        if self.label is None:
            return batch
        return batch | {"labels": torch.tensor([self.label(picture) for picture in chosen])}


def read(path: Path) -> list[Picture]:
    """The labelled images of a folder with one folder for every class, or of a parquet file.

    Args:
        path: a folder, whose folders are called as their classes; or a file with the columns `image`
            (encoded, or a struct with `bytes`, as Hugging Face's datasets writes them) and `label`.

    Raises:
        ValueError: no images there or in the folder of a class, fewer than two classes, other columns, a row
            without image or label, or an image whose header is none or says more than 8 bits per channel.
        FileNotFoundError: no such file or folder.
        ImportError: parquet needs pyarrow.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder; task.data wants a folder with one folder for every class, or a "
            "parquet file"
        )
    pictures = _in_folders(path) if path.is_dir() else _in_parquet(path)
    classes = {picture.label for picture in pictures}
    if len(classes) < 2:
        found = f"one class, {min(classes)!r}" if classes else "no images"
        raise ValueError(f"{path}: {found} found; a classifier needs images of two classes")
    for picture in pictures:
        _check(picture)
    return pictures


def opened(picture: Picture, channels: int) -> Any:
    """The decoded image in colours or grey, upright as its EXIF data say, without its transparency.

    Raises:
        ValueError: it cannot be decoded.
    """
    from PIL import ImageOps

    with _open(picture) as image:
        return ImageOps.exif_transpose(image).convert({1: "L", 3: "RGB"}[channels])


def without(pictures: Sequence[Picture], others: Sequence[Picture]) -> list[Picture]:
    """Those of the pictures whose bytes none of the others has."""
    known = {other.digest for other in others}
    return [picture for picture in pictures if picture.digest not in known]


def some(pictures: list[Picture], count: int | None, key: str, where: Path) -> list[Picture]:
    """`count` of the pictures, drawn from all over the set and in its order; all of them for None.

    Raises:
        ValueError: fewer than that.
    """
    if count is None:
        return pictures
    if count > len(pictures):
        raise ValueError(
            f"task.{key}: {count} asked, {len(pictures)} found in {where}; leave {key} out to use all"
        )
    chosen = random.Random(MEASURING_SEED).sample(range(len(pictures)), count)
    return [pictures[index] for index in sorted(chosen)]


@contextmanager
def _open(picture: Picture) -> Generator[Any]:
    """The image, not decoded yet. What pillow says against it, then or later, is one line with its name."""
    from PIL import Image

    source = picture.source
    try:
        with (
            io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file,
            Image.open(file) as image,
        ):
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        said = str(error).splitlines()[0].partition(" <_io.")[0]
        raise ValueError(f"{picture.where}: no image that pillow can read ({said}); take it out") from None


def _check(picture: Picture) -> None:
    """What its header says; the rest is found out when its batch is made."""
    with _open(picture) as image:
        mode: str = image.mode
    if mode.startswith(("I", "F")):  # converted to 8 bits, they would be cut off at 255
        raise ValueError(
            f"{picture.where}: more than 8 bits per channel found (pillow's mode {mode}); save it with 8"
        )


def _in_folders(path: Path) -> list[Picture]:
    from PIL import Image

    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures: list[Picture] = []
    for folder in sorted(path.iterdir()):
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        files = [
            file
            for file in sorted(folder.rglob("*"))
            if file.is_file() and not file.name.startswith(".") and file.suffix.lower() in endings
        ]
        if not files:
            raise ValueError(
                f"{folder}: no images found, by the endings that pillow reads (.png, .jpg, ...); "
                "put some there, or take the folder out"
            )
        pictures += [Picture(where=str(file), source=file, label=folder.name) for file in files]
    return pictures


def _in_parquet(path: Path) -> list[Picture]:
    import pyarrow
    from pyarrow import parquet

    try:
        names = list(parquet.read_schema(path).names)
        absent = [name for name in _COLUMNS if name not in names]
        rows = [] if absent else parquet.read_table(path, columns=list(_COLUMNS)).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path}: not a parquet file ({str(error).splitlines()[0]}); task.data wants one, or a "
            "folder with one folder for every class"
        ) from None
    if absent:
        raise ValueError(f"{path}: no column {absent[0]!r}, there are {', '.join(names)}; rename it")
    return [_row(row, f"{path}: row {number}", path.parent) for number, row in enumerate(rows)]


def _row(row: dict[str, Any], where: str, folder: Path) -> Picture:
    image, label = (row[name] for name in _COLUMNS)
    if isinstance(image, dict):
        image = image.get("bytes") or (folder / image["path"] if image.get("path") else None)
    if not isinstance(image, bytes | Path):
        raise ValueError(f"{where}: its image is {type(image).__name__}, expected encoded bytes")
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f"{where}: its label is {label!r}, expected an integer or a string")
    return Picture(where=where, source=image, label=label)
