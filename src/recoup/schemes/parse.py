"""One readable line for whatever is wrong in data that a user wrote."""

import dataclasses
from collections import Counter
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from recoup.numerics import ElementFormat, PowerOfTwo

Model = TypeVar("Model", bound=BaseModel)
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # of a model, and of a dataclass
_FORMATS = {kind.__name__ for kind in (*get_args(ElementFormat), PowerOfTwo)}  # as pydantic calls a choice


class Section(BaseModel):
    """What every section of a recipe is: frozen, finite, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


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
    first = min(_of_one_member(error.errors()), key=lambda found: found["type"] not in _UNKNOWN)
    path = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "is-instance"))]
    place = ".".join(part for part in path if part not in _FORMATS) or "as a whole"
    if first["type"] in _UNKNOWN:
        legal = _keys_at(model, path[:-1])
        nearest = get_close_matches(path[-1], legal, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(legal)}"
        return f"{place}: unknown key; {hint}"
    if first["type"] == "missing":
        return f"{place}: missing"
    message = first["msg"].removeprefix("Value error, ")
    if message.split()[0].istitle():  # a word, not a name as IntFormat
        message = message[0].lower() + message[1:]
    return (
        f"{place}: {message}, found {first['input']!r}"
        if first["type"] != "value_error"
        else f"{place}: {message}"
    )


def _of_one_member(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Of a choice between types, as of formats, what is wrong with the type that fits best."""

    def member(found: ErrorDetails) -> str:
        return next((str(part) for part in found["loc"] if part in _FORMATS), "")

    wrong = Counter(member(found) for found in errors)
    best = min(filter(None, wrong), key=lambda name: wrong[name], default="")
    return [found for found in errors if member(found) in ("", best)]


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The legal keys of the section that `path` leads to."""
    kinds: list[type] = [model]
    for part in path:
        named = [kind for kind in kinds if kind.__name__ == part]
        fields = _fields(kinds[0])
        if named:
            kinds = named
        elif part in fields:  # else an index of a list
            kinds = _kinds_in(fields[part]) or kinds
    return list(_fields(kinds[0]))


def _fields(kind: type) -> dict[str, Any]:
    if issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _kinds_in(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation)):
        return [annotation]
    return [kind for argument in getattr(annotation, "__args__", ()) for kind in _kinds_in(argument)]
