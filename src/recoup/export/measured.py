"""A folder next to the float model: how far its weights are, what it leaves in float, and what it answers."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from recoup.engines import transformers
from recoup.engines.safetensors_file import read_safetensors
from recoup.export import artefact, checkpoints
from recoup.export.artefact import Artefact
from recoup.export.checkpoints import Checkpoint
from recoup.export.float_model import Distance, Weights, distance, outputs_apart, outputs_of_weights
from recoup.export.targets import Target
from recoup.export.verification import Check, Verification, not_checked
from recoup.nn import CodedConv1D, CodedModule, call

_SHOWN = 5


def of_artefact(
    folder: Path, model: Path, found: Artefact, target: Target, modules: Mapping[str, CodedModule]
) -> tuple[Distance | None, list[Check]]:
    """What recoup wrote: the weights that its codes stand for, and the engine's answers to its batch.

    Args:
        folder: the artefact.
        model: the folder with the float model.
        found: what the artefact says of itself.
        target: what it was written for.
        modules: made again from its bytes; none where that was not possible.
    """
    if modules:
        weights: Weights = _decoded(modules)
    elif found.modules is None and found.target == "compressed-tensors":  # format 0: its config says all
        weights = checkpoints.read(folder).weights()
    else:
        return None, [not_checked("weights", "there are no modules to compare with the float model")]
    apart = distance(weights, model)
    checks = [_weights(apart)]
    if found.example is None:
        return apart, [*checks, not_checked("float", "the folder has no batch to run")]
    batch, _ = artefact.example_of(found, read_safetensors(folder / artefact.TENSORS))
    try:
        said = outputs_apart(call(transformers.load(model), batch), call(target.load(folder), batch))
        checks.append(Check(what="float", outcome="measured", found=f"outputs {said}"))
    except (ValueError, TypeError, OSError) as error:
        checks.append(not_checked("float", f"the float model does not run ({_one_line(error)})"))
    return apart, checks


def of_another_tool(folder: Path, model: Path | None) -> Verification:
    """What llm-compressor, AutoRound, GPTQModel or ModelOpt wrote: decoded, and compared with a float model.

    Raises:
        ValueError: it is no quantized checkpoint, or one that is not understood; says what.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no {artefact.FILE}; expected a folder that recoup export wrote")
    found = checkpoints.read(folder)
    checks = [_quantized(found), not_checked("engine", "nothing was recorded to compare its answers with")]
    apart = None
    if model is None:
        for _ in found.weights():  # what cannot be decoded is an error in any case
            pass
        checks.insert(1, not_checked("weights", "each was decoded; --model compares with a float model"))
    else:
        apart = distance(found.weights(), model)
        checks.insert(1, _weights(apart))
        checks.append(_answers(found, model, apart))
    return Verification(
        folder=folder,
        written=f"quantized by another tool ({found.method})",
        checks=tuple(checks),
        distance=apart,
    )


def _decoded(modules: Mapping[str, CodedModule]) -> Iterator[tuple[str, Tensor]]:
    """As the float modules have them: GPT-2's Conv1D is (in, out)."""
    for path, module in modules.items():
        matrix = module.weight.decode().float()
        yield path, matrix.T if isinstance(module, CodedConv1D) else matrix


def _weights(apart: Distance) -> Check:
    wrong = bool(apart.absent or apart.foreign)
    return Check(what="weights", outcome="different" if wrong else "measured", found=str(apart))


def _quantized(found: Checkpoint) -> Check:
    kept = found.kept
    more = f" and {len(kept) - _SHOWN} more" if len(kept) > _SHOWN else ""
    named = f"in float: {', '.join(kept[:_SHOWN])}{more}" if kept else "no matrix in float"
    layouts = ", ".join(sorted({f"{layer.layout}, {layer.bits} bits" for layer in found.layers.values()}))
    said = f"{len(found.layers)} quantized ({layouts}); {named}"
    return Check(what="layers", outcome="measured", found=said)


def _answers(found: Checkpoint, model: Path, apart: Distance) -> Check:
    if apart.absent:
        return not_checked("float", "the float model has no place for these weights")
    try:
        said = outputs_of_weights(model, found.weights())
    except (ValueError, TypeError, OSError, AttributeError) as error:
        return not_checked("float", f"the float model does not run ({_one_line(error)})")
    return Check(what="float", outcome="measured", found=f"with these weights, inputs in float: {said}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
