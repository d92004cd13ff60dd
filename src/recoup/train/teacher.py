"""What a student follows: a float model that is asked at every step, or its answers on disk.

A teacher in memory costs as much as a model and a forward pass a step. With `teacher_logits: k` it is asked
once for every batch, before the first step; its k most likely classes at every place are kept, and it goes.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recoup.nn import Batch, FakeQuantizer, call, evaluating, moved
from recoup.progress import progress
from recoup.schemes.training import TrainSettings
from recoup.train.fingerprint import fingerprint
from recoup.train.losses import logits_of
from recoup.train.snapshot import DamagedError, clear_unfinished, read_snapshot, write_snapshot
from recoup.train.top_logits import TopLogits

Teacher = Callable[[Batch], Any]


def float_copy(model: nn.Module) -> nn.Module:
    """A prepared model's float self, as a model of its own. What is frozen is shared."""
    frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    teacher = copy.deepcopy(model, frozen)
    for module in teacher.modules():
        if isinstance(module, FakeQuantizer):
            module.enabled = False
    return teacher


def in_memory(model: nn.Module, device: torch.device) -> Teacher:
    """A model that is asked at every step."""
    return partial(call, model.to(device).eval())


def on_disk(
    model: nn.Module,
    batches: Sequence[Sequence[Batch]],
    settings: TrainSettings,
    folder: Path,
    identity: Mapping[str, Any],
    accelerator: Any,
) -> Teacher:
    """A model's answers to these batches, each asked for once and read from the disk from then on.

    What is there already is taken, so that an interrupted asking goes on. The processes of a training share
    the work, and the folder.

    Args:
        model: the teacher; nobody needs it afterwards.
        batches: all that will be asked about; they are known again by their values.
        settings: `teacher_logits`, temperature and precision.
        folder: of the answers.
        identity: of the training; the answers follow from a part of it.
        accelerator: knows the device and the processes.

    Raises:
        ValueError: the model returns no logits, or the answers in the folder are another teacher's.
        OSError: an answer cannot be written.
    """
    k, device = settings.teacher_logits, accelerator.device
    assert k is not None, "answers on disk are asked for"
    said = {"teacher": identity["teacher"] or identity["model"]}
    said |= {name: identity["settings"][name] for name in ("teacher_logits", "temperature", "precision")}
    clear_unfinished(folder)
    accelerator.wait_for_everyone()
    asked = {fingerprint(part[index]): (part, index) for part in batches for index in range(len(part))}
    mine = sorted(asked)[accelerator.process_index :: accelerator.num_processes]
    missing = [name for name in mine if not _is_whole(folder / name, said)]
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    with (
        evaluating(model.to(device)),
        torch.no_grad(),
        bf16,
        progress("teacher", len(missing), shown=accelerator.is_main_process) as bar,
    ):
        for name in missing:
            part, index = asked[name]
            logits = logits_of(call(model, moved(part[index], device)))
            answer = TopLogits.of(logits, k, settings.temperature)
            write_snapshot(folder / name, {"answer": vars(answer)}, {"identity": said})
            bar("teacher")
    accelerator.wait_for_everyone()

    def answer_to(batch: Batch) -> TopLogits:
        parts, _ = read_snapshot(folder / fingerprint(batch))
        return TopLogits(**{name: tensor.to(device) for name, tensor in parts["answer"].items()})

    return answer_to


def _is_whole(path: Path, said: Mapping[str, Any]) -> bool:
    """An answer is there and undamaged.

    Raises:
        ValueError: it is one of another teacher.
    """
    try:
        _, facts = read_snapshot(path)
    except DamagedError:
        return False
    other = [name for name, mine in said.items() if facts["identity"].get(name) != mine]
    if other:
        raise ValueError(
            f"{path.parent}: holds the answers of a teacher with other {', '.join(other)}; go on with that "
            "one, or choose another folder, or remove it"
        )
    return True
