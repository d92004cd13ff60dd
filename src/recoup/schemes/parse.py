"""One readable line for whatever is wrong in data that a user wrote."""

from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], data: Any, where: str) -> Model:
    """`data` as a `model`.

    Args:
        model: what it should be.
        data: what the user wrote, as read from YAML.
        where: how to call the place in messages: the path of the file, or of the section.

    Raises:
        ValueError: one line, with the path of the key, what stands there and the nearest legal spelling.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected keys and values, found {type(data).__name__}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(model, error)}") from None


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """The first thing that is wrong, in one line; a misspelt key before the key that is missing for it."""
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "is-instance"))]
    place = ".".join(path) or "as a whole"
    if first["type"] == "extra_forbidden":
        legal = _keys_at(model, path[:-1])
        nearest = get_close_matches(path[-1], legal, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(legal)}"
        return f"{place}: unknown key; {hint}"
    if first["type"] == "missing":
        return f"{place}: missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return (
        f"{place}: {message}, found {first['input']!r}"
        if first["type"] != "value_error"
        else f"{place}: {message}"
    )


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The legal keys of the section that `path` leads to."""
    for part in path:
        if part not in model.model_fields:
            continue  # an index of a list
        inner = _model_in(model.model_fields[part].annotation)
        if inner is not None:
            model = inner
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((model for model in found if model is not None), None)
