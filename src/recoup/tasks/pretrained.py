"""A transformers model and its tokenizer from a folder, checked before transformers sees it.

transformers repairs in silence what is missing: a folder without tokenizer files gives a tokenizer of five
words, and weights that are not in the file are drawn at random. Both are errors here. So is code in the
folder that would have to run, unless whoever gave the command trusts it.
"""

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from recoup.engines.safetensors_file import check_safetensors
from recoup.engines.transformers import kernel_of, quiet
from recoup.tasks.assets import PREFIX, locate

FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors", "*.py")  # never pickle
_READ_IT = "read it, then give the command --trust-remote-code to run it"
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "*.bpe.model", "spiece.model")


def model_folder(model: str, folder: Path) -> Path:
    """The folder of a model that a recipe names.

    A hub id is only what cannot be a path here: "name" or "owner/name", neither of which exists in `folder`.

    Args:
        model: a path, a hub id or "asset:NAME".
        folder: where relative paths start.

    Raises:
        FileNotFoundError: nothing there, or the hub does not give it.
    """
    path = locate(model, folder)
    if path.is_dir():
        return path
    owner = model.partition("/")[0]
    hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model) and not (folder / owner).exists()
    if model.startswith(PREFIX) or not hub_id:
        raise FileNotFoundError(
            f"task.model: {model} asked, no folder {path.resolve()}; "
            "write the path of a folder made by save_pretrained, or a hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"task.model: {model} is no folder in {folder.resolve()}, and the hub does not give it "
            f"({_line(error)}); download it first and write its path"
        ) from None


def check(folder: Path, *, tokenizer: bool = True) -> None:
    """Every file of a model is there, and every safetensors file is whole.

    Args:
        folder: of the model.
        tokenizer: False for a model that has none.

    Raises:
        ValueError: a file is damaged.
        FileNotFoundError: a file is missing.
    """
    wanted = {("config.json",): "config", TOKENIZERS: "tokenizer", ("*.safetensors",): "weights"}
    if not tokenizer:
        del wanted[TOKENIZERS]
    for patterns, what in wanted.items():
        if not any(path for pattern in patterns for path in folder.glob(pattern)):
            raise FileNotFoundError(
                f"task.model: no {what} in {folder} (none of {', '.join(patterns)}); "
                f"save model{' and tokenizer' * tokenizer} there with save_pretrained"
            )
    for path in sorted(folder.glob("*.safetensors.index.json")):
        _check_shards(path)
    check_safetensors(folder)


def files_of(folder: Path) -> list[Path]:
    """The files that make the model and its tokenizer what they are."""
    return sorted(path for pattern in FILES for path in folder.glob(pattern))


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Args:
        folder: of the model.
        trust_remote_code: run Python files that lie beside the model.

    Raises:
        ValueError: transformers does not know the kind of model, its class is code in the folder that is not
            trusted, or the weights are quantized already.
    """
    from transformers import AutoConfig

    if not trust_remote_code:
        _refuse_code(folder)
    with quiet():
        try:
            config: Any = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise _unloadable(folder, "it", error) from error
    quantized: Any = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else type(quantized).__name__
        raise ValueError(f"{folder}: its weights are quantized already ({method}); bring the float model")
    return config


def load_encoder(folder: Path, *, trust_remote_code: bool = False) -> tuple[nn.Module, list[str]]:
    """The encoder in float32 and eval mode, and the names of stored tensors that it has no use for.

    It has no pooler where the class can leave it out: mean pooling never asks it, and nobody should
    calibrate, train and ship a layer that is not used. Attention is the eager one: exported to ONNX it is
    two plain matrix products per layer, while `sdpa` adds shape arithmetic and a NaN guard to each.

    Raises:
        ValueError: transformers cannot make this model, or weights are missing in the files.
    """
    from transformers import MODEL_MAPPING, AutoModel

    config = read_config(folder, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"attn_implementation": "eager"}
    encoder = cast(Any, MODEL_MAPPING).get(type(config), None)  # a tuple where one config has several models
    if inspect.isclass(encoder) and "add_pooling_layer" in inspect.signature(encoder).parameters:
        options["add_pooling_layer"] = False
    return _load(AutoModel, folder, config, options, trust_remote_code)


def load_causal_lm(folder: Path, *, trust_remote_code: bool = False) -> tuple[nn.Module, list[str]]:
    """The language model in float32 and eval mode, and the names of stored tensors that it has no use for.

    It keeps no cache of keys and values: nothing is generated here, and training would hold on to it. Whether
    it generates with one stays in `generation_config`, as the folder says: exports ask that. Attention is
    PyTorch's own, `sdpa` where the class has it.

    Raises:
        ValueError: transformers cannot make this model, its class is code that is not trusted, or weights
            are missing in the files.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(folder, trust_remote_code=trust_remote_code)
    generates_with_cache = getattr(config, "use_cache", None)
    config.use_cache = False
    model, unused = _load(AutoModelForCausalLM, folder, config, {}, trust_remote_code)
    if not (folder / "generation_config.json").is_file():  # made of `config` then
        cast(Any, model).generation_config.use_cache = generates_with_cache
    return model, unused


def load_image_classifier(folder: Path, *, trust_remote_code: bool = False) -> tuple[nn.Module, list[str]]:
    """The classifier in float32 and eval mode, and the names of stored tensors that it has no use for.

    Raises:
        ValueError: transformers cannot make this model, or weights are missing in the files.
    """
    from transformers import AutoModelForImageClassification

    config, options = (
        read_config(folder, trust_remote_code=trust_remote_code),
        {"attn_implementation": "eager"},
    )
    return _load(AutoModelForImageClassification, folder, config, options, trust_remote_code)


def load_tokenizer(folder: Path, config: Any, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer, whose vocabulary the model has embeddings for.

    Tokens that were added to the vocabulary may lie beyond: they stand in few texts. `check_ids` sees those.

    Args:
        folder: of the model.
        config: of the model.
        trust_remote_code: run Python files that lie beside the model.

    Raises:
        ValueError: transformers cannot load it, or its vocabulary is larger than the model's.
    """
    from transformers import AutoTokenizer

    with quiet():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            raise _unloadable(folder, "its tokenizer", error) from error
    rows: int = config.get_text_config().vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} words, the model {rows}; "
            "they are not of the same model"
        )
    return tokenizer


def check_ids(highest: int, folder: Path, config: Any) -> None:
    """The model has an embedding for every id of a text.

    Args:
        highest: of the ids.
        folder: of the model, for messages.
        config: of the model.

    Raises:
        ValueError: it has none for the highest.
    """
    rows: int = config.get_text_config().vocab_size
    if highest >= rows:
        raise ValueError(
            f"{folder}: the tokenizer gives the text the id {highest}, the model's go up to {rows - 1}; "
            "they are not of the same model"
        )


def check_context(config: Any, tokens: int, key: str) -> None:
    """The model takes texts of so many tokens.

    Raises:
        ValueError: it does not; the message names the key that asked.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", tokens)
    if tokens > longest:
        raise ValueError(f"{key}: {tokens} asked, the model takes {longest} at most")


def _load(
    auto: Any, folder: Path, config: Any, options: dict[str, Any], trust_remote_code: bool
) -> tuple[nn.Module, list[str]]:
    """What transformers makes of the folder in float32 and eval mode, and what it has no use for."""
    with quiet():
        try:
            model, found = auto.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                # Not None, for which transformers would ask at the terminal.
                trust_remote_code=trust_remote_code,
                **options,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise _unloadable(folder, "it", error) from error
    absent = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if absent:
        raise ValueError(
            f"{folder}: {len(absent)} weights are missing or misshapen, the first {absent[0]}; "
            "the files are of another model than config.json"
        )
    return model.eval(), sorted(found["unexpected_keys"])


def _refuse_code(folder: Path) -> None:
    """Where transformers has the classes itself, it does not ask for the folder's; else they would run."""
    from transformers import CONFIG_MAPPING

    try:
        config: Any = json.loads((folder / "config.json").read_bytes())
    except (ValueError, RecursionError):
        return  # transformers says what is wrong with it
    if not isinstance(config, Mapping):
        return
    if (kernel := kernel_of(config)) is not None:
        raise ValueError(f"{folder}: its attention is code of {kernel}, not part of transformers; {_READ_IT}")
    code: Any = config.get("auto_map")
    if not code or config.get("model_type") in CONFIG_MAPPING:
        return
    listed = [value if isinstance(value, list) else [value] for value in code.values()]
    modules = sorted({f"{name.rpartition('.')[0]}.py" for names in listed for name in names if name})
    raise ValueError(
        f"{folder}: its class is not part of transformers but code of its own ({', '.join(modules)}); "
        f"{_READ_IT}"
    )


def _check_shards(index: Path) -> None:
    """Every file that the index of a model in several files names is there."""
    try:
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: not an index of safetensors files; fetch it again") from None
    for shard in shards:
        if Path(shard).name != shard:
            raise ValueError(f"{index}: names {shard}, which is no file of its folder; fetch it again")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(
                f"task.model: no {shard} in {index.parent}, which {index.name} names; fetch it again"
            )


def _unloadable(folder: Path, what: str, error: Exception) -> ValueError:
    remedy = f"; {_READ_IT}" if "trust_remote_code" in str(error) else ""
    return ValueError(f"{folder}: transformers cannot load {what} ({_line(error)}){remedy}")


def _line(error: Exception) -> str:
    """The first line of what somebody else's error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
