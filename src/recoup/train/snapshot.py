"""Tensors and facts in a folder that is there whole, or not at all.

A snapshot is written beside its place, forced to the disk and renamed, so a process that is killed leaves no
half of it. It carries the sha256 of each of its files: one that was damaged later is known as such when it is
read. safetensors and JSON; nothing that is read back is ever executed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from recoup.engines.safetensors_file import read_safetensors

FACTS = "facts.json"
_UNFINISHED = ".unfinished"

Parts = Mapping[str, Mapping[str, Tensor]]


class DamagedError(ValueError):
    """A snapshot is not as it was written; the message says which and why."""


def write_snapshot(folder: Path, parts: Parts, facts: Mapping[str, Any]) -> None:
    """Write a snapshot; what was at its place before is replaced once the new one is durable.

    Args:
        folder: its place.
        parts: name of a file -> its tensors.
        facts: plain data, as JSON holds it.

    Raises:
        OSError: it cannot be written; nothing of it is left behind.
    """
    draft = folder.with_name(f".{folder.name}{_UNFINISHED}")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for name, tensors in parts.items():
            save_file(_apart(tensors), _file(draft, name))
        checksums = {name: _sha256(_file(draft, name)) for name in parts}
        content = json.dumps({"files": checksums, "facts": facts})
        (draft / FACTS).write_text(f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}\n", "utf-8")
        for file in (*draft.iterdir(), draft):
            to_disk(file)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
        to_disk(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise OSError(
            f"{folder}: cannot be written ({reason}); what was saved before it is kept: make room, and run "
            "the same again"
        ) from None


def read_snapshot(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The parts and the facts, on the CPU, each file checked against its sha256.

    Raises:
        DamagedError: a file is missing, cut or changed.
    """
    try:
        checksum, _, content = (folder / FACTS).read_text("utf-8").rstrip("\n").partition("\n")
        if hashlib.sha256(content.encode()).hexdigest() != checksum:
            raise DamagedError(f"{folder}: {FACTS} is not as it was written")
        found = json.loads(content)
        for name, expected in found["files"].items():
            if _sha256(_file(folder, name)) != expected:
                raise DamagedError(f"{folder}: {_file(folder, name).name} is not as it was written")
        return {name: read_safetensors(_file(folder, name)) for name in found["files"]}, found["facts"]
    except DamagedError:
        raise
    except FileNotFoundError as error:
        raise DamagedError(f"{folder}: {Path(str(error.filename)).name} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{folder}: cannot be read ({error})") from None


def clear_unfinished(folder: Path) -> None:
    """Remove what writers that were killed left in a folder of snapshots."""
    for draft in folder.glob(f".*{_UNFINISHED}"):
        shutil.rmtree(draft)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` with every tensor once, under its first name: what is tied is stored once."""
    owners = _owners(model)
    return {name: tensor for name, tensor in model.state_dict().items() if owners[name] == name}


def moving_state_of(model: nn.Module) -> dict[str, Tensor]:
    """`state_of`, without the Parameters that are frozen: all that training may change."""
    frozen = _frozen(model)
    return {name: tensor for name, tensor in state_of(model).items() if name not in frozen}


def load_state_of(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `state_of` or `moving_state_of` gave, strictly."""
    whole = {name: tensor for name, tensor in state_of(model).items() if name in _frozen(model)} | dict(state)
    model.load_state_dict({name: whole[owner] for name, owner in _owners(model).items()})


def _frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def _owners(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()
    }


def check_state(model: nn.Module) -> None:
    """A model whose state is tensors, so that it can be kept and put back.

    Raises:
        ValueError: some of it is not.
    """
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name}: state of type {type(value).__name__} cannot be kept beside tensors; let its "
                "module return a tensor from get_extra_state"
            )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and each with memory of its own: safetensors writes no views."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        memory = whole.untyped_storage().data_ptr()
        apart[name] = whole.clone() if memory in seen else whole
        seen.add(memory)
    return apart


def _file(folder: Path, part: str) -> Path:
    return folder / f"{part}.safetensors"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def to_disk(path: Path) -> None:
    """Force what was written to a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
