"""Our worker of bench/decode.py: one reply per line on standard input, one line of JSON per reply.

    python -m scripts.bench.workers.reply --model PATH --prompt 1 2 3 --new_tokens 128 [--compute_dtype auto]

Greedy, batch 1, NF4. Times are seconds since the call.
"""

import argparse
import json
import sys
import time

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # restarts the process, so it comes before slow imports

from qlora_jax import runtime
from qlora_jax.config import ModelArgs
from qlora_jax.inference.decode import stream
from qlora_jax.inference.fast_decoding import for_fast_decoding
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import partition
from qlora_jax.models.precision import weight_format


def main() -> None:
    """Loads the model, then generates one reply per input line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--prompt", type=int, nargs="+", required=True, help="token ids")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--compute_dtype", default="auto")
    parser.add_argument("--fast", action="store_true", help="products of integers")
    parser.add_argument("--head_bits", type=int, help="default: 8 if no weight changes, else 16")
    args = parser.parse_args()
    runtime.start()
    source = open_model(args.model)
    config = model_config(source.config)
    weights = weight_format(ModelArgs(path=args.model, compute_dtype=args.compute_dtype), config)
    parts = partition(load_model(source, config, weights).model)
    parts = for_fast_decoding(parts, integer=args.fast, head_bits=args.head_bits)
    for _ in sys.stdin:
        ids, seconds, began = [], [], time.perf_counter()
        settings = {"sampling": Sampling(), "max_new_tokens": args.new_tokens, "stop_ids": ()}
        for step in stream(parts, [args.prompt], **settings):
            ids.append(step.token)
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"ids": ids, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
