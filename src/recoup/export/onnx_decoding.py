"""Does a file that decodes say word after word what the trained model says? Token for token, with its past.

The trained model generates in transformers: two prompts of different lengths, the shorter one padded on the
left, greedily. The engine reads the prompts and then the trained model's words, one at a time, each with the
presents of the step before, and is asked for the most likely word each time. As long as it finds the same,
that is its own generation; where it does not, it goes on with the trained model's word.

What may differ is what `answers.py` allows: three times what rounding noise does to the logits, and
once what quantizing the inputs does. Over all logits that holds for the root mean square. Another word may be
found only where it is nearer to the trained one than both can move, each as far as the logit of that place
that moves most. A past that is forgotten, misplaced or masked wrongly is far outside of both.

The folder keeps what was said, so that `verify` can ask again. Of a large vocabulary it has the logits of
all words that may be found at some place, and of every so many others for the root mean square.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recoup.engines.onnxruntime import OnnxModel
from recoup.engines.transformers import quiet
from recoup.export.answers import relative_rms, shaken
from recoup.export.parity import ParityError
from recoup.export.tracing import positional
from recoup.nn import Batch, quantization_off

PROMPT, NEW = 16, 16  # tokens at most
_RECORDED_BYTES = 2**22  # of the logits of words that are not found


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What the trained model says, and what rounding explains of an engine's difference from it.

    Args:
        ids: the prompts (samples, tokens), padded on the left.
        mask: 0 where they are.
        tokens: the words after them (samples, new).
        words: whose logits are kept: all that may be found, and every so many.
        logits: of these words at the places of the tokens (samples, new, words).
        allowed: difference of these logits (relative, RMS).
        reach: how far two logits of a place may part (samples, new).
    """

    ids: Tensor
    mask: Tensor
    tokens: Tensor
    words: Tensor
    logits: Tensor
    allowed: float
    reach: Tensor

    def agree(self, engine: OnnxModel) -> tuple[int, int]:
        """Compare the engine's words with these.

        Args:
            engine: with a file that decodes.

        Returns:
            Words that were compared, and how many of them differ, which are ties within rounding.

        Raises:
            ParityError: a word differs that is none, or the logits differ by more than rounding explains.
        """
        found = self._followed_by(engine)
        words = found.argmax(dim=-1)
        logits = torch.full_like(found, -torch.inf)  # of a word that is not kept: below all that may be found
        logits[..., self.words] = self.logits
        best, other = (logits.gather(2, of[..., None])[..., 0] for of in (self.tokens, words))
        wrong = (~(best - other <= self.reach)).T.nonzero()
        if len(wrong):
            step, sample = wrong[0].tolist()
            other, own, reach = (float(of[sample, step]) for of in (words, self.tokens, self.reach))
            raise ParityError(
                f"decoding in onnxruntime, word {step + 1} of prompt {sample + 1} is {other:.0f}, and "
                f"{own:.0f} in the trained model, whose logits for them are further apart than the "
                f"{reach:.3g} that rounding explains"
            )
        drift = relative_rms({"": self.logits}, {"": found[..., self.words]})
        if not drift <= self.allowed:
            raise ParityError(
                f"decoding in onnxruntime, the logits differ from the trained model's by {drift:.3g} "
                f"(relative, RMS); rounding explains {self.allowed:.3g}"
            )
        return words.numel(), int((words != self.tokens).sum())

    def _followed_by(self, engine: OnnxModel) -> Tensor:
        """The engine's logits at the same places, given the same words."""
        decoder = engine.decoder()
        logits = [decoder.read(self.ids, self.mask)]
        logits += [decoder.read(tokens[:, None]) for tokens in self.tokens.T[:-1]]
        return torch.stack(logits, dim=1)


def generation(model: nn.Module, example: Batch, *, new: int = NEW) -> Generation:
    """What a converted model says after the beginnings of the example's sequences.

    Args:
        model: converted.
        example: a batch that the prompts are taken of.
        new: tokens of each prompt at most; no more than the model has places for.
    """
    ids, mask = _prompts(model, example)
    tokens, logits = _generated(model, ids, mask, new)
    with quantization_off(model):
        plain = _reread(model, ids, mask, tokens)
        with shaken(model):
            shaky = _reread(model, ids, mask, tokens)
    noise, coded = (plain - shaky).abs(), (logits - plain).abs()
    reach = 2 * (3 * noise.amax(dim=-1) + coded.amax(dim=-1))
    words = _kept(tokens, logits, reach)
    logits, plain, shaky = (of[..., words] for of in (logits, plain, shaky))
    allowed = 3 * relative_rms({"": plain}, {"": shaky}) + relative_rms({"": logits}, {"": plain})
    return Generation(
        ids=ids, mask=mask, tokens=tokens, words=words, logits=logits, allowed=allowed, reach=reach
    )


def _kept(tokens: Tensor, logits: Tensor, reach: Tensor) -> Tensor:
    """The words that may be found at some place, and every so many others."""
    best = logits.gather(2, tokens[..., None])
    kept = (best - logits <= reach[..., None]).flatten(0, 1).any(dim=0)
    kept[:: max(1, -(-logits.nbytes // _RECORDED_BYTES))] = True
    return kept.nonzero()[:, 0]


def _prompts(model: nn.Module, example: Batch) -> tuple[Tensor, Tensor]:
    """Two beginnings of the example's sequences, the second half as long and padded on the left."""
    given = dict(example) if isinstance(example, Mapping) else {"input_ids": positional(example)[0]}
    ids: Tensor = given["input_ids"]
    real = given.get("attention_mask")
    rows = [row if real is None else row[real[i] > 0] for i, row in enumerate(ids)]
    length = min(PROMPT, len(rows[0]), max(1, _places(model) // 2))
    first, second = rows[0][:length], rows[-1][: max(1, length // 2)]
    padding = length - len(second)
    ids = torch.stack([first, torch.cat([first.new_zeros(padding), second])])
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return ids, mask


def _places(model: nn.Module) -> int:
    """Of the longest sequence that the model takes."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", PROMPT + NEW)


def _generated(model: nn.Module, ids: Tensor, mask: Tensor, new: int) -> tuple[Tensor, Tensor]:
    from transformers import GenerationConfig

    generating: Any = model
    own = generating.generation_config
    # Its own settings may sample, penalize repetition or stop early; `generate` adds them to what is passed.
    generating.generation_config = GenerationConfig(pad_token_id=0)
    try:
        with quiet():
            said = generating.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=min(new, _places(model) - ids.shape[1]),
                return_dict_in_generate=True,
                output_logits=True,
            )
    finally:
        generating.generation_config = own
    return said.sequences[:, ids.shape[1] :], torch.stack(said.logits, dim=1)


def _reread(model: nn.Module, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """The model's logits at the places of these words, in one pass over prompts and words."""
    places = ids.shape[1] - 1
    said = tokens[:, :-1]
    ids, mask = torch.cat([ids, said], dim=1), torch.cat([mask, torch.ones_like(said)], dim=1)
    given = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return model(**given, use_cache=False).logits[:, places:]
