"""The opponent of bench/decode.py: `generate` of transformers on a bitsandbytes NF4 model, one reply per input line.

    .oracle/bin/python scripts/bench/opponents/torch_decode.py --model GGUF --prompt 1 2 3 [--dtype bf16]
        [--cache compiled]

Greedy, batch 1. Prints one line of JSON per reply; times are seconds since the call.
"""

import argparse
import json
import os
import sys
import time

import torch
from torch_qlora_cpu import load_dense, quantize_nf4
from transformers.generation.streamers import BaseStreamer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Clock(BaseStreamer):
    """Records each token and its time; the first call of `put` has the prompt."""

    def __init__(self):
        self.ids, self.times, self._prompt_seen = [], [], False

    def put(self, value):
        if self._prompt_seen:
            self.ids.append(value.item())
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self):
        pass


def settings_of(args):
    """Returns the arguments of `generate`, without the prompt."""
    common = {"do_sample": False, "max_new_tokens": args.new_tokens, "eos_token_id": None, "pad_token_id": 0}
    if args.cache == "dynamic":
        return common
    compile_config = {}
    if args.cache == "compiled":
        from transformers import CompileConfig

        config = CompileConfig(mode="default", fullgraph=False)
        config._compile_all_devices = True  # by default, generate compiles only on GPUs
        compile_config = {"compile_config": config}
    return {**common, "cache_implementation": "static", **compile_config}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--prompt", type=int, nargs="+", required=True, help="token ids")
    p.add_argument("--new_tokens", type=int, default=128)
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--cache", choices=["dynamic", "static", "compiled"], default="dynamic")
    args = p.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = load_dense(args.model, DTYPES[args.dtype])
    quantize_nf4(model, DTYPES[args.dtype])
    model = model.eval()
    model.config.use_cache = True
    ids = torch.tensor([args.prompt])
    for _ in sys.stdin:
        clock, began = Clock(), time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **settings_of(args))
        print(json.dumps({"ids": clock.ids, "seconds": [t - began for t in clock.times]}), flush=True)


if __name__ == "__main__":
    main()
