"""What an engine returns: tensors under the names that the model gave them."""

from typing import Any

from torch import Tensor


class Outputs(dict[str, Tensor]):
    """Named outputs, also by attribute and by position, as transformers' models return them."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; there are {', '.join(self)}") from None

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]
