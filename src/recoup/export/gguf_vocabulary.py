"""A tokenizer as llama.cpp has it: the words, how they are put together, and what the special ones are.

llama.cpp has its own code for each family of tokenizers, chosen by two names. "llama" joins the pair whose
result scores highest and falls back to bytes; "gpt2" first cuts the text by rules that `tokenizer.ggml.pre`
names, and joins by a list of merges. Which rules a tokenizer has is read from its own description,
`tokenizer.json`, and what is not among `_RULES` is refused. Whether llama.cpp then reads texts as the
tokenizer does is proved in the engine, see `gguf_parity`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from recoup.engines.transformers import quiet

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "*.bpe.model", "spiece.model")
_SPACE = "\u2581"  # what stands for a space in SentencePiece
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_DIGITS = {"type": "Digits", "individual_digits": True}
# llama.cpp's names (src/llama-vocab.cpp) for rules: what comes before the bytes, and whether a piece that is
# a word as a whole is joined at all.
_RULES: dict[str, tuple[list[str], bool]] = {
    "gpt-2": (["bytes"], False),
    "smollm": (["digits", "bytes"], False),
    "llama-bpe": ([rf"{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|{_ENDS}"], True),
    "smaug-bpe": ([rf"{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|{_ENDS}"], False),
    "qwen2": ([rf"{_LETTERS}|\p{{N}}|{_SIGNS}|{_ENDS}"], False),
}


def load(folder: Path) -> Any:
    """The folder's tokenizer; None where there is none.

    Raises:
        ValueError: transformers does not load it.
    """
    if not any(file for pattern in TOKENIZERS for file in folder.glob(pattern)):
        return None
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            description(tokenizer)
    except Exception as error:  # noqa: BLE001 (whatever is wrong in the folder's files)
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"gguf: transformers does not load the tokenizer in {folder} ({line}); pass "
            "processor=tokenizer, a fast one"
        ) from None
    return tokenizer


def description(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json, as data."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def joins_leading_spaces(tokenizer: Any) -> bool:
    """A text that begins with a space gets no further one, as in SentencePiece and llama.cpp it does."""
    parts = _parts(description(tokenizer).get("pre_tokenizer"), "pretokenizers")
    return any(part["type"] == "Metaspace" and part["prepend_scheme"] != "never" for part in parts)


def describe(folder: Path, model: nn.Module, writer: Any) -> None:
    """The vocabulary into the file's metadata.

    Args:
        folder: with the tokenizer's files, or without.
        model: with the number of words in its config.
        writer: a `gguf.GGUFWriter`.

    Raises:
        ValueError: llama.cpp has no such tokenizer.
    """
    config: Any = model.config
    tokenizer = load(folder)
    if tokenizer is None:
        _placeholders(config.vocab_size, writer)
        return
    # Without a tokenizer there is no name: llama.cpp looks for words of Phi-3's in a model of that name.
    writer.add_name(Path(str(getattr(config, "_name_or_path", "") or type(model).__name__)).name)
    found = description(tokenizer)
    tokens, types = _tokens(found, config.vocab_size)
    kind = _kind(found)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    if kind == "gpt2":
        writer.add_tokenizer_pre(_pre(found))
        writer.add_token_merges([" ".join(pair) for pair in _merges(found)])
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(found, tokens))
        writer.add_add_space_prefix(_prepends_a_space(found))
    writer.add_token_types(types)
    _special(tokenizer, config, writer)


def _placeholders(words: int, writer: Any) -> None:
    """A vocabulary that no text is made of. llama.cpp's server needs one, even for token ids."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"[{word}]" for word in range(words)])
    writer.add_token_scores([0.0] * words)
    writer.add_token_types([UNKNOWN, *[NORMAL] * (words - 1)])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def _kind(found: Mapping[str, Any]) -> str:
    model = found["model"]
    if model["type"] != "BPE":
        raise ValueError(
            f"gguf: the tokenizer is a {model['type']}; of llama.cpp's tokenizers the ones with merges (BPE) "
            "are written; export without a tokenizer and use token ids"
        )
    return "llama" if model.get("byte_fallback") else "gpt2"


def _tokens(found: Mapping[str, Any], words: int) -> tuple[list[str], list[int]]:
    """The words by id, and what they are."""
    vocabulary: dict[str, int] = found["model"]["vocab"]
    added = {token["id"]: token for token in found["added_tokens"]}
    highest = max([*vocabulary.values(), *added])
    if highest >= words:
        raise ValueError(
            f"gguf: the tokenizer has the id {highest}, the model {words} words; pass the model's own as "
            "processor="
        )
    tokens, types = [f"[PAD{word}]" for word in range(words)], [UNUSED] * words
    falls_back = bool(found["model"].get("byte_fallback"))
    for token, word in vocabulary.items():
        tokens[word] = token
        is_byte = falls_back and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        types[word] = BYTE if is_byte else NORMAL
    for word, token in added.items():
        text = token["content"]
        types[word] = CONTROL if token["special"] else USER_DEFINED
        tokens[word] = text.replace(_SPACE, " ") if types[word] == USER_DEFINED else text
    unknown = found["model"].get("unk_token")
    if falls_back and unknown in vocabulary:
        types[vocabulary[unknown]] = UNKNOWN
    return tokens, types


def _merges(found: Mapping[str, Any]) -> list[list[str]]:
    merges = found["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]


def _scores(found: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """Of SentencePiece's words: the earlier a merge makes a word, the higher; others are made by none."""
    rank: dict[str, int] = {}
    for place, pair in enumerate(_merges(found)):
        rank.setdefault("".join(pair), place)
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _prepends_a_space(found: Mapping[str, Any]) -> bool:
    parts = [
        *_parts(found.get("normalizer"), "normalizers"),
        *_parts(found.get("pre_tokenizer"), "pretokenizers"),
    ]
    return any(
        part["type"] == "Prepend" or part.get("prepend_scheme") in ("always", "first") for part in parts
    )


def _pre(found: Mapping[str, Any]) -> str:
    """llama.cpp's name for the rules by which a text is cut."""
    steps = [_step(part) for part in _parts(found.get("pre_tokenizer"), "pretokenizers")]
    rules = [step for step in steps if step is not None], bool(found["model"].get("ignore_merges"))
    for name, known in _RULES.items():
        if rules == known:
            return name
    raise ValueError(
        "gguf: the tokenizer cuts texts by rules that are none of those known here by llama.cpp's names "
        f"({', '.join(_RULES)}); export without a tokenizer and use token ids"
    )


def _step(part: Mapping[str, Any]) -> str | None:
    if part["type"] == "ByteLevel":
        return "bytes" if part["use_regex"] else None
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return str(part["pattern"].get("Regex"))
    return "digits" if part == _DIGITS else part["type"]


def _parts(part: Mapping[str, Any] | None, several: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[several]) if part["type"] == "Sequence" else [part]


def _special(tokenizer: Any, config: Any, writer: Any) -> None:
    """Ids of special words, which of them a text gets at its ends, and the template of a chat."""
    ids = {
        name: next((v for v in (getattr(tokenizer, f"{name}_token_id"), getattr(config, f"{name}_token_id",
            None))
                    if isinstance(v, int)), None)
        for name in ("bos", "eos", "unk", "pad")
    }  # fmt: skip
    for name, word in ids.items():
        if word is not None:
            getattr(writer, f"add_{name}_token_id")(word)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    framed = len(whole) > len(plain)
    writer.add_add_bos_token(framed and whole[0] == ids["bos"])
    writer.add_add_eos_token(framed and whole[-1] == ids["eos"])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
