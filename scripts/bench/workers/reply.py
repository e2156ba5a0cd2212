"""Our side of bench/decode.py: one reply for each line on standard input, a JSON line for each reply.

    python -m scripts.bench.workers.reply --model PATH --prompt 1 2 3 --new-tokens 128 [--compute-dtype auto]

Greedy, batch 1, NF4. Times count from the call.
"""

import argparse
import json
import sys
import time

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # starts again: before anything that takes long to import, as the product's commands do

from qlora_jax import runtime
from qlora_jax.config import ModelArgs
from qlora_jax.inference.decode import stream
from qlora_jax.inference.sampling import Sampling
from qlora_jax.io.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import partition
from qlora_jax.models.precision import weight_format


def main() -> None:
    """Loads, then answers as often as it is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--prompt", type=int, nargs="+", required=True, help="its ids")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--compute-dtype", default="auto")
    args = parser.parse_args()
    runtime.start()
    source = open_model(args.model)
    held = weight_format(ModelArgs(path=args.model, compute_dtype=args.compute_dtype))
    parts = partition(load_model(source, model_config(source.config), held).model)
    for _ in sys.stdin:
        ids, seconds, began = [], [], time.perf_counter()
        settings = {"sampling": Sampling(), "max_new_tokens": args.new_tokens, "stop_ids": ()}
        for step in stream(parts, [args.prompt], **settings):
            ids.append(step.token)
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"ids": ids, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
