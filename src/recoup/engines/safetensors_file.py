"""safetensors files, whose errors get the path of the file.

The library checks a file's header against its size, and every tensor's shape, type and place, before it makes
anything; what it says of a file that is wrong does not name the file.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


def check_safetensors(folder: Path) -> None:
    """Every safetensors file of a folder is whole; looks at the headers alone.

    Raises:
        ValueError: one is not; names it.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, ValueError) as error:
            raise _damaged(file, error) from None


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises:
        ValueError: the file is not whole; names it.
        OSError: it cannot be read.
    """
    try:
        return load_file(file)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(file, error) from None


class Shards(Mapping[str, Tensor]):
    """The tensors of all safetensors files of a folder by name, each read when it is asked for.

    Raises:
        ValueError: a file is not whole, or two of them have a tensor of one name; names it.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, folder: Path) -> None:
        check_safetensors(folder)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder}: no safetensors file; expected the weights of a model")
        self._files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    if name in self._files:
                        raise ValueError(f"{file}: {name} is in {self._files[name].name}, too; remove one")
                    self._files[name] = file

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _damaged(file: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"{file}: no whole safetensors file ({reason}); write or fetch it again "
        "(a git-lfs pointer needs `git lfs pull`)"
    )
