"""The stock Trainer trains a prepared model, and goes on from its own checkpoints to the same bits."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import recoup
from recoup.nn import FakeQuantizer
from tests.models import recipe

WORDS = 16


def language_model(tied: bool = False) -> nn.Module:
    """A Llama, not prepared."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_dropout=0.2,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


BOTH = (("lm_head", "w4a16"), ("model.embed_tokens", "w4a16"))


def prepared(tied: bool = False, rules: tuple[tuple[str, str], ...] = (), **fields: Any) -> nn.Module:
    model = language_model(tied)
    given = recipe("w4a8", *rules, **({"weight_ranges": "learned"} | fields))
    recoup.prepare(model, recoup.resolve(model, given))
    return recoup.calibrate(model, [{"input_ids": torch.arange(8)[None]}])


def rows(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, WORDS, (count, 8), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def trainer(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **fields: Any) -> Trainer:
    arguments = TrainingArguments(
        **(
            {
                "output_dir": str(folder),
                "use_cpu": True,
                "max_steps": 6,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "save_steps": 2,
                "report_to": "none",
                "disable_tqdm": True,
                "logging_strategy": "no",
                "seed": 3,
            }
            | fields
        )
    )
    return Trainer(
        model=model, args=arguments, train_dataset=rows(16), eval_dataset=rows(4), callbacks=list(callbacks)
    )


class StopError(Exception):
    pass


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise StopError


@pytest.mark.parametrize(
    ("tied", "rules"), [(False, ()), (True, ()), (True, BOTH)], ids=["untied", "tied", "tied and quantized"]
)
def test_it_goes_on_from_a_checkpoint_to_the_same_bits(tied: bool, rules: Any, tmp_path: Path) -> None:
    callback = recoup.hf.QATCallback(start_step=1)
    whole = prepared(tied, rules)
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    trainer(whole, tmp_path / "whole", callback).train()
    with pytest.raises(StopError):
        trainer(prepared(tied, rules), tmp_path / "stopped", callback, StopAt(5)).train()
    resumed = prepared(tied, rules)
    trainer(resumed, tmp_path / "stopped", callback).train(resume_from_checkpoint=True)
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    moved = set()
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        moved |= {name.rpartition(".")[2]} if not torch.equal(start[name], value) else set()
    assert {"weight", "scale"} <= moved
    assert (resumed.lm_head.weight is resumed.model.embed_tokens.weight) == tied


def switches(model: nn.Module) -> list[tuple[bool, bool]]:
    """(training, quantization on) of every forward pass."""
    found: list[tuple[bool, bool]] = []
    quantizer = next(module for module in model.modules() if isinstance(module, FakeQuantizer))
    quantizer.register_forward_pre_hook(lambda module, _: found.append((model.training, module.enabled)))
    return found


def test_quantization_starts_at_its_step_and_is_on_in_every_evaluation(tmp_path: Path) -> None:
    model = prepared()
    found = switches(model)
    fields = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True,
              "gradient_accumulation_steps": 2, "save_strategy": "no"}  # fmt: skip
    trainer(model, tmp_path, recoup.hf.QATCallback(start_step=2), **fields).train()
    assert [on for training, on in found if training] == [False, False, False, False, True, True]
    evaluations = [on for training, on in found if not training]
    assert len(evaluations) == 4
    assert all(evaluations)
    assert all(m.enabled for m in model.modules() if isinstance(m, FakeQuantizer))


def test_a_saved_model_loads_into_a_prepared_one(tmp_path: Path) -> None:
    model = prepared(tied=True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FakeQuantizer) and isinstance(module.scale, nn.Parameter):
                module.scale *= 1.5
    model.save_pretrained(tmp_path)
    other = prepared(tied=True)
    missing, unexpected = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # the same tensor as the embedding
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


class Forgetful(Trainer):
    """Its optimizer was made before `prepare`."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.SGD([self.model.lm_head.weight], lr=0.1)
        return self.optimizer


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    model = language_model()
    uncalibrated = recoup.prepare(model, recoup.resolve(model, "w8a8-static"))
    for wrong, callback, message in (
        (language_model(), {}, "the model is not prepared; run recoup.prepare first"),
        (uncalibrated, {}, "its range is not known; run recoup.calibrate"),
        (prepared(weight_ranges=None).bfloat16(), {}, "more parameters are not float32"),
        (prepared(), {"start_step": 6}, "start_step: 6 leaves none of 6 steps to train under quantization"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(wrong, tmp_path, recoup.hf.QATCallback(**callback)).train()
    with pytest.raises(ValueError, match="start_step: -1 given; it is 0 or more"):
        recoup.hf.QATCallback(start_step=-1)


def test_an_optimizer_without_the_scales_is_refused(tmp_path: Path) -> None:
    stock = trainer(prepared(), tmp_path)
    forgetful = Forgetful(
        model=stock.model, args=stock.args, train_dataset=rows(4), callbacks=[recoup.hf.QATCallback()]
    )
    with pytest.raises(ValueError, match=r"learned scales are in no group of the optimizer; make it from"):
        forgetful.train()


class SwitchOff(TrainerCallback):
    """Somebody's else, which measures the float model and forgets to switch back."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight_quantizer.enabled = False
        model.model.layers[0].self_attn.train = lambda mode=True: None
        model.model.layers[0].self_attn.training = True


def test_symptoms_are_logged_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = recoup.hf.QATCallback()
    fields = {"max_steps": 2, "learning_rate": 1e-12, "eval_strategy": "steps", "eval_steps": 2,
              "save_strategy": "no"}  # fmt: skip
    trainer(prepared(), tmp_path, callback, SwitchOff(), **fields).train()
    found = {(s.module, s.what): (s.first, s.last) for s in callback.symptoms}
    assert found == {
        ("all weights", "nothing changes"): (1, 2),
        ("model.layers.0.mlp.up_proj.weight", "quantizer off"): (2, 2),
        ("model.layers.0.self_attn", "training mode"): (2, 2),
    }
    lines = [record.getMessage() for record in caplog.records if record.name == "recoup"]
    assert len(lines) == 3
    assert lines[0].startswith("step 1: all weights: nothing changes: ")


def test_a_healthy_training_shows_no_symptom(tmp_path: Path) -> None:
    callback = recoup.hf.QATCallback()
    assert callback.symptoms == []
    fields = {"max_steps": 2, "learning_rate": 1e-4, "eval_strategy": "epoch", "save_strategy": "no"}
    trainer(prepared(weight_ranges=None), tmp_path, callback, **fields).train()
    assert callback.symptoms == []


def test_the_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "runs.md"
    (program,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(program, str(page), "exec"), {"__name__": "__main__"})
    assert (tmp_path / "checkpoints" / "checkpoint-6" / "model.safetensors").is_file()
