"""Word after word in onnxruntime: what was read stays in its memory as keys and values.

A file that decodes takes `past_key_values.*` and answers `present.*`, which are longer by what was read; with
pasts of length 0 it reads a prompt. A `Decoder` hands each present back as the next past, without a copy.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

PAST, PRESENT = "past_key_values.", "present."
Array = np.ndarray[Any, np.dtype[Any]]


def presents_of(session: Any) -> dict[str, str]:
    """The outputs that are inputs of the next step, by the input's name; none if the file does not decode.

    Args:
        session: of onnxruntime.
    """
    outputs = {value.name for value in session.get_outputs()}
    pairs = {
        value.name: PRESENT + value.name.removeprefix(PAST)
        for value in session.get_inputs()
        if value.name.startswith(PAST)
    }
    return {past: present for past, present in pairs.items() if present in outputs}


def empty_pasts(session: Any, samples: int) -> dict[str, Array]:
    """Keys and values of nothing."""
    return {
        value.name: np.zeros((samples, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith(PAST)
    }


def whole(ids: Tensor) -> dict[str, Tensor]:
    """What a model assumes of a sequence that it reads from the beginning, without padding."""
    return {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}


class Decoder:
    """A batch of sequences under way.

    Args:
        session: of a file that decodes.
        presents: of `presents_of`.
    """

    def __init__(self, session: Any, presents: Mapping[str, str]) -> None:
        self.session, self.presents = session, presents
        self.given = {value.name for value in session.get_inputs()} - set(presents)
        self.mask, self.pasts = torch.empty(0, dtype=torch.int64), dict[str, Any]()

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read on, and say what may follow.

        Args:
            input_ids: the next tokens (samples, tokens).
            attention_mask: 0 where these are padding, which is on the left of a prompt.

        Returns:
            Logits of the word after the last (samples, words).
        """
        from onnxruntime import OrtValue

        samples = len(input_ids)
        if not self.pasts:
            self.mask = torch.empty(samples, 0, dtype=torch.int64)
            empty = empty_pasts(self.session, samples)
            self.pasts = {name: OrtValue.ortvalue_from_numpy(value) for name, value in empty.items()}
        new = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64)
        self.mask = torch.cat([self.mask, new], dim=1)
        # As transformers counts: padding is at place 0, and takes none.
        places = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        named = {"input_ids": input_ids, "attention_mask": self.mask, "position_ids": places}
        feeds = {
            name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(named[name].numpy()))
            for name in self.given
        }
        names = ["logits", *self.presents.values()]
        logits, *presents = self.session.run_with_ort_values(names, feeds | self.pasts)
        self.pasts = dict(zip(self.presents, presents, strict=True))
        return torch.from_numpy(logits.numpy()[:, -1])
