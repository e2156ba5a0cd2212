"""The llama.cpp worker of bench/decode.py, through llama-cpp-python: one reply per line on standard input.

    bash scripts/setup_llama_cpp.sh native
    .llama_cpp_native/bin/python scripts/bench/opponents/llama_cpp_decode.py --model FILE.gguf --prompt 1 2 3

Greedy, batch 1, with the weights of the file. Prints one line of JSON per reply; times are seconds since the call.
"""

import argparse
import itertools
import json
import os
import sys
import time

import llama_cpp


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--prompt", type=int, nargs="+", required=True, help="token ids")
    p.add_argument("--new_tokens", type=int, default=128)
    args = p.parse_args()
    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(args.model, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    for _ in sys.stdin:
        model.reset()  # otherwise it would not process the same prompt again
        ids, seconds, began = [], [], time.perf_counter()
        for token in itertools.islice(model.generate(args.prompt, temp=0.0, reset=False), args.new_tokens):
            ids.append(token)
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"ids": ids, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
