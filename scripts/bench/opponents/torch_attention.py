"""The opponent of bench/attention.py: PyTorch's flash attention for CPUs, called like transformers does.

    .oracle/bin/python scripts/bench/opponents/torch_attention.py CASE < LINES

CASE is JSON, the arguments of make_run. Makes a forward and backward pass per line on standard input, and prints its
seconds as one line of JSON.
"""

import json
import os
import sys
import time
import types

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sliding_window_causal_mask_function


def _window_mask(length: int, window: int | None) -> torch.Tensor | None:
    """Returns the mask that transformers passes to SDPA: None for plain causality, otherwise a boolean mask."""
    if window is None:
        return None
    at = torch.arange(length)
    visible = sliding_window_causal_mask_function(window)(0, 0, at[:, None], at[None, :])
    return visible[None, None]


def make_run(batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: str, window: int | None):
    """Returns a function that makes one forward and backward pass of fixed random inputs."""
    torch.manual_seed(0)

    def random(count: int) -> torch.Tensor:
        return torch.randn(batch, length, count, head_dim).to(getattr(torch, dtype))

    q, k, v = (random(n).transpose(1, 2).requires_grad_() for n in (heads, kv_heads, kv_heads))
    do, mask = random(heads), _window_mask(length, window)
    module = types.SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)

    def run():
        out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=head_dim**-0.5)
        return torch.autograd.grad(out, (q, k, v), do)

    return run


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    run = make_run(**json.loads(sys.argv[1]))
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
