"""How much of every model type of transformers is quantized without a rule.

Models are built from their default configs on the meta device: no download, no memory.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

import recoup
from recoup.nn import type_name
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
    """What becomes of a type's matrices: the share that is quantized, and the types that hold the rest."""

    share: float = 0.0
    left: Counter[str] = field(default_factory=Counter)
    unbuilt: str = ""


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
    """The share, and who holds the rest; rules keep that, where `resolve` asks for them."""
    kept: list[str] = []
    while True:
        rules = [{"match": match, "scheme": "none"} for match in kept]
        try:
            plan = recoup.resolve(model, recoup.Recipe.model_validate({"scheme": INT8, "rules": rules}))
            break
        except ValueError as error:
            advice = str(error).partition("{match: ")[2].partition(", scheme: none}")[0]
            if not advice or advice in kept:
                raise
            kept.append(advice)
    sizes = {path: parameter.numel() for path, parameter in model.named_parameters() if parameter.ndim >= 2}
    left: Counter[str] = Counter()
    for path in sizes:
        if plan.kept.get(path, "").startswith(("no quantized form", "norm", "rule")):
            left[type_name(model.get_submodule(path.rpartition(".")[0]))] += sizes[path]
    quantized = sum(size for path, size in sizes.items() if path not in plan.kept)
    return Found(share=quantized / max(1, quantized + left.total()), left=left)


def survey(kinds: Sequence[str]) -> Iterator[tuple[str, Found]]:
    """Each of these types."""
    for kind in kinds:
        try:
            model = built(CONFIG_MAPPING[kind]())
        except Exception as error:  # noqa: BLE001 (whatever a default config lacks)
            yield kind, Found(unbuilt=f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        yield kind, looked_at(fold_weight_norm(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("types", nargs="*", metavar="type", help="of models; all that transformers names")
    parser.add_argument("--unbuilt", action="store_true", help="say why some default configs build no model")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    kinds = asked.types or sorted(CONFIG_MAPPING)
    found: dict[str, Found] = {}
    with progress("looking at model types", len(kinds)) as advance:
        for kind, row in survey(kinds):
            found[kind] = row
            advance(kind)
    models = {kind: row for kind, row in found.items() if not row.unbuilt}
    enough = sum(row.share >= ENOUGH for row in models.values())
    print(f"{len(found)} types, {len(models)} built from their default config, {enough} with {ENOUGH:.0%}")
    for kind, row in sorted(models.items(), key=lambda item: item[1].share):
        if row.share < ENOUGH:
            print(f"{kind}: {row.share:.1%}; {', '.join(name for name, _ in row.left.most_common(3))}")
    if asked.unbuilt:
        print(*(f"{kind}: {row.unbuilt}" for kind, row in found.items() if row.unbuilt), sep="\n")


if __name__ == "__main__":
    main()
