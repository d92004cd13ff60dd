"""Folders that other tools wrote from one small model, and some of the weights that each says they hold.

The scripts here wrote them, each in an environment of its own, with these versions.
"""

VERSIONS = {
    "llm-compressor": "0.14.0.1, compressed-tensors 0.19.0, transformers 5.17.0, torch 2.13.0",
    "auto-round": "0.15.1, transformers 5.17.0, torch 2.13.0",
    "gptqmodel": "7.6.0, transformers 5.24.0, torch 2.13.0",
    "modelopt": "0.47.0, transformers 5.14.1, torch 2.13.0",
}
