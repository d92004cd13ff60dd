"""safetensors files, whose errors get the path of the file.

The library checks a file's header against its size, and every tensor's shape, type and place, before it makes
anything; what it says of a file that is wrong does not name the file.
"""

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


def _damaged(file: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"{file}: no whole safetensors file ({reason}); write or fetch it again "
        "(a git-lfs pointer needs `git lfs pull`)"
    )
