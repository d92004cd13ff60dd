"""Methods of QAT at equal steps: the small residual network of `batch_norm.py`, at 2 bits per channel.

    OMP_NUM_THREADS=1 python benchmarks/training_methods.py

Every method trains from the same calibrated network, on the same batches in the same order. Counted is the
accuracy on 4,000 test images.
"""

import torch
from batch_norm import BATCH, HELD_OUT, QAT, accuracy, images, prepared, trained_in_float

import recoup

SEEDS = 3
METHODS = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic"},
    "progressive": {"progressive": [8, 4]},
    "dampening": {"dampening": 1e-3},
}


def main() -> None:
    x, labels = images("train", 16_000, seed=0)
    pairs = zip(x.split(BATCH), labels.split(BATCH), strict=True)
    batches = [{"x": x, "labels": labels} for x, labels in pairs]
    test = images("test", 4_000, seed=1)
    model = trained_in_float(batches)
    calibrated = accuracy(prepared(model, batches), test)
    print(f"float {accuracy(model, test):.4f}, calibrated {calibrated:.4f}\n")
    print(f"| method | {' | '.join(f'seed {seed}' for seed in range(SEEDS))} | mean |")
    print("|---|" + "--:|" * (SEEDS + 1))
    for name, method in METHODS.items():
        found: list[float] = []
        for seed in range(SEEDS):
            candidate = prepared(model, batches)
            torch.manual_seed(seed)
            order = torch.randperm(len(batches) - HELD_OUT).tolist()
            settings = recoup.TrainSettings.model_validate(QAT | {"loss": "logits-kl"} | method)
            chosen = [batches[HELD_OUT:][i] for i in order]
            recoup.train(candidate, chosen, settings, held_out=batches[:HELD_OUT])
            found.append(accuracy(candidate, test))
        mean = sum(found) / SEEDS
        print(f"| {name} | {' | '.join(f'{one:.4f}' for one in found)} | {mean:.4f} |", flush=True)


if __name__ == "__main__":
    main()
