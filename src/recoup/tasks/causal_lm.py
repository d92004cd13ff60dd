"""Language models: how likely a model finds each next token of a text that it was not trained on.

    perplexity    per test token its negative log-likelihood in nats; the aggregate is exp of the mean
    top-1         per test token 1 or 0: the most likely token is the true one

The first token of a sequence is predicted from nothing and not measured.

Slices, fixed by the texts and never by a model:

    rare-tokens     the tenth of the test tokens that are rarest in the training text
    long-context    tokens in the last quarter of their sequence
    decile-1 ...    every tenth by frequency, from rare (decile-1 is rare-tokens) to frequent, if asked for

No sequence is in two of: calibration, training, test. What the training text shares with the test text is
left out of it, with a warning.
"""

import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recoup.progress import watched
from recoup.schemes import Recipe, parse
from recoup.tasks.assets import about
from recoup.tasks.documents import MEASURING_SEED
from recoup.tasks.packing import PASSAGE, Ids, deciles, pack, repeated, tokens_of
from recoup.tasks.pretrained import (
    check,
    check_context,
    check_ids,
    files_of,
    load_causal_lm,
    load_tokenizer,
    model_folder,
    read_config,
)
from recoup.tasks.task import Batch, Task, asking, need, sha256_of, too_few
from recoup.tasks.texts import find, read
from recoup.validate import Samples

Blocks = Int[NDArray[np.int64], "sequences context"]


class Data(BaseModel):
    """Files (.txt, .jsonl, .parquet; shell patterns and lists of them), and the key that has the text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str | tuple[str, ...]
    test: str | tuple[str, ...]
    text: str = "text"


class Settings(BaseModel):
    """What the recipe says under `task`.

    Args:
        model: a folder, a hub id or "asset:NAME".
        data: train and test texts.
        context: tokens of a sequence.
        batch_size: sequences of a batch of calibration and training.
        test_batch_size: sequences that are measured at a time.
        train_tokens: of training, drawn from all over the text; all that calibration leaves where absent.
        test_tokens: drawn from all over the text, the same ones for every seed; all where absent.
        deciles: slices for every tenth of the test tokens by frequency, not the rarest alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)
    data: Data
    context: int = Field(default=512, ge=8)
    batch_size: int = Field(default=4, ge=1)
    test_batch_size: int = Field(default=8, ge=1)
    train_tokens: int | None = Field(default=None, ge=1)
    test_tokens: int | None = Field(default=None, ge=1)
    deciles: bool = False


def load(recipe: Recipe, folder: Path, trust_remote_code: bool = False) -> Task:
    """Model, batches and measurement of a recipe. Reads and tokenizes both texts as a whole.

    Args:
        recipe: with this task.
        folder: where relative paths start.
        trust_remote_code: run Python files that lie beside the model.

    Raises:
        ValueError: model or text cannot be used; one line that says what was found and what to do.
        FileNotFoundError: a file is not there.
        ImportError: transformers, or pyarrow for parquet, is not installed.

    Warns:
        UserWarning: the training text holds parts of the test text; with their share.
    """
    settings = _settings(recipe)
    files = {
        part: find(getattr(settings.data, part), folder, f"task.data.{part}") for part in ("train", "test")
    }
    found = {
        part: [text for path in files[part].values() for text in read(path, settings.data.text)]
        for part in files
    }
    documents = {part: [text for text in found[part] if text.strip()] for part in found}
    source = model_folder(settings.model, folder)
    check(source)
    config = read_config(source, trust_remote_code=trust_remote_code)
    check_context(config, settings.context, "task.context")
    tokenizer = load_tokenizer(source, config, trust_remote_code=trust_remote_code)

    texts = _disjoint(documents["train"], documents["test"], tokenizer, settings.context)
    check_ids(len(texts.counts) - 1, source, config)
    test = _drawn(texts.test, settings.test_tokens, random.Random(MEASURING_SEED))
    calibration, train = _calibration_and_train(texts.train, recipe, settings)
    slices = _slices(test, texts.counts, every_decile=settings.deciles)
    model, unused = load_causal_lm(source, trust_remote_code=trust_remote_code)
    named = {path.name: path for path in files_of(source)} | files["train"] | files["test"]
    written = (settings.model, *files["train"], *files["test"])
    return Task(
        model=model,
        calibration=_batches(calibration, settings.batch_size),
        train=_batches(train, settings.batch_size),
        evaluate=Evaluation(
            sequences=test,
            batch_size=settings.test_batch_size,
            slices=slices,
        ),
        facts={
            "model": settings.model,
            **about(*written),
            **{f"sha256 {name}": sha256_of(path) for name, path in named.items()},
            "stored weights without use": ", ".join(unused) or "none",
            "blank documents left out": ", ".join(
                f"{len(found[part]) - len(documents[part])} of {part}" for part in found
            ),
            "tokens of a sequence": str(settings.context),
            "test sequences": f"{len(test)} of {len(texts.test)}",
            "test tokens measured": f"{len(slices['rare-tokens'])}, of them "
            + ", ".join(f"{mask.sum()} {name}" for name, mask in slices.items()),
            "calibration sequences": str(len(calibration)),
            "train sequences": f"{len(train)} of {len(texts.train) - len(calibration)}",
            **texts.facts,
        },
    )


def load_model(recipe: Recipe, folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """The float model of a recipe, without data. Raises as `load` does."""
    settings = _settings(recipe)
    source = model_folder(settings.model, folder)
    check(source)
    return load_causal_lm(source, trust_remote_code=trust_remote_code)[0]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`evaluate` of the task: everything but the model is fixed.

    Args:
        sequences: of the test text.
        batch_size: how many are asked at a time.
        slices: masks over the measured tokens, sequence by sequence.
    """

    sequences: Blocks
    batch_size: int
    slices: dict[str, Bool[NDArray[np.bool_], " tokens"]]

    def __call__(self, model: nn.Module) -> Samples:
        """Per measured token, in the order of the text; NaN where the model's logits are not finite."""
        scores: list[Float[Tensor, "2 tokens"]] = []
        with asking(model) as device:
            batches = torch.from_numpy(self.sequences).split(self.batch_size)
            for batch in watched(batches, "reading the test text"):
                logits = model(input_ids=batch.to(device)).logits
                # One sequence at a time: the log-softmax of a batch would take as much memory as its logits.
                scores += [score(row, ids) for row, ids in zip(logits, batch.to(device), strict=True)]
        perplexity, top_1 = torch.cat(scores, dim=1).double().numpy()
        return Samples({"perplexity": perplexity, "top-1": top_1}, slices=self.slices)


def score(logits: Float[Tensor, "tokens words"], ids: Int[Tensor, " tokens"]) -> Float[Tensor, "2 measured"]:
    """Negative log-likelihood of every token but the first, and whether it was the most likely one."""
    logits, targets = logits[:-1].float(), ids[1:]
    scores = torch.stack(
        [cross_entropy(logits, targets, reduction="none"), (logits.argmax(dim=-1) == targets).float()]
    )
    return scores.masked_fill(~logits.isfinite().all(dim=-1), torch.nan).cpu()


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """Sequences of both texts that share no passage, and how often every word is in the training text.

    The counts go up to the highest id in either text.
    """

    train: Blocks
    test: Blocks
    counts: Int[NDArray[np.int64], " words"]
    facts: dict[str, str]


def _disjoint(train: list[str], test: list[str], tokenizer: Any, context: int) -> _Texts:
    """Both texts packed; documents and sequences of the training text that repeat the test are left out."""
    of_test, of_train = set(test), set(train)
    unseen = [document for document in train if document not in of_test]
    if not unseen:
        raise ValueError(
            "task.data.train: every document of it also is in task.data.test; bring another text"
        )
    test_tokens = tokens_of(test, tokenizer, "tokenizing the test text")
    tested = np.concatenate(test_tokens)
    trained = np.concatenate(tokens_of(unseen, tokenizer, "tokenizing the training text"))
    test_blocks = _packed(tested, context, "task.data.test")
    blocks = _packed(trained, context, "task.data.train")

    in_passages, places = repeated(tested, trained)
    in_documents = np.repeat([document in of_train for document in test], [len(ids) for ids in test_tokens])
    share = float((in_passages | in_documents).mean())
    within = [*range(0, PASSAGE, context), PASSAGE - 1]  # a passage may reach over several sequences
    touched = np.unique(np.add.outer(places, within) // context)
    repeats = np.isin(np.arange(len(blocks)), touched)
    left_out = f"{len(train) - len(unseen)} documents and {repeats.sum()} sequences"
    if share:
        warnings.warn(
            f"train and test overlap: {100 * share:.2g} % of the test text also stands in the training text "
            f"(whole documents, or passages of {PASSAGE} tokens); left out of training: {left_out}",
            stacklevel=2,
        )
    return _Texts(
        train=blocks[~repeats],
        test=test_blocks,
        counts=np.bincount(trained, minlength=int(tested.max()) + 1),
        facts={
            "tokens dropped at the end of the test text": str(tested.size - test_blocks.size),
            "tokens dropped at the end of the training text": str(trained.size - blocks.size),
            "share of the test text that also stands in the training text": f"{100 * share:.2g} %",
            "left out of the training text for that": left_out,
        },
    )


def _packed(tokens: Ids, context: int, key: str) -> Blocks:
    if len(tokens) < context:
        raise ValueError(
            f"{key}: {len(tokens)} tokens found, one sequence has {context}; "
            "give it more text, or lower task.context"
        )
    return pack(tokens, context)


def _drawn(sequences: Blocks, tokens: int | None, draw: random.Random) -> Blocks:
    """So many tokens of the test text, from all over it and in its order; all for None."""
    if tokens is None:
        return sequences
    count = tokens // sequences.shape[1]
    if not 1 <= count <= len(sequences):
        raise ValueError(
            f"task.test_tokens: {tokens} asked, that is {count} sequences; task.data.test has "
            f"{len(sequences)} of {sequences.shape[1]} tokens; leave test_tokens out to use all"
        )
    return sequences[sorted(draw.sample(range(len(sequences)), count))]


def _calibration_and_train(sequences: Blocks, recipe: Recipe, settings: Settings) -> tuple[Blocks, Blocks]:
    """Two parts of the training text, in an order that follows the recipe's seed."""
    asked = recipe.calibration.samples
    if len(sequences) < asked:
        raise too_few(asked, len(sequences), f"task.data.train, sequences of {settings.context} tokens")
    order = list(range(len(sequences)))
    random.Random(recipe.seed).shuffle(order)
    rest = order[asked:]
    if settings.train_tokens is not None:
        count = settings.train_tokens // settings.context
        if not 1 <= count <= len(rest):
            raise ValueError(
                f"task.train_tokens: {settings.train_tokens} asked, that is {count} sequences; "
                f"task.data.train has {len(rest)} of {settings.context} tokens after {asked} for "
                "calibration; leave train_tokens out to use all"
            )
        rest = rest[:count]
    if not rest and "qat" in recipe.rungs:
        raise ValueError(
            f"task.data.train: no sequences left to train on after {asked} for calibration; "
            "lower calibration.samples, or take qat out of rungs"
        )
    return sequences[order[:asked]], sequences[rest]


def _batches(sequences: Blocks, size: int) -> list[Batch]:
    """Without an attention mask, as nothing is padded; the labels are what transformers shifts itself."""
    return [{"input_ids": ids, "labels": ids} for ids in torch.from_numpy(sequences).split(size) if len(ids)]


def _slices(
    sequences: Blocks, counts: Int[NDArray[np.int64], " words"], *, every_decile: bool
) -> dict[str, Bool[NDArray[np.bool_], " tokens"]]:
    count, context = sequences.shape
    tenth = deciles(sequences[:, 1:].ravel(), counts)
    late = np.tile(4 * np.arange(1, context) >= 3 * context, count)
    found = {"rare-tokens": tenth == 0, "long-context": late}
    if every_decile:
        found |= {f"decile-{index + 1}": tenth == index for index in np.unique(tenth)}
    return found


def _settings(recipe: Recipe) -> Settings:
    assert recipe.task is not None
    need("the task causal-lm", "transformers", "transformers")
    return parse(Settings, recipe.task.settings, "task")
