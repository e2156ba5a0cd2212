"""Writes tests/golden/adamw.npz: 50 steps of torch's AdamW. Run with the oracle's Python.

.oracle/bin/python scripts/make_optimizer_goldens.py
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/oracle"))

from adamw import run  # noqa: E402

SETTINGS = {
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "warmup_steps": 5,
    "total_steps": 50,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 0.3,
}


def main() -> None:
    rng = np.random.default_rng(0)
    start = {"lora_a": rng.normal(size=(5, 3)).astype("f4"), "lora_b": np.zeros((3, 2), "f4")}
    # Norms on both sides of max_grad_norm, so that some steps clip and some don't.
    scale = rng.uniform(0.01, 0.3, size=(SETTINGS["total_steps"], 1, 1))
    gradients = {n: (scale * rng.normal(size=(len(scale), *v.shape))).astype("f4") for n, v in start.items()}
    result = run(SETTINGS, start, gradients)
    arrays = {f"{n}_start": v for n, v in start.items()} | {f"{n}_gradients": v for n, v in gradients.items()}
    np.savez_compressed(ROOT / "tests/golden/adamw.npz", settings=json.dumps(SETTINGS), **arrays, **result)


if __name__ == "__main__":
    main()
