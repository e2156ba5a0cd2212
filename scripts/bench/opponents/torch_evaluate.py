"""The opponent of bench/evaluate.py: scores all jobs of a file with transformers, once per line on standard input.

    .oracle/bin/python scripts/bench/opponents/torch_evaluate.py --model GGUF --jobs FILE [--quant nf4]
        [--dtype float32] [--rounded]

It is written to be fast: rows sorted by length, batches of up to --tokens positions, no cache, the head at scored
positions only, log p from f32 logits. It does not use torch.compile, which gains 3 to 10 % after 40 to 60 s, and with
bitsandbytes' layers takes minutes. In float32, bitsandbytes' layers multiply dequantized weights in float32, as on any
processor without bf16 products. On a processor with bf16 products they would round operands, block constants and
results to bf16, which --rounded permits. Prints one line of JSON per input line; a job's time is from its tokens in
lists to its scores.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch.nn.functional import cross_entropy
from torch_qlora_cpu import load_dense, quantize_nf4

HEAD_ROWS = 256  # positions whose logits exist at the same time


def batches(rows: list, tokens: int) -> list[list[int]]:
    """Returns batches of row indices, longest rows first, each as large as fits."""
    waiting, made = sorted(range(len(rows)), key=lambda i: -len(rows[i][0])), []
    while waiting:
        count = max(1, tokens // len(rows[waiting[0]][0]))
        made.append(waiting[:count])
        waiting = waiting[count:]
    return made


def hidden_states(model, rows: list) -> torch.Tensor:
    """Returns [B, T, D]. Padding is on the right, where causality hides it, so no mask is needed."""
    ids = torch.zeros((len(rows), max(len(ids) for ids, _ in rows)), dtype=torch.long)
    for place, (row, _) in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


def batch_nll(model, rows: list) -> list[float]:
    """Returns -log p of each row's scored tokens."""
    hidden = hidden_states(model, rows)
    places = [(i, at) for i, (ids, first) in enumerate(rows) for at in range(max(first, 1), len(ids))]
    of_row = torch.tensor([i for i, _ in places])
    before = hidden[of_row, torch.tensor([at - 1 for _, at in places])]
    targets = torch.tensor([rows[i][0][at] for i, at in places])
    chunks = zip(before.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
    nll = torch.cat([cross_entropy(model.lm_head(h).float(), t, reduction="none") for h, t in chunks])
    return torch.zeros(len(rows), dtype=torch.double).index_add_(0, of_row, nll.double()).tolist()


@torch.inference_mode()
def timed(model, rows: list, tokens: int) -> dict:
    """Returns the seconds that the rows take, and -log p of each row."""
    began, nll = time.perf_counter(), [0.0] * len(rows)
    for indices in batches(rows, tokens):
        for index, one in zip(indices, batch_nll(model, [rows[i] for i in indices]), strict=True):
            nll[index] = one
    return {"seconds": time.perf_counter() - began, "nll": nll}


def multiply_in_f32(model: torch.nn.Module) -> None:
    """Disables the kernel of bitsandbytes' layers that rounds f32 inputs to bf16."""
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--jobs", type=Path, required=True)
    p.add_argument("--quant", choices=["none", "nf4"], default="nf4")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--rounded", action="store_true", help="bitsandbytes' kernel in float32 too, where it has one")
    p.add_argument("--tokens", type=int, default=2048, help="positions that go through the model at once")
    args = p.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    jobs = json.loads(args.jobs.read_text())
    dtype = getattr(torch, args.dtype)
    model = load_dense(args.model, dtype)
    if args.quant == "nf4":
        quantize_nf4(model, dtype)
    if args.dtype == "float32" and not args.rounded:
        multiply_in_f32(model)
    model = model.eval()
    for _ in sys.stdin:
        print(json.dumps({name: timed(model, rows, args.tokens) for name, rows in jobs.items()}), flush=True)


if __name__ == "__main__":
    main()
