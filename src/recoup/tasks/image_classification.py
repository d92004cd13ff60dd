"""Image classification: a classifier of the user's or of transformers, on labelled images.

    accuracy         per test image 1 or 0: the largest logit is that of its label
    cross-entropy    per test image, in nats

Slices, fixed before the weights move: "rare-classes" by the labels of the test images, and "least-certain",
the tenth of them for which the float model's largest logit is least ahead of its second: where quantization
changes an answer first.

Images whose bytes are also in the test set are never calibrated or trained on.
"""

import inspect
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recoup.engines.transformers import quiet
from recoup.progress import watched
from recoup.schemes import Recipe, parse
from recoup.tasks.assets import locate
from recoup.tasks.custom import entry_point
from recoup.tasks.images import Batches, Picture, Preprocessing, opened, read, some, without
from recoup.tasks.pretrained import check, files_of, load_image_classifier, model_folder
from recoup.tasks.task import Batch, Task, asking, sha256_of, too_few
from recoup.validate import Samples

LEAST_CERTAIN = 0.1  # share of the test images
_ENTRY = r"[\w.]+:\w+"
_UNNAMED = r"LABEL_\d+"  # what transformers calls a class whose name nobody gave it
_NUMBER = r"(?:LABEL_)?(\d+)"


class Data(BaseModel):
    """Folders with one folder for every class, or parquet files with the columns image and label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str
    test: str


class Settings(BaseModel):
    """What the recipe says under `task`.

    Args:
        model: a folder, a hub id, "asset:NAME", or "module:function": a function without arguments that
            gives an nn.Module, which takes images and returns logits.
        data: train and test images.
        preprocessing: instead of that in the model's folder.
        batch_size: of every batch.
        train_images, test_images: drawn from the data; all of them where absent.
        rare_below: classes with less than this share of the test images are the slice "rare-classes";
            half of an equal share where absent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)
    data: Data
    preprocessing: Preprocessing | None = None
    batch_size: int = Field(default=32, ge=1)
    train_images: int | None = Field(default=None, ge=2)
    test_images: int | None = Field(default=None, ge=10)
    rare_below: float | None = Field(default=None, ge=0, lt=1)


class Source(NamedTuple):
    """A float model, and what its files say about it.

    Args:
        model: in float32 and eval mode.
        folder: with its files, for one of transformers.
        facts: for the report.
    """

    model: nn.Module
    folder: Path | None
    facts: dict[str, str]


def load(recipe: Recipe, folder: Path, trust_remote_code: bool = False) -> Task:
    """Model, batches and measurement of a recipe; measures the float model once.

    Raises:
        ValueError: model or data cannot be used; one line that says what was found and what to do.
        FileNotFoundError: a file is not there.
        ImportError: transformers, pillow or pyarrow is not installed.
    """
    assert recipe.task is not None
    settings = parse(Settings, recipe.task.settings, "task")
    train_place, test_place = locate(settings.data.train, folder), locate(settings.data.test, folder)
    _need("PIL", *(["pyarrow"] if train_place.is_file() or test_place.is_file() else []))
    in_train, in_test = read(train_place), read(test_place)
    test = some(in_test, settings.test_images, "test_images", test_place)
    unseen = _unseen(in_train, in_test, train_place, test_place)
    train = some(unseen, settings.train_images, "train_images", train_place)
    random.Random(recipe.seed).shuffle(train)
    calibration, train = train[: recipe.calibration.samples], train[recipe.calibration.samples :]
    if len(calibration) < recipe.calibration.samples:
        raise too_few(recipe.calibration.samples, len(calibration), str(train_place))
    if not train and "qat" in recipe.rungs:
        raise ValueError(
            f"{train_place}: no images left to train on after {len(calibration)} for calibration; lower "
            "those, or take qat out of rungs"
        )

    source = _source(settings, folder, trust_remote_code)
    parameters = list(inspect.signature(source.model.forward).parameters)
    batches = Batches(
        pictures=test, pixels=_pixels(settings, source), size=settings.batch_size, argument=parameters[0]
    )
    class_of = _class_of(source.model, in_train, _width(source.model, batches))
    labels = np.array([class_of(picture) for picture in test])
    for picture in (*in_train, *in_test):
        class_of(picture)
    shares = Counter(labels.tolist())
    rare_below = 0.5 / len(shares) if settings.rare_below is None else settings.rare_below
    rare = sorted(label for label, count in shares.items() if count / len(test) < rare_below)
    evaluate = Evaluation(batches=batches, labels=torch.from_numpy(labels))
    logits = evaluate.logits(source.model)
    if not logits.isfinite().all():
        raise ValueError(
            f"{settings.model}: the float model's logits are not finite; its weights are damaged"
        )
    slices = {"rare-classes": np.isin(labels, rare)} if rare else {}
    evaluate = replace(evaluate, slices=slices | {"least-certain": least_certain(logits)})
    return Task(
        model=source.model,
        calibration=replace(batches, pictures=calibration),
        train=replace(batches, pictures=train, label=class_of if "labels" in parameters else None),
        evaluate=evaluate,
        baseline=evaluate.of(logits),
        facts=source.facts
        | {f"sha256 {p.name}": sha256_of(p) for p in (train_place, test_place) if p.is_file()}
        | {
            "test images": f"{len(test)} of {len(in_test)}",
            "calibration images": str(len(calibration)),
            "train images": str(len(train)),
            "train images left out, also in the test set": str(len(in_train) - len(unseen)),
            "rare classes": ", ".join(map(str, rare)) or "none",
        },
    )


def load_model(recipe: Recipe, folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """The float model of a recipe, without data. Raises as `load` does."""
    assert recipe.task is not None
    return _source(parse(Settings, recipe.task.settings, "task"), folder, trust_remote_code).model


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`evaluate` of the task: everything but the model is fixed.

    Args:
        batches: the test images.
        labels: their classes.
        slices: masks over them.
    """

    batches: Sequence[Batch]
    labels: Tensor
    slices: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict[str, NDArray[np.bool_]])

    def __call__(self, model: nn.Module) -> Samples:
        """Per test image; NaN where the model's logits are not finite."""
        return self.of(self.logits(model))

    def logits(self, model: nn.Module) -> Float[Tensor, "images classes"]:
        """What the model answers to every test image, on the CPU."""
        with asking(model) as device:
            return torch.cat(
                [
                    logits_of(model(**{name: tensor.to(device) for name, tensor in batch.items()})).cpu()
                    for batch in watched(self.batches, "classifying the test images")
                ]
            )

    def of(self, logits: Float[Tensor, "images classes"]) -> Samples:
        """The same for logits that are there already."""
        finite = logits.isfinite().all(dim=1)
        accuracy = (logits.argmax(dim=1) == self.labels).double()
        loss = cross_entropy(logits.double(), self.labels, reduction="none")
        values = {"accuracy": accuracy, "cross-entropy": loss}
        return Samples(
            {name: value.where(finite, torch.nan).numpy() for name, value in values.items()},
            slices=self.slices,
        )


def logits_of(output: Any) -> Float[Tensor, "images classes"]:
    """The logits in what a classifier returned: the tensor itself, or `logits` by key or attribute.

    Raises:
        ValueError: there are none.

    >>> logits_of({"logits": torch.zeros(2, 10)}).shape
    torch.Size([2, 10])
    """
    found = output
    if not isinstance(output, Tensor):
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.ndim != 2:
        what = f"logits of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(output).__name__
        raise ValueError(f"task.model: returns {what}; a classifier returns logits, one row for every image")
    return found.float()


def least_certain(logits: Float[Tensor, "images classes"]) -> NDArray[np.bool_]:
    """The tenth of the images with the smallest distance between the two largest logits.

    >>> least_certain(torch.tensor([[0.0, 9.0], [1.0, 0.5], [3.0, 0.0]]))
    array([False,  True, False])
    """
    first, second = logits.topk(2, dim=1).values.T
    order = (first - second).argsort(stable=True)
    mask = np.zeros(len(logits), dtype=np.bool_)
    mask[order[: max(1, round(LEAST_CERTAIN * len(logits)))].numpy()] = True
    return mask


def _unseen(train: list[Picture], test: list[Picture], where: Path, test_place: Path) -> list[Picture]:
    """The train images that are not also test images; a warning with the share of the others."""
    unseen = without(train, test)
    also = len(train) - len(unseen)
    if also:
        warnings.warn(
            f"{where}: {also} of {len(train)} images ({also / len(train):.1%}) are also in {test_place}; "
            "they are left out of calibration and training",
            stacklevel=3,
        )
    return unseen


def _source(settings: Settings, folder: Path, trust_remote_code: bool) -> Source:
    if re.fullmatch(_ENTRY, settings.model) and not settings.model.startswith("asset:"):
        module, function = entry_point(settings.model, folder, "task.model")
        model: Any = function()
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"task.model: {settings.model} gives a {type(model).__name__}, expected a torch.nn.Module"
            )
        file = Path(str(module.__file__))
        return Source(model.eval(), None, {"model": settings.model, f"sha256 {file.name}": sha256_of(file)})
    _need("transformers")
    found = model_folder(settings.model, folder)
    check(found, tokenizer=False)
    model, unused = load_image_classifier(found, trust_remote_code=trust_remote_code)
    facts = {"model": settings.model, **{f"sha256 {path.name}": sha256_of(path) for path in files_of(found)}}
    return Source(model, found, facts | {"stored weights without use": ", ".join(unused) or "none"})


def _pixels(settings: Settings, source: Source) -> Callable[[Sequence[Picture]], Tensor]:
    """The recipe's preprocessing, or that of the model's folder.

    Raises:
        ValueError: there is neither, or transformers cannot load the latter.
    """
    if settings.preprocessing is not None:
        return settings.preprocessing
    if source.folder is None or not (source.folder / "preprocessor_config.json").is_file():
        raise ValueError(
            f"task.preprocessing: absent, and {source.folder or settings.model} has no "
            "preprocessor_config.json; write preprocessing: {size: ..., mean: ..., std: ...}"
        )
    from transformers import AutoImageProcessor

    with quiet():
        try:
            processor: Any = AutoImageProcessor.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ValueError(
                f"{source.folder}: transformers cannot load its image processor "
                f"({str(error).strip().splitlines()[0]}); write task.preprocessing"
            ) from error
    return partial(_processed, processor, int(getattr(source.model.config, "num_channels", 3)))


def _processed(processor: Any, channels: int, pictures: Sequence[Picture]) -> Tensor:
    images = [opened(picture, 1 if channels == 1 else 3) for picture in pictures]
    return processor(images=images, return_tensors="pt")["pixel_values"]


def _width(model: nn.Module, batches: Batches) -> int:
    """How many classes the model tells apart, from its answer to one image.

    Raises:
        ValueError: it does not take such an image.
    """
    batch = replace(batches, size=1)[0]
    with asking(model) as device:
        try:
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
        except (RuntimeError, ValueError, TypeError) as error:
            shape = " x ".join(map(str, batch[batches.argument].shape[1:]))
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"task.model: does not take images of {shape} ({said}); set task.preprocessing to what the "
                "model was trained with"
            ) from error
    return logits_of(output).shape[1]


def _class_of(model: nn.Module, train: Sequence[Picture], width: int) -> Callable[[Picture], int]:
    """From a picture to the number of its class.

    A number is that of an output. A name is looked up in the model's own names. Where nobody named those,
    names that all are numbers ("10", "LABEL_10") are the numbers of outputs too; others are looked up in the
    sorted names of the train images.
    """
    own: Any = getattr(getattr(model, "config", None), "label2id", None) or {}
    named = {str(name): int(number) for name, number in own.items() if not re.fullmatch(_UNNAMED, name)}
    names = sorted({picture.label for picture in train if isinstance(picture.label, str)})
    numbers = named or {name: number for number, name in enumerate(names)}
    whose = "the model" if named else "the train images"
    numbered = not named and all(re.fullmatch(_NUMBER, name) for name in names)

    def named_so(name: str) -> int | None:
        match = re.fullmatch(_NUMBER, name) if numbered else None
        return int(match[1]) if match else numbers.get(name)

    def number(picture: Picture) -> int:
        found = named_so(picture.label) if isinstance(picture.label, str) else picture.label
        if found is None:
            raise ValueError(
                f"{picture.where}: label {picture.label!r} found, {whose} know {', '.join(numbers) or 'none'}"
            )
        if not 0 <= found < width:
            raise ValueError(
                f"{picture.where}: label {picture.label!r} is class {found}, the model has {width}, from 0; "
                "bring the model that was trained for these classes"
            )
        return found

    return number


def _need(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise ImportError(
                f"the task image-classification needs {package}: pip install 'recoup[demo]'", name=package
            )
