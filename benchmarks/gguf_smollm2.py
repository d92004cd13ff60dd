"""SmolLM2-135M in llama.cpp: what a GGUF file says and costs next to the model that it was written from.

    OMP_NUM_THREADS=1 python benchmarks/gguf_smollm2.py q8_0 q4_0

Each scheme quantizes the linear layers, and with "+" behind it (q4_0+) the tied embedding as q8_0 as well.
Weights are calibrated by least squared error. "perplexity" is over sequences of State-of-the-Union addresses
since 2014: of the float model and the fake-quantized one in torch, and of the file in llama.cpp with its
default settings. "nats" is the mean Kullback-Leibler divergence of llama.cpp's next word from the
fake-quantized model's, "same" the share of places where both find the same word most likely. "time" is that
of reading the sequences in llama.cpp, over the float file's, interleaved medians. docs/export.md quotes it.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import recoup
from recoup.engines import llama_cpp
from recoup.export import TARGETS
from recoup.tasks.assets import fetch

PROMPT = "Name three cities in Italy."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schemes", nargs="+")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    folder = fetch("smollm2-135m")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = sequences(tokenizer, options.sequences, options.tokens)
    float_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as temporary:
        places = {"float": Path(temporary) / "float"}
        places["float"].mkdir()
        TARGETS["gguf"].write(float_model, places["float"], {"input_ids": ids})
        print(f"float32 in torch: perplexity {perplexity(logits_of(float_model, ids), ids):.3f}", flush=True)
        for name in options.schemes:
            places[name] = Path(temporary) / name
            quality(copy.deepcopy(float_model), name, places[name], tokenizer, ids)
        speed(places, ids, options.runs)


def sequences(tokenizer: Any, count: int, length: int) -> Tensor:
    """From the test text, one after the other."""
    lines = (fetch("sotu") / "test.jsonl").read_text().splitlines()
    tokens: list[int] = []
    for line in lines:
        if len(tokens) < count * length:
            tokens += tokenizer(json.loads(line)["text"])["input_ids"]
    return torch.tensor(tokens[: count * length]).reshape(count, length)


def quality(model: nn.Module, name: str, place: Path, tokenizer: Any, ids: Tensor) -> None:
    rules: list[dict[str, Any]] = []
    if name.endswith("+"):
        rules = [{"match": "model.embed_tokens", "scheme": "q8_0a16"}, {"match": "lm_head", "scheme": "q8_0"}]
    recipe = recoup.Recipe.model_validate({"scheme": name.removesuffix("+"), "rules": rules})
    recoup.ptq(model, recipe, [{"input_ids": ids[:1]}])
    start = time.perf_counter()
    parity = recoup.export(model, place, "gguf", processor=tokenizer)
    print(f"\n{name}: exported and proved in {time.perf_counter() - start:.0f} s\n  {parity}", flush=True)
    trained = logits_of(model, ids)
    found = TARGETS["gguf"].load(place)(ids).logits
    p, q = trained.log_softmax(dim=-1), found.log_softmax(dim=-1)
    nats = float((p.exp() * (p - q)).sum(dim=-1).mean())
    same = float((p.argmax(dim=-1) == q.argmax(dim=-1)).float().mean())
    print(
        f"  {llama_cpp.size_bytes(place) / 1e6:.1f} MB; perplexity {perplexity(trained, ids):.3f} in torch, "
        f"{perplexity(found, ids):.3f} in llama.cpp; {nats:.2e} nats, {same:.1%} same",
        flush=True,
    )
    print(f"  {PROMPT!r} -> {answer(place)!r}", flush=True)


def answer(place: Path, words: int = 40) -> str:
    """Greedy, in the chat template, by llama.cpp's server with its own tokenizer."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = str(place / llama_cpp.FILE), 512, 1
    server = xllamacpp.Server(params)
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": words, "temperature": 0}
    return server.handle_chat_completions(chat)["choices"][0]["message"]["content"]


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.cat([model(input_ids=row[None], use_cache=False).logits for row in ids])


def perplexity(logits: Tensor, ids: Tensor) -> float:
    flat = logits[:, :-1].flatten(0, 1)
    return float(nn.functional.cross_entropy(flat, ids[:, 1:].flatten()).exp())


def speed(places: dict[str, Path], ids: Tensor, runs: int) -> None:
    models = {name: llama_cpp.Prompts(place) for name, place in places.items()}
    seconds: dict[str, list[float]] = {name: [] for name in places}
    for run in range(runs + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids)
            if run:
                seconds[name].append(time.perf_counter() - start)
    base = median(seconds["float"])
    print("\ntime over the float file's, tokens a second:")
    for name, values in seconds.items():
        print(f"  {name}: {median(values) / base:.2f}, {ids.numel() / median(values):.0f}")


if __name__ == "__main__":
    main()
