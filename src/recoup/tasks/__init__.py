"""The only room that loads models and datasets: a recipe's task becomes a model, batches and `evaluate`."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from torch import nn

from recoup.schemes import Recipe
from recoup.tasks import causal_lm, custom, image_classification, sentence_embedding
from recoup.tasks.task import Batch, Task

# Recipe, where relative paths start, and whether Python files beside a model may run.
TASKS: dict[str, Callable[[Recipe, Path, bool], Task]] = {
    "causal-lm": causal_lm.load,
    "sentence-embedding": sentence_embedding.load,
    "image-classification": image_classification.load,
    "custom": lambda recipe, folder, _: custom.load(recipe, folder),
}

MODELS: dict[str, Callable[[Recipe, Path, bool], nn.Module]] = {
    "causal-lm": causal_lm.load_model,
    "sentence-embedding": sentence_embedding.load_model,
    "image-classification": image_classification.load_model,
    "custom": lambda recipe, folder, _: custom.load(recipe, folder).model,
}

__all__ = ["MODELS", "TASKS", "Batch", "Task", "load", "load_model"]


def load(recipe: Recipe, folder: Path = Path(), *, trust_remote_code: bool = False) -> Task:
    """The model, the batches and the measurement that a recipe's task names.

    Args:
        recipe: with a task.
        folder: where relative paths of the recipe start; the current working directory unless told otherwise.
        trust_remote_code: run Python files that lie beside a model whose class is not part of transformers.
            No recipe can say so, only who runs it.

    Raises:
        ValueError: no task, an unknown one, or settings, model or data that cannot be used. One line.
        OSError: a file that is not there.
        ImportError: a package of the task is not installed; the message names the pip extra.
    """
    return TASKS[_name(recipe)](recipe, folder, trust_remote_code)


def load_model(recipe: Recipe, folder: Path = Path(), *, trust_remote_code: bool = False) -> nn.Module:
    """The float model alone: all that a dry run needs. See `load`."""
    return MODELS[_name(recipe)](recipe, folder, trust_remote_code)


def _name(recipe: Recipe) -> str:
    if recipe.task is None:
        raise ValueError(
            f"the recipe has no task; write task: {{name: ...}} with one of {', '.join(TASKS)}, "
            "or call recoup.recover with a model of your own"
        )
    if "trust_remote_code" in recipe.task.settings:
        raise ValueError(
            "task.trust_remote_code: a recipe cannot trust code; read it, then give the command "
            "--trust-remote-code"
        )
    name = recipe.task.name
    if name not in TASKS:
        nearest = get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(TASKS)}"
        raise ValueError(f"task.name: no task {name!r}; {hint}")
    return name
