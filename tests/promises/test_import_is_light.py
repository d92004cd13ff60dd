"""`import recoup` is quick: whatever is heavy is imported by the one function that needs it."""

import subprocess
import sys

HEAVY = (
    "transformers",
    "accelerate",
    "compressed_tensors",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "gguf",
    "xllamacpp",
    "scipy",
    "sklearn",
    "matplotlib",
)
LOADED = "import sys, recoup; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def test_import_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = set(done.stdout.split())
    assert {"recoup", "torch"} <= loaded
    assert not loaded & set(HEAVY)
