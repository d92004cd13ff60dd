"""Nothing is lost: whatever stops a training, the same call ends with the same bits."""

import gc
import json
import resource
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from recoup import prepare, resolve, train
from recoup.train import float_copy
from recoup.train.checkpoints import Checkpoints
from recoup.train.fingerprint import fingerprint
from recoup.train.snapshot import DamagedError, load_state_of, read_snapshot, state_of, write_snapshot
from tests.killing import in_a_process
from tests.models import Tied

from .killed import work
from .test_train import batches, prepared, settings

SETTINGS: dict[str, Any] = {"steps": 6, "checkpoint_every": 2, "loss": "task", "warmup": 1}


class Case:
    """The same training again and again, from the same model and the same batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(7)
        self.start = prepared(weight_ranges="learned", dropout=0.5).state_dict()
        self.data = batches(3, labels=True)

    def __call__(self, record: Callable[..., Any] = lambda _: None, **fields: Any) -> str:
        torch.manual_seed(3)
        model = prepared(weight_ranges="learned", dropout=0.5)
        model.load_state_dict(self.start)
        keywords = {"checkpoints": self.folder, "held_out": self.data[:1]} | fields
        given = settings(**(SETTINGS | keywords.pop("settings", {})))
        train(keywords.pop("model", model), keywords.pop("batches", self.data[1:]), given, record=record,
              **keywords)  # fmt: skip
        return fingerprint(model.state_dict())

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path / "checkpoints")


@pytest.fixture(autouse=True, scope="module")
def quickly() -> Iterator[None]:
    """Many short trainings: without type checks, and without going through all of pytest's garbage."""
    jaxtyping.config.update("jaxtyping_disable", True)
    gc.freeze()
    yield
    gc.unfreeze()
    jaxtyping.config.update("jaxtyping_disable", False)


class StopError(Exception):
    pass


def stop_at(step: int) -> Callable[[Mapping[str, float]], None]:
    def record(entry: Mapping[str, float]) -> None:
        if entry["step"] == step:
            raise StopError

    return record


def stopped(case: Case, step: int) -> None:
    with pytest.raises(StopError):
        case(record=stop_at(step))


def test_a_training_that_is_killed_anywhere_ends_with_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL at every fourth place where it touches the disk or ends a step; see `killed.py`."""
    found = in_a_process("tests.train.killed", tmp_path, "4")
    assert found["lost"] == []
    assert found["points"] > 30
    told, _ = json.loads(found["told"])
    assert [entry["step"] for entry in told] == list(range(9))
    assert [entry["step"] for entry in told if "held_out" in entry] == [0, 6, 7, 8]  # with its own bits
    assert told[-1]["stopped_early"] == 1.0
    work(tmp_path / "here")  # another process, on the same machine
    assert (tmp_path / "here" / "told.json").read_text() == found["told"]


def test_checkpoints_change_nothing_and_the_last_two_are_kept(case: Case) -> None:
    assert case() == case(checkpoints=None)
    assert case.names == ["step-000004", "step-000006"]


def test_entries_from_before_are_told_again(case: Case) -> None:
    whole, again = list[Mapping[str, float]](), list[Mapping[str, float]]()
    case(record=whole.append, checkpoints=None)
    stopped(case, 5)
    case(record=again.append)
    assert again == whole
    assert [entry["step"] for entry in again] == list(range(7))


def test_a_finished_training_is_not_repeated(case: Case) -> None:
    first = case()
    steps: list[float] = []

    def no_step(*_: Any, **__: Any) -> None:
        raise AssertionError("a step was made")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", no_step)
        assert case(record=lambda entry: steps.append(entry["step"])) == first
    assert steps == list(range(7))


def cut(folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(name: str, place: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 1
        (folder / name).write_bytes(data)

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut, "weights.safetensors is not as it was written"),
    "one bit": (flip("optimizer.safetensors", -1), "optimizer.safetensors is not as it was written"),
    "one bit of the facts": (flip("facts.json", 100), "facts.json is not as it was written"),
    "not text": (lambda folder: (folder / "facts.json").write_bytes(b"\xff"), "cannot be read"),
    "no facts": (lambda folder: (folder / "facts.json").unlink(), "facts.json is missing"),
    "no tensors": (lambda folder: (folder / "weights.safetensors").unlink(), "s.safetensors is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    case: Case, damage: Callable[[Path], Any], reason: str
) -> None:
    expected = case(checkpoints=None)
    stopped(case, 5)
    damage(case.folder / "step-000004")
    with pytest.warns(UserWarning, match=rf"step-000004: .*{reason}.*; going on from step-000002") as said:
        assert case() == expected
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    with warnings.catch_warnings():  # the damaged one was written again
        warnings.simplefilter("error")
        assert case() == expected
    assert case.names == ["step-000004", "step-000006"]


def test_when_all_are_damaged_it_starts_from_the_beginning_and_says_so(case: Case) -> None:
    expected = case()
    for path in case.folder.iterdir():
        cut(path)
    with pytest.warns(UserWarning, match=r"weights\.safetensors is not as it was written") as said:
        assert case(settings={"checkpoint_every": 5}) == expected
    assert [str(warning.message).rpartition("; ")[2] for warning in said] == [
        "going on from step-000004",
        "starting from the beginning",
    ]
    assert case.names == ["step-000005", "step-000006"]


OTHERS: dict[str, tuple[Callable[[Case], dict[str, Any]], str]] = {
    "settings": (lambda _: {"settings": {"learning_rate": 2e-3}}, "settings"),
    "batches": (lambda case: {"batches": case.data[1:2]}, "batches"),
    "held-out": (lambda case: {"held_out": case.data[2:]}, "held-out batches"),
    "model": (lambda _: {"model": prepared(weight_ranges="learned")}, "model"),
    "teacher": (lambda _: {"teacher": float_copy(prepared())}, "teacher"),
}


@pytest.mark.parametrize(("other", "named"), OTHERS.values(), ids=OTHERS)
def test_checkpoints_belong_to_one_training(case: Case, other: Any, named: str) -> None:
    stopped(case, 3)
    with pytest.raises(ValueError, match=rf"was begun with other {named}; go on with those, or choose"):
        case(**other(case))
    assert case.names == ["step-000002"]


def test_how_often_it_is_saved_is_no_other_training(case: Case) -> None:
    stopped(case, 3)
    assert case(settings={"checkpoint_every": 1}) == case(checkpoints=None)


# --- a disk that is full ---------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_the_checkpoint_before_survives(case: Case) -> None:
    expected = case(checkpoints=None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(entry: Mapping[str, float]) -> None:
        if entry["step"] == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    try:
        with pytest.raises(
            OSError, match=r"step-000004: cannot be written \(.*File too large.*\); what"
        ) as e:
            case(record=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(e.value)
    assert case.names == ["step-000002"]
    assert case() == expected


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_no_space_at_the_end_of_a_save(case: Case, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(case, 3)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"os.{call}", full)
        with pytest.raises(
            OSError, match=r"step-000004: cannot be written \(No space left on device\); what"
        ):
            case()
    assert case.names == ["step-000002"]


# --- Ctrl-C ----------------------------------------------------------------------------------------------


def test_ctrl_c_waits_for_the_step_saves_it_and_can_be_gone_on_from(case: Case) -> None:
    expected, steps = case(checkpoints=None), list[float]()

    def interrupt(entry: Mapping[str, float]) -> None:
        steps.append(entry["step"])
        if entry["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        case(record=interrupt)
    assert steps == [0, 1, 2, 3]
    assert case.names == ["step-000002", "step-000003"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert case() == expected


def test_a_second_ctrl_c_does_not_wait(case: Case) -> None:
    def twice(entry: Mapping[str, float]) -> None:
        if entry["step"] == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        case(record=twice)
    assert case.names == ["step-000002"]


def test_a_handler_of_somebody_else_stays(case: Case) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        case(record=lambda _: signal.raise_signal(signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# --- snapshots -------------------------------------------------------------------------------------------


def test_a_snapshot_reads_as_it_was_written(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2).T, "b": torch.tensor(2, dtype=torch.int32), "c": torch.zeros(0)}
    write_snapshot(tmp_path / "it", {"one": tensors, "none": {}}, {"value": float("inf"), "text": "ø"})
    parts, facts = read_snapshot(tmp_path / "it")
    assert set(parts) == {"one", "none"}
    assert all(torch.equal(parts["one"][name], value) for name, value in tensors.items())
    assert facts == {"value": float("inf"), "text": "ø"}
    write_snapshot(tmp_path / "it", {}, {})
    assert read_snapshot(tmp_path / "it") == ({}, {})
    with pytest.raises(DamagedError, match=r"nothing: facts\.json is missing"):
        read_snapshot(tmp_path / "nothing")


def test_what_is_tied_is_stored_once(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    prepare(model, resolve(model, "w4a16"))
    prepare(other, resolve(other, "w4a16"))
    state = state_of(model)
    assert "tokens.weight" in state
    assert "lm_head.weight" not in state
    write_snapshot(tmp_path / "it", {"weights": state}, {})
    load_state_of(other, read_snapshot(tmp_path / "it")[0]["weights"])
    assert other.lm_head.weight is other.tokens.weight
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_a_fingerprint_sees_values_names_shapes_and_order() -> None:
    x: Tensor = torch.arange(6.0)
    different = [
        {"x": x},
        {"y": x},
        {"x": x + 1},
        {"x": x.reshape(2, 3)},
        {"x": x.double()},
        [x, -x],
        [-x, x],
    ]
    assert len({fingerprint(value) for value in different}) == len(different)


class Views(torch.nn.Module):
    """Two Parameters on one storage, and a buffer that is a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(4, 4))
        self.b = torch.nn.Parameter(self.a.data)
        self.register_buffer("table", torch.randn(6))
        self.register_buffer("head", self.table[1:3])


def test_tensors_on_one_storage_are_each_written(tmp_path: Path) -> None:
    model, other = Views(), Views()
    write_snapshot(tmp_path / "it", {"weights": state_of(model)}, {})
    load_state_of(other, read_snapshot(tmp_path / "it")[0]["weights"])
    assert fingerprint(other.state_dict()) == fingerprint(model.state_dict())


def test_another_process_warns_of_what_is_damaged(case: Case) -> None:
    case()
    cut(case.folder / "step-000006")
    looking = Checkpoints(case.folder, {}, writes=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert looking.newest(quiet=True) is not None
    with pytest.warns(UserWarning, match="step-000006: .* going on from step-000004"):
        assert looking.newest() is not None
