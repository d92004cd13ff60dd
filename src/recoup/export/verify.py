"""The verb: is a folder still what was exported? From the folder alone."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from recoup.engines.safetensors_file import read_safetensors
from recoup.export import artefact as record
from recoup.export.artefact import Artefact
from recoup.export.migrations import read
from recoup.export.parity import Parity, ParityError
from recoup.export.rebuilt import DTYPES, rebuilt
from recoup.export.targets import Target, usable
from recoup.export.trained import Stored, Trained
from recoup.nn import CodedModule

Outcome = Literal["same", "different", "not checked"]
_SHOWN = 5
_STATE = ("scale", "zero_point", "offset", "global_scale")  # of a FakeQuantizer
_MALFORMED = (KeyError, IndexError, TypeError, AttributeError, RuntimeError, AssertionError, OverflowError)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim about a folder.

    Args:
        what: was compared.
        outcome: of it.
        found: what was seen, or why it could not be looked at; names tensors, modules or files.
    """

    what: str
    outcome: Outcome
    found: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What became of every claim that `export` made.

    Args:
        folder: that was verified.
        target: that it was written for.
        format: of the folder.
        recoup: the version that wrote it; None where nobody noted it.
        checks: in the order in which they were made.
        parity: the figures of the engine; None where it was not run, or differs.
    """

    folder: Path
    target: str
    format: int
    recoup: str | None
    checks: tuple[Check, ...]
    parity: Parity | None = None

    @property
    def same(self) -> bool:
        """Nothing that was checked is different."""
        return all(check.outcome != "different" for check in self.checks)

    def __str__(self) -> str:
        written = f"by recoup {self.recoup}" if self.recoup else "by a recoup that did not note its version"
        rows = [f"{check.what:<10}{check.outcome:<13}{check.found}" for check in self.checks]
        unchecked = all(check.outcome == "not checked" for check in self.checks)
        verdict = "what was exported" if self.same else "NOT what was exported"
        verdict = "readable; what it was is not known" if unchecked else verdict
        return "\n".join(
            [
                f"{self.folder}: {self.target}, format {self.format}, written {written}",
                *rows,
                f"{self.folder} is {verdict}",
            ]
        )


@torch.no_grad()
def verify(folder: str | Path) -> Verification:
    """Check a folder again as `export` did, from the folder alone; changes nothing.

    The sums of all files; the codes and scales decoded from their bytes, by their digests, of exactly the
    modules that were quantized; every module in the engine, within its bound of the same module made again
    from its codes; and the engine's outputs for the batch that was recorded, against the trained model's.

    Args:
        folder: that `export` wrote, with this version or an older one.

    Raises:
        ValueError: no artefact, one of a newer format, or a damaged file.
        ImportError: the target's libraries are not installed; names the extra.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one that recoup export wrote")
    written, found = read(folder)
    if found is None:
        raise ValueError(
            f"{folder}: neither {record.FILE} nor parity.json; expected what recoup export wrote"
        )
    target = usable(found.target)
    checks = [_files(folder, found)]
    stored, codes = _codes(folder, found, target)
    checks.append(codes)
    parity, ran = _engine(folder, found, target, stored)
    checks += ran
    return Verification(
        folder=folder,
        target=found.target,
        format=written,
        recoup=found.recoup,
        checks=tuple(checks),
        parity=parity,
    )


def _files(folder: Path, found: Artefact) -> Check:
    if found.files is None:
        return _not("files", "format 0 has no sums of its files")
    different: list[str] = []
    for name, written in found.files.items():
        file = record.inside(folder, name)
        if not file.is_file():
            different.append(f"{name} is missing")
        elif record.sum_of(file) != written:
            different.append(f"{name} has other bytes")
    if different:
        return Check(what="files", outcome="different", found=_some(different))
    return Check(what="files", outcome="same", found=f"{len(found.files)} with the sums of the export")


def _codes(folder: Path, found: Artefact, target: Target) -> tuple[dict[str, Stored], Check]:
    """What the bytes hold of the recorded modules, and whether it is what was recorded."""
    if found.modules is None:
        return {}, _not("codes", "format 0 has no digests of codes and scales")
    try:
        with _decoding(found.target):
            stored = target.stored(folder, found.layers())
    except ParityError as error:
        return {}, Check(what="codes", outcome="different", found=str(error))
    different: list[str] = []
    for path, module in found.modules.items():
        now = record.digests(stored[path], found.schemes[module.scheme].weights)
        different += [
            f"{path}: other {name.replace('_', ' ')}"
            for name, digest in now.items()
            if module.digests.get(name) != digest
        ]
    codes, scales = (sum(each[name].size for each in stored.values()) for name in ("codes", "scale"))
    counted = f"{codes:,} codes and {scales:,} scales of {len(stored)} modules, and no other module"
    if different:
        return stored, Check(what="codes", outcome="different", found=_some(different))
    return stored, Check(what="codes", outcome="same", found=f"{counted}, are quantized")


def _engine(
    folder: Path, found: Artefact, target: Target, stored: Mapping[str, Stored]
) -> tuple[Parity | None, list[Check]]:
    """The modules and the outputs, as the engine computes them."""
    if found.modules is None:
        target.load(folder)
        return None, [_not("engine", "it loads the folder; format 0 has no batch to run")]
    if not stored:
        return None, [_not("engine", "the modules cannot be made again from these codes")]
    if found.example is None:
        return None, [_not("engine", "the batch of the export held values that no file keeps")]
    tensors = read_safetensors(folder / record.TENSORS)
    batch, answers = record.example_of(found, tensors)
    try:
        with _decoding(found.target):
            trained = Trained(
                modules=_modules(found, stored, tensors),
                places={place: path for path, module in found.modules.items() for place in module.places},
                example=batch,
                answers=answers,
                recorded=answers,
            )
            parity = target.compare(trained, folder)
    except ParityError as error:
        return None, [Check(what="engine", outcome="different", found=str(error))]
    modules = _not("modules", "the engine shows no module's output")
    if parity.worst_module is not None:
        bound = f"{parity.modules} in the engine, within {parity.worst_module:.0%} of their bound"
        modules = Check(what="modules", outcome="same", found=bound)
    outputs = f"{parity.end_to_end:.1e} from the recorded ones (relative, RMS)"
    if parity.divergence is not None and parity.same_word is not None:
        outputs += f"; next words {parity.divergence:.1e} nats apart, {parity.same_word:.0%} the same"
    return parity, [modules, Check(what="outputs", outcome="same", found=outputs)]


def _not(what: str, why: str) -> Check:
    return Check(what=what, outcome="not checked", found=why)


def _modules(
    found: Artefact, stored: Mapping[str, Stored], tensors: Mapping[str, Tensor]
) -> dict[str, CodedModule]:
    layers, recorded = found.layers(), found.modules or {}
    return {
        path: rebuilt(
            path,
            layers[path],
            stored[path],
            dtype=DTYPES[module.dtype],
            convolution=module.convolution,
            bias=tensors.get(f"bias.{path}"),
            inputs={name: tensors[key] for name in _STATE if (key := f"input.{name}.{path}") in tensors},
        )
        for path, module in recorded.items()
    }


@contextmanager
def _decoding(target: str) -> Generator[None]:
    """A whole file that holds something else than was recorded is a difference, in one line.

    Raises:
        ParityError: instead of what indexing into it raises.
    """
    try:
        yield
    except ParityError:
        raise
    except _MALFORMED as error:
        reason = " ".join(str(error).split())[:200]
        raise ParityError(
            f"what is there cannot be read as the recorded {target} folder ({type(error).__name__}: {reason})"
        ) from error


def _some(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
