"""The opponent of bench/attention.py: attention as transformers calls it, PyTorch's flash kernel for CPUs.

    .oracle/bin/python scripts/bench/opponents/torch_attention.py CASE < LINES

CASE is JSON, the arguments of make_run. A forward and backward pass for each line on standard input, a line of JSON
with its seconds for each.
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
    """What transformers hands to SDPA: no mask where causality says it all, else a boolean one."""
    if window is None:
        return None
    at = torch.arange(length)
    visible = sliding_window_causal_mask_function(window)(0, 0, at[:, None], at[None, :])
    return visible[None, None]


def make_run(batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: str, window: int | None):
    """A function of no arguments: one forward and backward pass of fixed random inputs."""
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
