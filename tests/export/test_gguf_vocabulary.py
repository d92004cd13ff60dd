"""Tokenizers of every family that is written: llama.cpp reads texts as they do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gguf
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from recoup import export
from recoup.engines import llama_cpp
from recoup.export import ParityError
from recoup.export import gguf_vocabulary as vocabulary

from .gguf_models import batch, quantized, small

WORDS = 420
TEXT = [
    "Hello world, it's a quarter past 12 o'clock; we'LL see the two spaces,  and tabs\t\tand\n\nlines.",
    "The State of the Union is strong; in 1234567 ways we hope that it's so. Hello, hello, world!",
]
LLAMA3, QWEN2 = (vocabulary._RULES[name][0][0] for name in ("llama-bpe", "qwen2"))  # pyright: ignore[reportPrivateUsage]
SPECIAL = [
    AddedToken("<s>", special=True),
    AddedToken("</s>", special=True),
    AddedToken("<mine>", special=False),
]


def byte_level(before: list[Any], *, regex: bool, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=WORDS - 20, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens(SPECIAL)
    return tokenizer


def split(regex: str) -> Any:
    return pre_tokenizers.Split(Regex(regex), "isolated")


def sentence_piece(*, prepend: bool = True, metaspace: bool = False) -> Tokenizer:
    """Words joined by rank that fall back to bytes, as SentencePiece's are in tokenizer.json."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for letter in sorted(set("".join(TEXT)) - {" ", "\n", "\t"} | {"▁"}):
        words[letter] = len(words)
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    plain = [" ".join(text.split()) for text in TEXT]  # tabs and ends of lines are bytes
    learned.train_from_iterator(plain, BpeTrainer(vocab_size=120, show_progress=False))
    pieces = ["".join(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    for piece in pieces:
        words.setdefault(piece, len(words))
    cuts = [(piece, place) for piece in pieces for place in range(1, len(piece))]
    pairs = [(piece[:place], piece[place:]) for piece, place in cuts]
    merges = [pair for pair in pairs if set(pair) <= set(words)]  # every way to make a word, best words first
    model = models.BPE(words, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    if metaspace:
        scheme = "first" if prepend else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        before = [normalizers.Prepend("▁")] if prepend else []
        tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


DIGITS = pre_tokenizers.Digits(individual_digits=True)
TOKENIZERS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "gpt-2": (lambda: byte_level([], regex=True), "gpt-2"),
    "smollm": (lambda: byte_level([DIGITS], regex=True), "smollm"),
    "llama 3": (lambda: byte_level([split(LLAMA3)], regex=False, ignore_merges=True), "llama-bpe"),
    "llama 3, always merged": (lambda: byte_level([split(LLAMA3)], regex=False), "smaug-bpe"),
    "qwen2": (lambda: byte_level([split(QWEN2)], regex=False), "qwen2"),
    "llama 2": (sentence_piece, "default"),
    "mistral": (lambda: sentence_piece(metaspace=True), "default"),
    "gemma": (lambda: sentence_piece(prepend=False), "default"),
}


def fast(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
    )


def model() -> Any:
    torch.manual_seed(0)
    return quantized("q8_0", small("qwen2", vocab_size=WORDS))


@pytest.mark.parametrize(("make", "pre"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_llama_cpp_reads_texts_as_the_tokenizer_does(
    make: Callable[[], Tokenizer], pre: str, tmp_path: Path
) -> None:
    """`export` has compared its own texts."""
    tokenizer = fast(make())
    export(model(), tmp_path / "out", "gguf", processor=tokenizer)
    server = llama_cpp.Server(tmp_path / "out", context=8, hidden=False, threads=1)
    leading = [] if vocabulary.joins_leading_spaces(tokenizer) else ["  a"]
    for text in (*TEXT, *leading, "x", "I said: \u00e9t\u00e9 \u4f60\u597d \U0001f999 99 1000"):
        assert server.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    values = {key: cast(Any, reader.get_field(key)).contents() for key in reader.fields if "GGUF." not in key}
    assert values["tokenizer.ggml.pre"] == pre
    assert values["tokenizer.chat_template"] == "{{ messages }}"
    assert values["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert values["tokenizer.ggml.add_bos_token"] == (pre == "default")
    assert not values["tokenizer.ggml.add_eos_token"]
    assert len(values["tokenizer.ggml.tokens"]) == WORDS
    kinds = values["tokenizer.ggml.token_type"]
    assert kinds[tokenizer.bos_token_id] == vocabulary.CONTROL
    assert kinds[WORDS - 1] == vocabulary.UNUSED
    if pre == "default":
        assert kinds[0] == vocabulary.UNKNOWN
        assert kinds[3:259] == [vocabulary.BYTE] * 256
    else:
        assert kinds[tokenizer.convert_tokens_to_ids("<mine>")] == vocabulary.USER_DEFINED


def test_rules_that_llama_cpp_does_not_have_are_refused(tmp_path: Path) -> None:
    tokenizer = fast(byte_level([split(r"\w+")], regex=False))
    message = (
        r"gguf: the tokenizer cuts texts by rules that are none of those .* \(gpt-2, smollm, .*use token ids"
    )
    with pytest.raises(ValueError, match=message):
        export(model(), tmp_path / "out", "gguf", processor=tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    with pytest.raises(ValueError, match=r"the tokenizer is a WordLevel; .* with merges \(BPE\) are written"):
        export(model(), tmp_path / "out", "gguf", processor=fast(tokenizer))


def test_a_tokenizer_with_more_words_than_the_model_is_refused(tmp_path: Path) -> None:
    prepared = quantized("q8_0", small("qwen2"))
    with pytest.raises(
        ValueError, match="the tokenizer has the id 347, the model 40 words; pass the model's own"
    ):
        export(
            prepared, tmp_path / "out", "gguf", processor=fast(byte_level([], regex=True)), example=batch()
        )


def test_a_tokenizer_that_transformers_does_not_load_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"transformers does not load the tokenizer in .* pass processor=tokenizer"
    ):
        vocabulary.load(tmp_path)


def test_a_tokenizer_that_llama_cpp_reads_in_another_way_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rules have a name, and the name is wrong."""
    monkeypatch.setattr(vocabulary, "_pre", lambda found: "qwen2")
    tokenizer = fast(byte_level([], regex=True))
    with pytest.raises(
        ParityError, match=r"llama\.cpp reads .* as other tokens than the tokenizer, from place"
    ):
        export(model(), tmp_path / "out", "gguf", processor=tokenizer)
    assert not list(tmp_path.iterdir())
