"""Is a file of ONNX's own operators what was trained, valid, and placed as TensorRT fuses it?"""

from dataclasses import replace
from pathlib import Path

import onnx
import torch

from recoup.engines.onnx_standard import StandardOnnx
from recoup.export.onnx import FILE
from recoup.export.onnx_parity import compared
from recoup.export.onnx_placement import violations
from recoup.export.parity import Parity, ParityError
from recoup.export.trained import Trained


@torch.no_grad()
def compare(trained: Trained, folder: Path) -> Parity:
    """Compare folder/model.onnx with what was trained.

    `onnx.checker` finds it valid, with shapes; for the rest see `onnx_parity.compare`, with the operators
    computed as they are defined (`StandardOnnx`). Which nodes TensorRT would not fuse is no error: they are
    named in `falls_back`, each with the rule (`onnx_placement.RULES`).

    Raises:
        ParityError: one of these does not hold; names it.
    """
    try:
        onnx.checker.check_model(folder / FILE, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ParityError(f"the file is no valid ONNX: {str(error).splitlines()[0]}") from None
    engine = StandardOnnx(folder).engine
    found = compared(trained, folder, StandardOnnx, engine)
    return replace(found, engine=engine, falls_back=violations(onnx.load(folder / FILE)))
