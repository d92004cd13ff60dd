"""Activation checkpointing: the same bits in less memory, and no trace of it afterwards."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recoup import calibrate, prepare, resolve, train
from recoup.train.activations import activations_recomputed
from tests.models import recipe

from .test_train import prepared, settings

WORDS = 16


def language_model(kind: str = "Llama", **fields: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        use_cache=False,
        **fields,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    prepare(model, resolve(model, recipe("w4a8", ("model.*embed*", "none"))))
    return calibrate(model, [{"input_ids": torch.arange(8)[None]}]).eval()


def llama() -> nn.Module:
    return language_model(intermediate_size=64, num_key_value_heads=2, attention_dropout=0.3)


def texts(count: int) -> list[dict[str, Tensor]]:
    drawn = [torch.randint(0, WORDS, (2, 8)) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def kept(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that the forward pass keeps for the backward pass, beside the weights."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(found.values())


@pytest.mark.parametrize("loss", ["task", "distill"])
def test_losses_and_weights_are_the_same_to_the_bit(loss: str) -> None:
    """With dropout where the loss is the task's; following a teacher, without."""
    data, found = texts(3), []
    for activation_checkpointing in (False, True):
        model, told = llama(), []
        torch.manual_seed(1)
        given = settings(loss=loss, activation_checkpointing=activation_checkpointing)
        train(model, data[1:], given, held_out=data[:1], record=told.append)
        found.append((told, model.state_dict()))
        assert not model.is_activation_checkpointing
        assert not model.training
        assert not any(module._forward_hooks for module in model.modules())
    (told, state), (told_again, state_again) = found
    assert told == told_again
    assert all(torch.equal(state[name], state_again[name]) for name in state)


@pytest.mark.parametrize("training", [True, False])
def test_less_is_kept_and_the_gradients_are_the_same(training: bool) -> None:
    model, batch = llama().train(training), texts(1)[0]
    gradients, sizes = [], []
    for recomputed in (False, True):
        torch.manual_seed(2)
        with activations_recomputed(model) if recomputed else torch.enable_grad():
            sizes.append(kept(model, batch))
            torch.manual_seed(2)
            model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert sizes[1] < sizes[0] / 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(module.training == training for module in model.modules())


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(
        ValueError, match="activation_checkpointing: Small has no layers that transformers can"
    ):
        train(prepared(), [{"x": torch.randn(2, 32)}], settings(activation_checkpointing=True))


def test_a_layer_that_drops_by_itself_is_refused_where_a_teacher_is_followed() -> None:
    fields = {"ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 16, "dropout": 0.1}
    model = language_model("OPT", **fields)
    with pytest.raises(
        ValueError, match=r"OPTDecoderLayer would drop activations \(dropout\) while it follows"
    ):
        train(model, texts(2), settings(activation_checkpointing=True))
    assert not model.is_activation_checkpointing
    train(model, texts(2), settings(steps=1, loss="task", activation_checkpointing=True))
