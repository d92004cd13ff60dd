"""SmolLM2-135M with its keys and values in E4M3: what that costs, alone and beside quantized weights.

    OMP_NUM_THREADS=1 python benchmarks/kv_cache_smollm2.py w8a16 fp8

"perplexity" is over sequences of State-of-the-Union addresses since 2014, in torch. Scales of keys and values
are those of the extrema over one other sequence. "nats" is the mean Kullback-Leibler divergence of the next
word from the same model with float keys and values. The last line of a scheme is the proof of the exported
folder, as transformers runs it. docs/export.md quotes it.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf_smollm2 import logits_of, perplexity, sequences
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import recoup
from recoup.nn import FakeQuantizer, cache_quantizers
from recoup.tasks.assets import fetch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schemes", nargs="+")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    folder = fetch("smollm2-135m")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = sequences(tokenizer, options.sequences + 1, options.tokens)
    calibration, ids = ids[-1:], ids[:-1]
    float_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain = logits_of(float_model, ids)
    print(f"float32: perplexity {perplexity(plain, ids):.3f}", flush=True)
    for name in options.schemes:
        recipe = recoup.Recipe.model_validate({"scheme": name, "kv": "fp8"})
        model = copy.deepcopy(float_model)
        recoup.ptq(model, recipe, [{"input_ids": calibration}], observer="minmax")
        switch(model, caches=False, others=True)
        weights = logits_of(model, ids)
        switch(model, caches=True, others=False)
        report("float weights, keys and values in fp8", logits_of(model, ids), plain, ids)
        switch(model, caches=True, others=True)
        print(f"{name}: perplexity {perplexity(weights, ids):.3f}", flush=True)
        report(f"{name}, keys and values in fp8", logits_of(model, ids), weights, ids)
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary) / "out"
            print(recoup.export(model, place, "compressed-tensors", processor=tokenizer), flush=True)


def switch(model: nn.Module, *, caches: bool, others: bool) -> None:
    kept = {quantizer for pair in cache_quantizers(model).values() for quantizer in pair}
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.enabled = caches if module in kept else others


def report(what: str, found: Tensor, reference: Tensor, ids: Tensor) -> None:
    p, q = reference.log_softmax(dim=-1), found.log_softmax(dim=-1)
    nats = float((p.exp() * (p - q)).sum(dim=-1).mean())
    same = float((p.argmax(dim=-1) == q.argmax(dim=-1)).float().mean())
    print(
        f"{what}: perplexity {perplexity(found, ids):.3f}, {nats:.2e} nats, {same:.1%} same words", flush=True
    )


if __name__ == "__main__":
    main()
