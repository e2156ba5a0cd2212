"""A linear layer with LoRA whose merged weight is rounded, and the gradients that pass the rounding unchanged.

Inputs: x [M, K], weight [N, K], a [K, R], b [R, N], dy [M, N], `scaling` and `formats`. Codes are those of gguf and of
bitsandbytes.
"""

import bitsandbytes.functional as bnb
import numpy as np
import torch
from bridge import inputs, save
from gguf import GGMLQuantizationType, dequantize, quantize

given = inputs()


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "nf4":
        return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=kind))
    number = GGMLQuantizationType[kind]
    return torch.from_numpy(dequantize(quantize(weight.numpy(), number), number))


found = {}
for kind in given["formats"]:
    x, a, b = (torch.from_numpy(given[name]).requires_grad_() for name in ("x", "a", "b"))
    merged = torch.from_numpy(given["weight"]) + given["scaling"] * (a @ b).T
    y = x @ (merged + (rounded(merged.detach(), kind) - merged).detach()).T
    y.backward(torch.from_numpy(given["dy"]))
    results = {"y": y.detach(), "x": x.grad, "a": a.grad, "b": b.grad}
    found |= {f"{kind}.{name}": np.asarray(each) for name, each in results.items()}
save(**found)
