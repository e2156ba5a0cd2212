"""Our side of bench/evaluate.py: all jobs of a file scored for each line on standard input, a JSON line for each time.

    python -m scripts.bench.workers.scoring --model PATH --jobs FILE [--quant nf4] [--dtype float32]

A job is a list of rows [ids, index of the first scored id]. The time of a job counts from the call that
`python -m qlora_jax.evaluate` makes to its scores.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # starts again: before anything that takes long to import, as the product's commands do

import numpy as np

from qlora_jax import runtime
from qlora_jax.config import ModelArgs
from qlora_jax.evaluation.loglikelihood import ScoredIds, answer_scores
from qlora_jax.io.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.models.precision import weight_format


def main() -> None:
    """Loads, then scores as often as it is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--jobs", type=Path, required=True, help="a JSON file: rows by the name of their job")
    parser.add_argument("--quant", choices=["none", "nf4"], default="nf4")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    runtime.start()
    jobs = {name: [scored(*row) for row in rows] for name, rows in json.loads(args.jobs.read_text()).items()}
    source = open_model(args.model)
    held = weight_format(ModelArgs(path=args.model, quant_type=args.quant, compute_dtype=args.dtype))
    parts = partition(load_model(source, model_config(source.config), held).model)
    for _ in sys.stdin:
        print(json.dumps({name: timed(parts, rows) for name, rows in jobs.items()}), flush=True)


def scored(ids: list[int], first: int) -> ScoredIds:
    """A row as the product has it."""
    return np.array(ids, np.int32), np.arange(len(ids)) >= first


def timed(parts: ModelParts, rows: list[ScoredIds]) -> dict:
    """How long the rows take, and -log p of each."""
    began = time.perf_counter()
    scores = answer_scores(parts, rows)
    return {"seconds": time.perf_counter() - began, "nll": scores.nll.tolist()}


if __name__ == "__main__":
    main()
