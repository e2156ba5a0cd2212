"""Writes tests/golden/quant.npz: small weights, and the results of bitsandbytes' CPU backend for them.

    .oracle/bin/python tests/golden/make_quant.py [--real model.safetensors]

The real weights are slices of all-MiniLM-L6-v2 (Apache-2.0; see tests/golden/README.md). They are copied from the
golden file unless --real is a safetensors file of that model.
"""

import argparse
import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional as bnb
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/oracle"))
from bnb_quantize import quantized  # noqa: E402

GOLDEN = ROOT / "tests/golden/quant.npz"
REAL_SLICES = {
    "real_query": "encoder.layer.0.attention.self.query.weight",
    "real_value": "encoder.layer.5.attention.self.value.weight",
}
ROWS = 8
# The CPU kernel dequantizes with wrong constants if K % 16 == 0 and K % 64 != 0, so such shapes are excluded.
INPUT_BLOCK_SIZES = {
    "real_query": 64,
    "real_value": 128,
    "normal": 256,
    "scales": 64,
    "zeros": 64,
    "ties_nf4": 64,
    "ties_fp4": 64,
    "subnormal": 64,
    "odd_shape": 64,
    "vector": 64,
    "partial_ties": 64,
    "many_blocks": 32,
}


def ties(midpoints: list[float]) -> np.ndarray:
    """Returns blocks of absmax 0.5 and 4 whose other elements are midpoints of the code, and one ulp to either side."""
    on = np.array(midpoints, np.float32)
    around = np.concatenate([on, np.nextafter(on, np.float32(-2)), np.nextafter(on, np.float32(2)), [1.0]])
    block = np.pad(around.astype(np.float32), (0, 64 - around.size))
    return np.stack([block * np.float32(0.5), block * np.float32(-4)])


def midpoints(quant_type: str) -> list[float]:
    """Returns the midpoints between neighbouring levels of a code table."""
    levels = np.sort(bnb.get_4bit_type(quant_type, device="cpu").numpy())
    return ((levels[:-1] + levels[1:]) / np.float32(2)).tolist()


def partial_ties(midpoints: list[float], rng: np.random.Generator) -> np.ndarray:
    """Returns a partial block near ties: w * (1 / absmax) and w / absmax lie on different sides of five midpoints."""
    around, one = ties(midpoints)[0][:46] * np.float32(2), np.float32(1)
    while True:
        absmax = np.float32(rng.uniform(1, 2))
        block = around * absmax
        product, quotient = block * (one / absmax), block / absmax
        if sum(np.sum((product > midpoint) != (quotient > midpoint)) for midpoint in np.float32(midpoints)) >= 5:
            return block


def eight_bit_codes(values: np.ndarray) -> np.ndarray:
    """Returns bitsandbytes' 8-bit codes of 255 values, in a block with absmax 1."""
    codes, _ = bnb.quantize_blockwise(torch.from_numpy(np.append(np.float32(1), values)), blocksize=256)
    return codes.numpy()[1:]


def look_up_thresholds() -> dict[str, np.ndarray]:
    """Returns f32[255]: the smallest values with codes above c in 0..254; also their codes, and those one ulp below."""
    low, high = np.full(255, -1.0, np.float32), np.full(255, 1.0, np.float32)
    while np.any(np.nextafter(low, np.float32(2)) < high):
        middle = ((low.astype(np.float64) + high) / 2).astype(np.float32)
        middle = np.where(middle == low, np.nextafter(low, np.float32(2)), middle)
        above = eight_bit_codes(middle) > np.arange(255)
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    codes = np.stack([eight_bit_codes(high), eight_bit_codes(low)])
    return {"look_up.thresholds": high, "look_up.codes": codes}


def synthetic(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns synthetic weights for edge cases: scales, blocks of zeros, ties, subnormal numbers, shapes."""
    normal = rng.standard_normal((8, 256), np.float32)
    zeros = normal[:4].copy()
    zeros[:, 64:128] = 0
    zeros[1] = 0
    return {
        "normal": normal,
        "scales": normal[:4] * np.float32(10.0) ** np.array([[-12], [-3], [3], [12]], np.float32),
        "zeros": zeros,
        "ties_nf4": ties(midpoints("nf4")),
        "ties_fp4": ties(midpoints("fp4")),
        "subnormal": normal[:4] * np.array([[1e-36], [1e-38], [1e-40], [3e-45]], np.float32),
        "odd_shape": rng.standard_normal((3, 5, 7), np.float32),
        "vector": rng.standard_normal(200, np.float32),
        "partial_ties": partial_ties(midpoints("nf4"), rng),
        "many_blocks": rng.standard_normal((36, 256), np.float32).astype(np.float16),
    }


def real_slices(file: Path | None) -> dict[str, np.ndarray]:
    """Returns rows of the real weights, from a safetensors file or from the golden file."""
    if file is None:
        with np.load(GOLDEN) as golden:
            return {name: golden[name] for name in REAL_SLICES}
    tensors = load_file(file)
    return {name: tensors[tensor][:ROWS].astype(np.float16) for name, tensor in REAL_SLICES.items()}


def digest(weights: np.ndarray) -> str:
    """Returns the sha256 of f32 values; adding zero removes signs of zeros, in which bitsandbytes' kernels differ."""
    return hashlib.sha256((weights + np.float32(0)).tobytes()).hexdigest()


def both_ways(weight: torch.Tensor, quant_type: str, block_size: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns (codes and all constants, digests of the dequantized weights), without and with double quantization."""
    single, double = (quantized(weight, quant_type, block_size, double_quant) for double_quant in (False, True))
    digests = {"single": digest(single.pop("weights")), "double": digest(double.pop("weights"))}
    return single | double, digests


def main() -> None:
    """Writes the golden file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="safetensors file of all-MiniLM-L6-v2")
    inputs = real_slices(parser.parse_args().real) | synthetic(np.random.default_rng(20231))
    torch.set_num_threads(1)
    arrays, cases = inputs | look_up_thresholds(), {}
    for name, block_size in INPUT_BLOCK_SIZES.items():
        for quant_type in ("nf4", "fp4"):
            leaves, digests = both_ways(torch.from_numpy(inputs[name]), quant_type, block_size)
            case = f"{name}-{quant_type}"
            cases[case] = {"input": name, "quant_type": quant_type, "block_size": block_size, "weights_sha256": digests}
            arrays |= {f"{case}.{leaf}": value for leaf, value in leaves.items()}
    made_by = {package: version(package) for package in ("bitsandbytes", "torch")}
    np.savez_compressed(GOLDEN, **arrays, json=np.array(json.dumps({"made_by": made_by, "cases": cases})))
    print(f"{GOLDEN.relative_to(ROOT)}: {len(cases)} cases, {GOLDEN.stat().st_size} bytes, {made_by}")


if __name__ == "__main__":
    main()
