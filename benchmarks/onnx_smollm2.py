"""SmolLM2-135M decoding in onnxruntime: what a file with past_key_values says, next to the trained model.

    OMP_NUM_THREADS=1 python benchmarks/onnx_smollm2.py w4a16 w4a16+ w4a8-ort w4a8-ort+

Each scheme quantizes the linear layers, and with "+" behind it the tied embedding and output as w8a16, too.
Weights are calibrated by least squared error, nothing is trained. The first lines are what `export` proved.
"same" counts, of the words after a prompt, those that onnxruntime says as the converted model's `generate`
does, both greedily and each after its own words, so that whatever follows a first difference may differ.
"size" is that of the file, "weights" the bytes of its codes, scales and float tensors; "peak" the memory of
a process that reads the prompt. docs/export.md quotes it.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import recoup
from recoup.engines import onnxruntime
from recoup.export.onnx_layouts import container_bits
from recoup.nn import Codes
from recoup.tasks.assets import fetch

PROMPT = "Name three cities in Italy, and say what each of them is known for."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schemes", nargs="+")
    parser.add_argument("--words", type=int, default=32)
    options = parser.parse_args()
    folder = fetch("smollm2-135m")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": PROMPT}]
    prompt = dict(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt"))
    text = (fetch("sotu") / "train.jsonl").read_text()[:8000]
    batch = {"input_ids": tokenizer(text, return_tensors="pt")["input_ids"][:, :512].reshape(2, 256)}
    for name in options.schemes:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        recoup.ptq(model, recipe(name), [batch])
        with tempfile.TemporaryDirectory() as temporary:
            report(name, model, Path(temporary) / "out", tokenizer, prompt, options.words)


def recipe(name: str) -> recoup.Recipe:
    tables = ("model.embed_tokens", "lm_head") if name.endswith("+") else ()
    rules = [{"match": match, "scheme": "w8a16"} for match in tables]
    return recoup.Recipe.model_validate({"scheme": name.removesuffix("+"), "rules": rules})


def report(
    name: str, model: nn.Module, place: Path, tokenizer: Any, prompt: dict[str, Any], words: int
) -> None:
    start = time.perf_counter()
    parity = recoup.export(model, place, "onnx", processor=tokenizer)
    print(f"{name}: exported and proved in {time.perf_counter() - start:.0f} s\n  {parity}", flush=True)
    converted: Any = recoup.convert(copy.deepcopy(model)).eval()
    converted.generation_config = GenerationConfig(pad_token_id=0)
    said = converted.generate(**prompt, do_sample=False, max_new_tokens=words)
    trained = said[:, prompt["input_ids"].shape[1] :]
    found = onnxruntime.OnnxModel(place).generate(**prompt, max_new_tokens=words)
    size, weights = onnxruntime.size_bytes(place), stored_bytes(converted)
    peak = onnxruntime.peak_bytes(place, {"input_ids": prompt["input_ids"]})
    print(
        f"  same: {int((trained == found).sum())} of {found.numel()}; size {size / 1e6:.1f} MB, weights "
        f"{weights / 1e6:.1f} MB; peak {peak / 1e6:.0f} MB\n  {tokenizer.decode(found[0])!r}",
        flush=True,
    )


def stored_bytes(model: nn.Module) -> int:
    """Of the codes in their containers, of scales and of what is kept, each once."""
    weights = {module for module in model.modules() if isinstance(module, Codes)}
    coded = sum(
        codes.codes.numel() * container_bits(codes.spec.format.bits) // 8 + 4 * codes.scale.numel()
        for codes in weights
    )
    return coded + sum(4 * parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
