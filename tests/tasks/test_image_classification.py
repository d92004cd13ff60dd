"""Image classification: what is read, what is measured, and every way in which it refuses."""

import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn

from recoup.schemes import Recipe
from recoup.tasks import Task, load, load_model
from recoup.tasks.image_classification import LEAST_CERTAIN, Evaluation, least_certain
from recoup.tasks.images import Batches, Picture, Preprocessing

from .conftest import recipe

SIZE = 8
CLASSES = ("coat", "dress", "shirt")
PREPROCESSING = {"size": SIZE, "mean": 0.5, "std": 0.25}

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, classes)

    def forward(self, pixel_values, labels=None):
        logits = self.fc(pixel_values.flatten(1))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {"logits": logits, **loss}

class Plain(Net):
    def forward(self, x):
        return self.fc(x.flatten(1))

def build(kind=Net, **arguments):
    torch.manual_seed(0)
    return kind(**arguments).train()

def plain():
    return build(Plain)

def two():
    return build(classes=2)

def twelve():
    return build(classes=12)

def damaged():
    model = build()
    model.fc.weight.data[:] = torch.nan
    return model

def hidden():
    return nn.Sequential(nn.Conv2d(3, 4, 8))

def text():
    return "a model"
"""


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(found := io.BytesIO(), "PNG")
    return found.getvalue()


def in_folders(place: Path, per_class: dict[str, int], seed: int) -> Path:
    for name, count in per_class.items():
        (place / name).mkdir(parents=True)
        for index in range(count):
            (place / name / f"{index:03}.png").write_bytes(png(seed := seed + 1))
    return place


def in_parquet(place: Path, labels: list[Any], seed: int = 0, *, bare: bool = False) -> Path:
    images = [png(seed + index) for index in range(len(labels))]
    rows = images if bare else [{"bytes": image, "path": None} for image in images]
    parquet.write_table(pyarrow.table({"image": rows, "label": labels}), place)
    return place


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Of a task that works; a test changes what it is about. Every test has a module of its own name."""
    module = f"net_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(CODE)
    in_folders(tmp_path / "train", {"coat": 12, "dress": 12, "shirt": 6}, 0)
    in_folders(tmp_path / "test", {"coat": 10, "dress": 8, "shirt": 2}, 1000)
    return {
        "name": "image-classification",
        "model": f"{module}:build",
        "data": {"train": "train", "test": "test"},
        "preprocessing": PREPROCESSING,
        "batch_size": 8,
    }


def refused(
    settings: dict[str, Any], folder: Path, error: type[Exception] = ValueError, **changes: Any
) -> str:
    """The one line with which it refuses."""
    with pytest.raises(error) as found:
        load(recipe(settings | changes, samples=10), folder)
    assert "\n" not in str(found.value)
    return str(found.value)


def pixels_by_hand(file: Path) -> Tensor:
    """The equation of the preprocessing, for an image that has its size already."""
    array = np.asarray(Image.open(file)).astype(np.float64) / 255
    return torch.from_numpy((array - 0.5) / 0.25).permute(2, 0, 1).float()


class TestLoading:
    def test_the_measurement_is_that_of_the_model_itself(
        self, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        task = load(recipe(settings, samples=10), tmp_path)
        files = sorted((tmp_path / "test").rglob("*.png"))
        with torch.no_grad():
            logits = task.model(torch.stack([pixels_by_hand(file) for file in files]))["logits"]
        labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
        found = task.evaluate(task.model)
        assert found.per_sample("accuracy").tolist() == (logits.argmax(1) == labels).double().tolist()
        expected = -logits.log_softmax(1)[range(len(labels)), labels]
        assert np.allclose(found.per_sample("cross-entropy"), expected, atol=1e-5)  # float32 of both
        assert not task.model.training

    def test_the_baseline_is_what_evaluate_says(self, settings: dict[str, Any], tmp_path: Path) -> None:
        task = load(recipe(settings, samples=10), tmp_path)
        assert task.baseline is not None
        assert task.baseline.summary() == task.evaluate(task.model).summary()

    def test_calibration_has_no_labels_and_shares_no_image_with_train(
        self, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        task = load(recipe(settings, samples=10), tmp_path)
        assert [set(batch) for batch in task.calibration] == [{"pixel_values"}] * 2
        assert [set(batch) for batch in task.train] == [{"pixel_values", "labels"}] * 3
        calibrated, trained = (
            {image.numpy().tobytes() for batch in batches for image in batch["pixel_values"]}
            for batches in (task.calibration, task.train)
        )
        assert (len(calibrated), len(trained), len(calibrated & trained)) == (10, 20, 0)
        assert float(task.model(**task.train[0])["loss"].detach()) > 0

    def test_a_model_that_takes_no_labels_gets_none(self, settings: dict[str, Any], tmp_path: Path) -> None:
        module = settings["model"].partition(":")[0]
        task = load(recipe(settings | {"model": f"{module}:plain"}, samples=10), tmp_path)
        assert {name for batch in task.train for name in batch} == {"x"}
        assert task.evaluate(task.model).aggregate("cross-entropy") > 0

    def test_a_seed_moves_calibration_and_train_but_never_the_test(
        self, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        first, second = (load(recipe(settings, samples=10, seed=seed), tmp_path) for seed in (0, 1))
        assert not torch.equal(first.calibration[0]["pixel_values"], second.calibration[0]["pixel_values"])
        assert first.baseline.summary() == second.baseline.summary()  # pyright: ignore

    def test_numbers_of_images_are_drawn(self, settings: dict[str, Any], tmp_path: Path) -> None:
        task = load(recipe(settings | {"train_images": 15, "test_images": 12}, samples=10), tmp_path)
        assert len(task.baseline.per_sample("accuracy")) == 12  # pyright: ignore
        assert task.facts["test images"] == "12 of 20"
        assert task.facts["train images"] == "5"

    @pytest.mark.parametrize("bare", [False, True], ids=["struct", "bytes"])
    @pytest.mark.parametrize("named", [False, True], ids=["numbers", "names"])
    def test_parquet_says_the_same_as_folders(
        self, settings: dict[str, Any], tmp_path: Path, bare: bool, named: bool
    ) -> None:
        def rows(part: str) -> list[tuple[bytes, str]]:
            return [(f.read_bytes(), f.parent.name) for f in sorted((tmp_path / part).rglob("*.png"))]

        for part in ("train", "test"):
            images = [image if bare else {"bytes": image, "path": None} for image, _ in rows(part)]
            labels = [name if named else CLASSES.index(name) for _, name in rows(part)]
            table = pyarrow.table({"image": images, "label": labels})
            parquet.write_table(table, tmp_path / f"{part}.parquet")
        data = {"train": "train.parquet", "test": "test.parquet"}
        found = load(recipe(settings | {"data": data}, samples=10), tmp_path)
        expected = load(recipe(settings, samples=10), tmp_path)
        assert found.baseline.summary() == expected.baseline.summary()  # pyright: ignore
        assert len(found.facts["sha256 train.parquet"]) == 64

    def test_a_dry_run_needs_no_data(self, settings: dict[str, Any], tmp_path: Path) -> None:
        nowhere = settings | {"data": {"train": "nowhere", "test": "nowhere"}}
        assert isinstance(load_model(recipe(nowhere), tmp_path), nn.Module)

    @pytest.mark.parametrize("name", ["{}", "LABEL_{}"])
    def test_folders_with_numbers_are_those_outputs(
        self, settings: dict[str, Any], tmp_path: Path, name: str
    ) -> None:
        module = settings["model"].partition(":")[0]
        for part, outputs, seed in (("ten", (2, 10), 200), ("ten-test", (2, 10, 11), 300)):
            in_folders(tmp_path / part, dict.fromkeys(map(name.format, outputs), 6), seed)
        changed = settings | {"model": f"{module}:twelve", "data": {"train": "ten", "test": "ten-test"}}
        task = load(recipe(changed, samples=10), tmp_path)
        assert sorted(task.evaluate.labels.tolist()) == [2] * 6 + [10] * 6 + [11] * 6  # pyright: ignore

    def test_files_that_are_no_pictures_by_their_name_are_not_read(
        self, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        for name in ("Thumbs.db", "notes.txt", "paper.pdf"):
            (tmp_path / "test" / "coat" / name).write_bytes(b"no picture")
        file = tmp_path / "test" / "coat" / "000.png"
        file.rename(file.with_suffix(".PNG"))
        assert load(recipe(settings, samples=10), tmp_path).facts["test images"] == "20 of 20"


class TestSlices:
    def test_the_least_certain_tenth_is_fixed_by_the_float_model(
        self, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        task = load(recipe(settings, samples=10), tmp_path)
        mask = task.baseline.slices["least-certain"]  # pyright: ignore
        assert np.sum(mask) == round(LEAST_CERTAIN * 20)
        with torch.no_grad():
            task.model.fc.weight.neg_()  # pyright: ignore
        assert np.array_equal(task.evaluate(task.model).slices["least-certain"], mask)

    def test_the_margin_is_between_the_two_largest_logits(self) -> None:
        logits = torch.tensor([[5.0, 4.0, 0.0], [9.0, 8.9, 8.8], [1.0, 0.0, -9.0]] * 10)
        assert np.flatnonzero(least_certain(logits)).tolist() == [1, 4, 7]

    def test_rare_classes_have_less_than_half_of_an_equal_share(
        self, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        task = load(recipe(settings, samples=10), tmp_path)
        assert task.facts["rare classes"] == "2"  # 2 of 20 shirts, where an equal share is 6.7
        assert np.sum(task.baseline.slices["rare-classes"]) == 2  # pyright: ignore

    def test_rare_below_moves_the_limit(self, settings: dict[str, Any], tmp_path: Path) -> None:
        none = load(recipe(settings | {"rare_below": 0.05}, samples=10), tmp_path)
        assert set(none.baseline.slices) == {"least-certain"}  # pyright: ignore
        assert none.facts["rare classes"] == "none"
        two = load(recipe(settings | {"rare_below": 0.45}, samples=10), tmp_path)
        assert two.facts["rare classes"] == "1, 2"

    def test_an_answer_that_is_not_finite_is_not_a_number(self) -> None:
        evaluate = Evaluation(batches=[], labels=torch.tensor([0, 1]))
        found = evaluate.of(torch.tensor([[torch.nan, 1.0], [0.0, 1.0]]))
        assert np.isnan(found.per_sample("accuracy")).tolist() == [True, False]
        assert np.isnan(found.per_sample("cross-entropy")).tolist() == [True, False]


class TestOverlap:
    def test_images_of_the_test_are_left_out_with_a_warning(
        self, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        copied = sorted((tmp_path / "test" / "coat").iterdir())[:3]
        for file in copied:
            (tmp_path / "train" / "coat" / f"again-{file.name}").write_bytes(file.read_bytes())
        with pytest.warns(
            UserWarning, match=r"3 of 33 images \(9\.1%\) are also in .*test; they are"
        ) as seen:
            task = load(recipe(settings, samples=10), tmp_path)
        assert len(seen) == 1
        assert task.facts["train images left out, also in the test set"] == "3"
        assert int(task.facts["train images"]) == 20

    def test_without_overlap_nothing_is_said(self, settings: dict[str, Any], tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(recipe(settings, samples=10), tmp_path)


class TestRefusals:
    def test_no_such_folder(self, settings: dict[str, Any], tmp_path: Path) -> None:
        message = refused(settings, tmp_path, FileNotFoundError, data={"train": "nowhere", "test": "test"})
        assert "nowhere: no such file or folder; task.data wants a folder with one folder for" in message

    def test_one_class(self, settings: dict[str, Any], tmp_path: Path) -> None:
        in_folders(tmp_path / "one", {"coat": 3}, 50)
        message = refused(settings, tmp_path, data={"train": "one", "test": "test"})
        assert "one: one class, 'coat' found; a classifier needs images of two classes" in message

    def test_an_empty_folder(self, settings: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "empty: no images found" in refused(
            settings, tmp_path, data={"train": "train", "test": "empty"}
        )

    def test_a_file_that_is_no_image(self, settings: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "test" / "coat" / "004.png").write_bytes(b"a shopping list")
        message = refused(settings, tmp_path)
        assert message.endswith(
            "004.png: no image that pillow can read (cannot identify image file); take it out"
        )

    def test_a_folder_of_a_class_without_images(self, settings: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "train" / "boot").mkdir()
        (tmp_path / "train" / "boot" / "notes.txt").write_text("none yet")
        message = refused(settings, tmp_path)
        assert (
            "boot: no images found, by the endings that pillow reads (.png, .jpg, ...); put some" in message
        )

    @pytest.mark.parametrize("name", ["{}", "LABEL_{}"])
    def test_a_number_that_is_no_output(self, settings: dict[str, Any], tmp_path: Path, name: str) -> None:
        for part, seed in (("numbers", 200), ("others", 300)):
            in_folders(tmp_path / part, {name.format(2): 12, name.format(10): 12}, seed)
        message = refused(settings, tmp_path, data={"train": "numbers", "test": "others"})
        assert f"label {name.format(10)!r} is class 10, the model has 3, from 0; bring the model" in message

    def test_a_name_among_numbers(self, settings: dict[str, Any], tmp_path: Path) -> None:
        in_folders(tmp_path / "numbers", {"0": 12, "2": 12}, 200)
        message = refused(settings, tmp_path, data={"train": "numbers", "test": "test"})
        assert "label 'coat' found, the train images know 0, 2" in message

    def test_a_training_file_that_is_no_image_is_found_before_any_work(
        self, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        (tmp_path / "train" / "coat" / "004.png").write_bytes(b"a shopping list")
        assert "004.png: no image that pillow can read (cannot identify image file)" in refused(
            settings, tmp_path, model="nowhere:build"
        )

    @pytest.mark.parametrize(
        ("kind", "ending", "mode"),
        [(np.uint16, "png", "I;16"), (np.int32, "tiff", "I"), (np.float32, "tiff", "F")],
    )
    def test_more_than_8_bits_per_channel(
        self, settings: dict[str, Any], tmp_path: Path, kind: Any, ending: str, mode: str
    ) -> None:
        deep = Image.fromarray(np.full((SIZE, SIZE), 300, kind))
        deep.save(tmp_path / "train" / "coat" / f"deep.{ending}")
        assert refused(settings, tmp_path).endswith(
            f"deep.{ending}: more than 8 bits per channel found (pillow's mode {mode}); save it with 8"
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"size": 0}, "task: preprocessing.size.0: input should be greater than 0, found 0"),
            ({"std": 0}, "task: preprocessing.std.0: input should be greater than 0, found 0"),
            (
                {"mean": float("nan")},
                "task: preprocessing.mean.0: input should be a finite number, found nan",
            ),
            (
                {"mean": [0.5, 0.5]},
                "task: preprocessing: mean has 2 numbers for 3 channels; write one number",
            ),
            (
                {"std": []},
                "task: preprocessing: std has 0 numbers for 3 channels; write one number, or one for",
            ),
            (
                {"channels": 1, "std": [1, 1, 1]},
                "task: preprocessing: std has 3 numbers for 1 channels; write",
            ),
        ],
        ids=str,
    )
    def test_preprocessing_is_checked(
        self, settings: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        assert message in refused(settings, tmp_path, preprocessing=PREPROCESSING | change)

    def test_a_truncated_image(self, settings: dict[str, Any], tmp_path: Path) -> None:
        file = tmp_path / "test" / "coat" / "000.png"
        file.write_bytes(file.read_bytes()[:-40])
        assert "000.png: no image that pillow can read" in refused(settings, tmp_path)

    @pytest.mark.parametrize(
        ("columns", "found"),
        [
            ({"picture": [b"x"], "label": [1]}, "no column 'image', there are picture, label; rename it"),
            ({"image": [b"x"], "class": [1]}, "no column 'label', there are image, class; rename it"),
            ({"image": [1], "label": [1]}, "row 0: its image is int, expected encoded bytes"),
            ({"image": [b"x"], "label": [None]}, "row 0: its label is None, expected an integer or a string"),
            ({"image": [b"x"], "label": [0.5]}, "row 0: its label is 0.5, expected an integer or a string"),
        ],
        ids=["no image", "no label", "not bytes", "label absent", "label of halves"],
    )
    def test_parquet_with_other_columns(
        self, settings: dict[str, Any], tmp_path: Path, columns: dict[str, list[Any]], found: str
    ) -> None:
        parquet.write_table(pyarrow.table(columns), tmp_path / "other.parquet")
        assert found in refused(settings, tmp_path, data={"train": "other.parquet", "test": "test"})

    def test_a_file_that_is_no_parquet(self, settings: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "train.parquet").write_bytes(b"a shopping list")
        message = refused(settings, tmp_path, data={"train": "train.parquet", "test": "test"})
        assert "train.parquet: not a parquet file (" in message

    def test_a_label_beyond_the_model(self, settings: dict[str, Any], tmp_path: Path) -> None:
        module = settings["model"].partition(":")[0]
        message = refused(settings, tmp_path, model=f"{module}:two")
        assert "label 'shirt' is class 2, the model has 2, from 0; bring the model that was" in message

    def test_a_class_that_only_the_test_has(self, settings: dict[str, Any], tmp_path: Path) -> None:
        in_folders(tmp_path / "test", {"boot": 2}, 90)
        message = refused(settings, tmp_path)
        assert "label 'boot' found, the train images know coat, dress, shirt" in message

    def test_a_size_that_the_model_does_not_take(self, settings: dict[str, Any], tmp_path: Path) -> None:
        message = refused(settings, tmp_path, preprocessing=PREPROCESSING | {"size": [8, 9]})
        assert message.startswith("task.model: does not take images of 3 x 8 x 9 (")
        assert "set task.preprocessing to what the model was trained with" in message

    def test_no_preprocessing(self, settings: dict[str, Any], tmp_path: Path) -> None:
        message = refused({k: v for k, v in settings.items() if k != "preprocessing"}, tmp_path)
        assert message.startswith("task.preprocessing: absent, and net_")
        assert "write preprocessing: {size: ..., mean: ..., std: ...}" in message

    def test_fewer_images_than_calibration_asks(self, settings: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"calibration: 31 samples asked, 30 found in .*train"):
            load(recipe(settings, samples=31), tmp_path)

    def test_nothing_left_to_train_on(self, settings: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no images left to train on after 30 for calibration"):
            load(recipe(settings, samples=30), tmp_path)
        assert not load(recipe(settings, samples=30, rungs=["rtn"]), tmp_path).train

    @pytest.mark.parametrize(("key", "found"), [("train_images", 30), ("test_images", 20)])
    def test_more_images_than_there_are(
        self, settings: dict[str, Any], tmp_path: Path, key: str, found: int
    ) -> None:
        message = refused(settings, tmp_path, **{key: 99})
        assert message.startswith(f"task.{key}: 99 asked, {found} found in ")

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            ("text", "gives a str, expected a torch.nn.Module"),
            ("hidden", "returns logits of shape (1, 4, 1, 1); a classifier returns logits, one row for"),
            ("damaged", "the float model's logits are not finite; its weights are damaged"),
            ("biuld", "task.model: no function 'biuld' in"),
        ],
    )
    def test_a_function_that_gives_no_classifier(
        self, settings: dict[str, Any], tmp_path: Path, function: str, message: str
    ) -> None:
        module = settings["model"].partition(":")[0]
        assert message in refused(settings, tmp_path, model=f"{module}:{function}")

    def test_no_such_module(self, settings: dict[str, Any], tmp_path: Path) -> None:
        assert "task.model: no module 'nowhere' in" in refused(settings, tmp_path, model="nowhere:build")

    def test_an_unknown_key(self, settings: dict[str, Any], tmp_path: Path) -> None:
        assert "task: preprocessing.sice: unknown key; did you mean 'size'?" in refused(
            settings, tmp_path, preprocessing=PREPROCESSING | {"sice": 3}
        )

    @pytest.mark.parametrize("package", ["PIL", "pyarrow"])
    def test_a_package_that_is_not_installed(
        self, settings: dict[str, Any], tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "recoup.tasks.image_classification.find_spec", lambda name: None if name == package else name
        )
        data = {"train": "train", "test": in_parquet(tmp_path / "test.parquet", [0, 1]).name}
        assert refused(settings, tmp_path, ImportError, data=data) == (
            f"the task image-classification needs {package}: pip install 'recoup[demo]'"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=SIZE,
        patch_size=4, id2label=dict(enumerate(reversed(CLASSES))),
        label2id={name: 2 - number for number, name in enumerate(CLASSES)},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


class TestTransformers:
    @pytest.fixture
    def task(self, settings: dict[str, Any], folder: Path, tmp_path: Path) -> Task:
        given = {key: value for key, value in settings.items() if key != "preprocessing"}
        return load(recipe(given | {"model": str(folder)}, samples=10), tmp_path)

    def test_the_processor_of_the_folder_makes_the_pixels(self, task: Task, tmp_path: Path) -> None:
        found = task.evaluate.batches[0]["pixel_values"][0]  # pyright: ignore
        assert torch.allclose(
            found, pixels_by_hand(tmp_path / "test/coat/000.png") / 2, atol=1e-6
        )  # ViT's deviation is 0.5

    def test_names_are_those_of_the_model(self, task: Task) -> None:
        assert sorted(task.evaluate.labels.tolist()) == [0] * 2 + [1] * 8 + [2] * 10  # pyright: ignore

    def test_it_trains_with_its_own_loss(self, task: Task) -> None:
        assert float(task.model(**task.train[0]).loss.detach()) > 0
        assert task.facts["stored weights without use"] == "none"
        assert "sha256 model.safetensors" in task.facts

    def test_a_name_that_the_model_does_not_have(
        self, settings: dict[str, Any], folder: Path, tmp_path: Path
    ) -> None:
        in_folders(tmp_path / "test", {"boot": 2}, 90)
        message = refused(settings, tmp_path, model=str(folder))
        assert "label 'boot' found, the model know" in message

    def test_another_size_than_the_model_was_made_for(
        self, settings: dict[str, Any], folder: Path, tmp_path: Path
    ) -> None:
        message = refused(settings, tmp_path, model=str(folder), preprocessing=PREPROCESSING | {"size": 12})
        assert message.startswith("task.model: does not take images of 3 x 12 x 12 (")

    def test_a_folder_without_a_processor(
        self, settings: dict[str, Any], folder: Path, tmp_path: Path
    ) -> None:
        bare = tmp_path / "bare"
        bare.mkdir()
        for file in folder.iterdir():
            if file.name != "preprocessor_config.json":
                (bare / file.name).write_bytes(file.read_bytes())
        given = {key: value for key, value in settings.items() if key != "preprocessing"}
        assert "bare has no preprocessor_config.json" in refused(given, tmp_path, model="./bare")

    def test_a_damaged_processor(self, settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
        for file in folder.iterdir():
            (tmp_path / "vit").mkdir(exist_ok=True)
            (tmp_path / "vit" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "No"}))
        given = {key: value for key, value in settings.items() if key != "preprocessing"}
        assert "transformers cannot load its image processor (" in refused(given, tmp_path, model="./vit")

    def test_no_such_model(self, settings: dict[str, Any], tmp_path: Path) -> None:
        assert "no folder" in refused(settings, tmp_path, FileNotFoundError, model="./nowhere")


class TestBatches:
    def test_they_are_a_sequence_that_decodes_when_asked(self) -> None:
        asked: list[int] = []

        def pixels(pictures: Any) -> Tensor:
            asked.append(len(pictures))
            return torch.zeros(len(pictures), 3, 2, 2)

        pictures = [Picture(where=str(i), source=b"", label=i) for i in range(7)]
        batches = Batches(
            pictures=pictures, pixels=pixels, size=3, argument="x", label=lambda p: int(p.label)
        )
        assert (len(batches), asked) == (3, [])
        assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
        assert [batch["labels"].tolist() for batch in batches[1:]] == [[3, 4, 5], [6]]
        assert batches[-1]["labels"].tolist() == [6]
        with pytest.raises(IndexError):
            batches[3]

    @pytest.mark.parametrize("channels", [1, 3])
    def test_the_preprocessing_is_its_equation(self, channels: int) -> None:
        see = Preprocessing(size=(2, 3), mean=(0.5,), std=(0.25,), channels=channels)  # pyright: ignore
        pixels = np.arange(0, 90, 5, np.uint8).reshape(2, 3, 3)
        pixels = pixels[..., 0] if channels == 1 else pixels
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        found = see([Picture(where="", source=file.getvalue(), label=0)])[0]
        expected = (pixels.reshape(2, 3, channels) / 255 - 0.5) / 0.25
        assert found.shape == (channels, 2, 3)
        assert np.allclose(found.permute(1, 2, 0), expected, atol=1e-6)

    def test_pixels_are_upright_as_exif_says(self) -> None:
        see = Preprocessing(size=(2, 3), mean=(0.0,), std=(1.0,), channels=1)
        pixels = np.arange(0, 60, 10, np.uint8).reshape(3, 2)
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation: turn it to the right
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG", exif=exif)
        found = see([Picture(where="", source=file.getvalue(), label=0)])[0, 0]
        assert np.allclose(found, np.rot90(pixels, -1) / 255)


def test_the_recipe_of_the_repository_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model is in the file beside it, which has as many parameters as the published one."""
    root = Path(__file__).parents[2]
    found = Recipe.load(root / "recipes" / "efficientnet-fashion-mnist.yaml")
    assert found.task is not None
    module, _, function = found.task.settings["model"].partition(":")
    monkeypatch.syspath_prepend(root)
    __import__(module)
    recipe_module = sys.modules[module]
    assert callable(getattr(recipe_module, function))
    published = recipe_module.EfficientNetLite0(1000)
    assert sum(parameter.numel() for parameter in published.parameters()) == 4_652_008
    with torch.no_grad():
        logits = published.eval()(torch.zeros(2, 3, recipe_module.SIZE, recipe_module.SIZE))["logits"]
    assert logits.shape == (2, 1000)
    assert found.task.settings["preprocessing"]["size"] == recipe_module.SIZE
