"""How much of every model type of transformers is quantized without a rule, and why the rest is not.

Models are built from their default configs on the meta device: no download, no memory. A type has a limit of
CPU time, so that one that never ends stops no others.
"""

import argparse
import importlib
import json
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

import recoup
from recoup.numerics import per_channel
from recoup.progress import progress
from recoup.schemes import PRESETS
from recoup.transforms import fold_weight_norm

ENOUGH = 0.95
# The base model first, and whatever else transformers builds from the type's config after it.
_MAPPINGS = sorted(
    (n for n in dir(modeling_auto) if n.startswith("MODEL_") and n.endswith("_MAPPING")), key=len
)
_PRESET = PRESETS["w8a16"]
INT8 = replace(_PRESET, name="int8", weights=replace(_PRESET.weights, granularity=per_channel))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What becomes of a type's matrices: the share that is quantized, and the reasons for the rest.

    Args:
        share: of the elements of matrices that are not meant to stay in float.
        left: elements of the others, by the reason that `explain` gives.
        unbuilt: why the default config gives no model.
        refused: why `resolve` finds no plan.
        seconds: of CPU time.
    """

    share: float = 0.0
    left: dict[str, int] = field(default_factory=dict)
    unbuilt: str = ""
    refused: str = ""
    seconds: float = 0.0


class OutOfTimeError(Exception):
    """A type took longer than its limit."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """At most so many seconds of CPU time, whatever else the machine does."""

    def stop(*_: Any) -> None:
        raise OutOfTimeError(f"more than {seconds:g} s of CPU time")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def built(config: PretrainedConfig) -> nn.Module:
    """A model of this config, without memory.

    Raises:
        ValueError: there is no class for it.
    """
    for name in _MAPPINGS:
        mapping = getattr(modeling_auto, name)
        if type(config) in mapping:
            kind = mapping[type(config)]
            with torch.device("meta"):
                return (kind[0] if isinstance(kind, tuple) else kind)(config)
    raise ValueError("no model of its own")


def looked_at(model: nn.Module) -> Found:
    """The share, and the reasons for the rest, however much that is."""
    plan = recoup.resolve(model, recoup.Recipe(scheme=INT8))
    sizes = {path: parameter.numel() for path, parameter in model.named_parameters() if parameter.ndim >= 2}
    left: Counter[str] = Counter()
    for path in sizes:
        if plan.kept.get(path, "").startswith(("no quantized form", "norm")):
            left[plan.kept[path]] += sizes[path]
    quantized = sum(size for path, size in sizes.items() if path not in plan.kept)
    return Found(share=quantized / max(1, quantized + left.total()), left=dict(left.most_common()))


def survey(kinds: Sequence[str], limit: float) -> Iterator[tuple[str, Found]]:
    """Each of these types, with so much CPU time for each."""
    # What is left in float is what is asked here, so no share of it is too much.
    importlib.import_module("recoup.prepare").LEFT_OUT = 1.0
    for kind in kinds:
        start = time.process_time()
        try:
            with limited(limit):
                found = _found(kind)
        except OutOfTimeError as error:
            found = Found(refused=str(error))
        yield kind, replace(found, share=round(found.share, 4), seconds=round(time.process_time() - start, 1))


def _found(kind: str) -> Found:
    try:
        model = built(CONFIG_MAPPING[kind]())
    except OutOfTimeError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever a default config lacks)
        said = re.sub(r" from '[^']*'", "", str(error))  # where a module lies on this machine
        return Found(unbuilt=f"{type(error).__name__}: {said}".splitlines()[0])
    try:
        return looked_at(fold_weight_norm(model))
    except ValueError as error:
        return Found(refused=str(error))


def kept_in(file: Path | None) -> dict[str, Found]:
    """What an earlier run, of the same release of transformers, found before it was stopped."""
    if file is None or not file.exists():
        return {}
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["transformers"] != transformers.__version__:
        raise SystemExit(f"{file}: of transformers {record['transformers']}; remove it to begin again")
    return {kind: Found(**row) for kind, row in record["types"].items()}


def keep(found: dict[str, Found], file: Path) -> None:
    """Write what was found, a type to a line, without what is empty."""
    rows = {kind: {key: value for key, value in asdict(row).items() if value} for kind, row in found.items()}
    lines = ",\n".join(f"{json.dumps(kind)}: {json.dumps(row)}" for kind, row in sorted(rows.items()))
    head = f'"transformers": {json.dumps(transformers.__version__)}'
    file.write_text(f'{{{head}, "types": {{\n{lines}\n}}}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("types", nargs="*", metavar="type", help="of models; all that transformers names")
    parser.add_argument("--unbuilt", action="store_true", help="say why some default configs build no model")
    parser.add_argument("--limit", type=float, default=120.0, help="CPU seconds for one type (120)")
    parser.add_argument(
        "--to", type=Path, help="a JSON file for what is found; types in it are not asked again"
    )
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = kept_in(asked.to)
    kinds = [kind for kind in asked.types or sorted(CONFIG_MAPPING) if kind not in found]
    with progress("looking at model types", len(kinds)) as advance:
        for kind, row in survey(kinds, asked.limit):
            found[kind] = row
            advance(kind)
            if asked.to:
                keep(found, asked.to)
    models = {kind: row for kind, row in found.items() if not row.unbuilt}
    below = sorted(
        (kind for kind, row in models.items() if row.share < ENOUGH), key=lambda k: models[k].share
    )
    enough = len(models) - len(below)
    print(f"{len(found)} types, {len(models)} built from their default config, {enough} with {ENOUGH:.0%}")
    for kind in below:
        row = models[kind]
        print(f"{kind}: {row.share:.1%}; {row.refused or ', '.join(list(row.left)[:3])}")
    if asked.unbuilt:
        print(*(f"{kind}: {row.unbuilt}" for kind, row in found.items() if row.unbuilt), sep="\n")


if __name__ == "__main__":
    main()
