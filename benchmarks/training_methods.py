"""Methods of QAT at equal steps: the small residual network of `batch_norm.py`, at 2 bits per channel.

    OMP_NUM_THREADS=1 python benchmarks/training_methods.py

Every method trains from the same calibrated network, on the same batches in the same order. Counted is the
accuracy on 4,000 test images.
"""

from typing import Any

from batch_norm import begun, trained

SEEDS = 3
METHODS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic"},
    "progressive": {"progressive": [8, 4]},
    "dampening": {"dampening": 1e-3},
}


def main() -> None:
    model, batches, test = begun()
    print(f"| method | {' | '.join(f'seed {seed}' for seed in range(SEEDS))} | mean |")
    print("|---|" + "--:|" * (SEEDS + 1))
    for name, method in METHODS.items():
        found = [trained(model, batches, test, seed, loss="logits-kl", **method) for seed in range(SEEDS)]
        mean = sum(found) / SEEDS
        print(f"| {name} | {' | '.join(f'{one:.4f}' for one in found)} | {mean:.4f} |", flush=True)


if __name__ == "__main__":
    main()
