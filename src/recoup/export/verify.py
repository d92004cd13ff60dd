"""The verb: is a folder still what was exported? From the folder alone."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from recoup.engines.safetensors_file import read_safetensors
from recoup.export import artefact, record
from recoup.export.artefact import Artefact
from recoup.export.measured import of_another_tool, of_artefact
from recoup.export.migrations import read
from recoup.export.parity import Parity, ParityError
from recoup.export.rebuilt import DTYPES, quantizer, rebuilt
from recoup.export.targets import Target, usable
from recoup.export.trained import Layer, Stored, Trained, check_cached
from recoup.export.verification import Check, Verification, not_checked
from recoup.nn import CodedModule, FakeQuantizer

_SHOWN = 5
_MALFORMED = (KeyError, IndexError, TypeError, AttributeError, RuntimeError, AssertionError, OverflowError)


@torch.no_grad()
def verify(folder: str | Path, *, model: str | Path | None = None) -> Verification:
    """Check a folder again as `export` did, from the folder alone; changes nothing.

    The sums of all files; the codes and scales decoded from their bytes, by their digests, of exactly the
    modules that were quantized; the scales of keys and values; every module and every cache in the engine,
    within its bound of the same one made again from its codes; the engine's outputs for the batch that was
    recorded, against the trained model's; and, of a file that decodes, the words it says after that batch.

    A folder that another tool wrote (compressed-tensors, GPTQ, AWQ, AutoRound, ModelOpt) has nothing
    recorded: it is decoded, and compared with the float model.

    Args:
        folder: that `export` wrote, with this version or an older one; or a quantized checkpoint.
        model: a folder with the float model, to say how far quantized weights and outputs are from it. No
            code in it is run.

    Raises:
        ValueError: no artefact, one of a newer format, or a damaged file; or a checkpoint that is not
            understood.
        ImportError: the target's libraries are not installed; names the extra.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one that recoup export wrote")
    if model is not None and not Path(model).is_dir():
        raise ValueError(f"{model}: no such folder; expected the float model's")
    number, found = read(folder)
    if found is None:
        return of_another_tool(folder, None if model is None else Path(model))
    target = usable(found.target)
    checks = [_files(folder, found)]
    modules, codes = _codes(folder, found, target)
    cached, kept = _cache(folder, found, target)
    parity, ran = _engine(folder, found, target, modules, cached)
    checks += [codes, *kept, *ran]
    apart = None
    if model is not None:
        apart, compared = of_artefact(folder, Path(model), found, target, modules)
        checks += compared
    by = f"recoup {found.recoup}" if found.recoup else "a recoup that did not note its version"
    return Verification(
        folder=folder,
        written=f"{found.target}, format {number}, written by {by}",
        checks=tuple(checks),
        parity=parity,
        distance=apart,
    )


def _files(folder: Path, found: Artefact) -> Check:
    if found.files is None:
        return not_checked("files", "format 0 has no sums of its files")
    different: list[str] = []
    for name, written in found.files.items():
        file = artefact.inside(folder, name)
        if not file.is_file():
            different.append(f"{name} is missing")
        elif record.sum_of(file) != written:
            different.append(f"{name} has other bytes")
    if different:
        return Check(what="files", outcome="different", found=_some(different))
    return Check(what="files", outcome="same", found=f"{len(found.files)} with the sums of the export")


def _codes(folder: Path, found: Artefact, target: Target) -> tuple[dict[str, CodedModule], Check]:
    """Whether the bytes hold what was recorded; and the modules, made again from the bytes."""
    if found.modules is None:
        return {}, not_checked("codes", "format 0 has no digests of codes and scales")
    layers = found.layers()
    try:
        with _decoding(found.target):
            stored = target.stored(folder, layers)
            modules = _modules(folder, found, layers, stored)
    except ParityError as error:
        return {}, Check(what="codes", outcome="different", found=str(error))
    different: list[str] = []
    for path, module in found.modules.items():
        now = record.digests(stored[path], layers[path].scheme.weights)
        different += [
            f"{path}: other {name.replace('_', ' ')}"
            for name, digest in now.items()
            if module.digests.get(name) != digest
        ]
    if different:
        return modules, Check(what="codes", outcome="different", found=_some(different))
    codes, scales = (sum(each[name].size for each in stored.values()) for name in ("codes", "scale"))
    counted = f"{codes:,} codes and {scales:,} scales of {len(stored)} modules, and no other is quantized"
    return modules, Check(what="codes", outcome="same", found=counted)


def _modules(
    folder: Path, found: Artefact, layers: Mapping[str, Layer], stored: Mapping[str, Stored]
) -> dict[str, CodedModule]:
    tensors, recorded = read_safetensors(folder / artefact.TENSORS), found.modules or {}
    return {
        path: rebuilt(
            path,
            layers[path],
            stored[path],
            dtype=DTYPES[module.dtype],
            convolution=module.convolution,
            bias=tensors.get(f"bias.{path}"),
            inputs=artefact.state_of("input", path, tensors),
        )
        for path, module in recorded.items()
    }


def _cache(folder: Path, found: Artefact, target: Target) -> tuple[dict[str, FakeQuantizer], list[Check]]:
    """Whether the bytes hold the scales of keys and values that were recorded; no check where there are none.

    Raises:
        ValueError: what was recorded is not theirs.
    """
    if found.modules is None:
        return {}, []
    quantizers: dict[str, FakeQuantizer] = {}
    if (cache := found.cache) is not None:
        target.cache(cache.spec)
        tensors = read_safetensors(folder / artefact.TENSORS)
        for path in cache.names:
            state = artefact.state_of("cache", path, tensors)
            quantizers[path] = quantizer(path, cache.spec, columns=None, state=state)
    try:
        with _decoding(found.target):
            scales = check_cached(quantizers, target.stored_cached(folder))
    except ParityError as error:
        return quantizers, [Check(what="cache", outcome="different", found=str(error))]
    same = Check(what="cache", outcome="same", found=f"{scales} scales of keys and values")
    return quantizers, [same] * (scales > 0)


def _engine(
    folder: Path,
    found: Artefact,
    target: Target,
    modules: Mapping[str, CodedModule],
    cached: Mapping[str, FakeQuantizer],
) -> tuple[Parity | None, list[Check]]:
    """The modules and the outputs, as the engine computes them."""
    if found.modules is None:
        target.load(folder)
        return None, [not_checked("engine", "it loads the folder; format 0 has no batch to run")]
    if not modules:
        return None, [not_checked("engine", "the modules cannot be made again from these codes")]
    if found.example is None:
        return None, [not_checked("engine", "the batch of the export held values that no file keeps")]
    tensors = read_safetensors(folder / artefact.TENSORS)
    batch, answers = artefact.example_of(found, tensors)
    trained = Trained(
        modules=modules,
        places={place: path for path, module in found.modules.items() for place in module.places},
        example=batch,
        answers=answers,
        recorded=answers,
        generation=artefact.generation_of(found, tensors),
        lattices={
            path: quantizer(path, spec, columns=None, state=artefact.state_of("lattice", path, tensors))
            for path, spec in found.lattices.items()
        },
        cached=cached,
        routing=artefact.routing_of(tensors),
    )
    try:
        with _decoding(found.target):
            parity = target.compare(trained, folder)
    except ParityError as error:
        return None, [Check(what="engine", outcome="different", found=str(error))]
    within = not_checked("modules", "the engine shows no module's output")
    if parity.worst_module is not None:
        bound = f"{parity.modules} in the engine, within {parity.worst_module:.0%} of their bound"
        within = Check(what="modules", outcome="same", found=bound)
    outputs = f"{parity.end_to_end:.1e} from the recorded ones (relative, RMS)"
    if parity.divergence is not None and parity.same_word is not None:
        outputs += f"; next words {parity.divergence:.1e} nats apart, {parity.same_word:.0%} the same"
    checks = [within, Check(what="outputs", outcome="same", found=outputs)]
    if parity.decoded is not None:
        said = f"{parity.decoded} words, each after its past; {parity.ties} are another as likely"
        checks.append(Check(what="generation", outcome="same", found=said))
    elif getattr(target.load(folder), "presents", None):
        checks.append(not_checked("generation", "the words that the trained model said are not recorded"))
    return parity, checks


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
