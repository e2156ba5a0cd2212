"""Writes golden files of optimizers: adamw.npz and optimizers_8bit.npz in tests/golden.

adamw.npz has 50 steps of torch's AdamW, optimizers_8bit.npz 8 steps of bitsandbytes' AdamW8bit and Lion8bit.

    .oracle/bin/python tests/golden/make_optimizers.py
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/oracle"))

import adamw  # noqa: E402
import bnb_optimizer  # noqa: E402
import torch  # noqa: E402
from bitsandbytes import functional as bnb  # noqa: E402

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

OPTIONS = {"AdamW8bit": {"betas": (0.9, 0.999), "eps": 1e-8}, "Lion8bit": {"betas": (0.9, 0.99)}}
SHAPES = {"large": (60, 77), "small": (30, 20)}  # 18 whole blocks of 256 and a part of one; below 4,096 elements
RATES = [float(np.float32(1e-3 * factor)) for factor in (0, 0.25, 0.5, 0.75, 1, 1, 1, 1)]


def eight_bit(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns parameters and states of two tensors after the last step of each optimizer, and the unsigned look-up."""
    start = {name: rng.normal(scale=1e-2, size=shape).astype("f4") for name, shape in SHAPES.items()}
    start["large"][:10] = 0
    scales = 10.0 ** rng.uniform(-6, 0, (len(RATES), 1, 1))
    # f16 takes half the space and is exact in f32.
    drawn = {n: (scales * rng.normal(size=(len(RATES), *shape)) ** 3).astype("f2") for n, shape in SHAPES.items()}
    drawn["large"][:, :4] = 0
    gradients = {name: value.astype("f4") for name, value in drawn.items()}
    arrays = {f"{n}.start": v for n, v in start.items()} | {f"{n}.gradients": v for n, v in drawn.items()}
    for kind, options in OPTIONS.items():
        settings = {"class": kind, "options": options | {"weight_decay": 0.1}, "rates": RATES}
        for name, value in bnb_optimizer.run(settings, start, gradients).items():
            arrays[f"{kind}.{name}"] = value[-1] if name in SHAPES else value
    return arrays | {"look_up.unsigned": unsigned_look_up()}


def unsigned_look_up() -> np.ndarray:
    """Returns uint8[65536]: the codes of 65,536 even steps from -1 to 1."""
    steps = 2 * np.arange(2**16, dtype="f4") / np.float32(2**16 - 1) - 1
    code = bnb.create_dynamic_map(signed=False)
    codes, _ = torch.ops.bitsandbytes.quantize_blockwise(torch.tensor(steps, dtype=torch.float32), code, 2**16)
    return codes.numpy()


def main() -> None:
    """Writes both golden files."""
    torch_goldens()
    made = eight_bit(np.random.default_rng(1))
    np.savez_compressed(ROOT / "tests/golden/optimizers_8bit.npz", settings=json.dumps({"rates": RATES}), **made)


def torch_goldens() -> None:
    """Writes 50 steps of AdamW."""
    rng = np.random.default_rng(0)
    start = {"lora_a": rng.normal(size=(5, 3)).astype("f4"), "lora_b": np.zeros((3, 2), "f4")}
    # Norms on both sides of max_grad_norm, so that only some steps clip.
    scale = rng.uniform(0.01, 0.3, size=(SETTINGS["total_steps"], 1, 1))
    gradients = {n: (scale * rng.normal(size=(len(scale), *v.shape))).astype("f4") for n, v in start.items()}
    result = adamw.run(SETTINGS, start, gradients)
    arrays = {f"{n}_start": v for n, v in start.items()} | {f"{n}_gradients": v for n, v in gradients.items()}
    np.savez_compressed(ROOT / "tests/golden/adamw.npz", settings=json.dumps(SETTINGS), **arrays, **result)


if __name__ == "__main__":
    main()
