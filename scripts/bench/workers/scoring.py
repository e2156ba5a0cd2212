"""Our worker of bench/evaluate.py: scores all jobs of a file per line on standard input, and prints one line of JSON.

    python -m scripts.bench.workers.scoring --model PATH --jobs FILE [--quant nf4] [--dtype float32]

A job is a list of rows [ids, index of the first scored id]. Its time is that of the call by which `qlora-jax evaluate`
computes scores.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # restarts the process, so it comes before slow imports

import numpy as np

from qlora_jax import runtime
from qlora_jax.config import ModelArgs
from qlora_jax.evaluation.loglikelihood import ScoredIds, score_rows
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.models.precision import weight_format


def main() -> None:
    """Loads the model, then scores all jobs per input line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--jobs", type=Path, required=True, help="a JSON file: rows by job name")
    parser.add_argument("--quant", choices=["none", "nf4"], default="nf4")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    runtime.start()
    jobs = {name: [scored(*row) for row in rows] for name, rows in json.loads(args.jobs.read_text()).items()}
    source = open_model(args.model)
    config = model_config(source.config)
    weights = weight_format(ModelArgs(path=args.model, quant_type=args.quant, compute_dtype=args.dtype), config)
    parts = partition(load_model(source, config, weights).model)
    for _ in sys.stdin:
        print(json.dumps({name: timed(parts, rows) for name, rows in jobs.items()}), flush=True)


def scored(ids: list[int], first: int) -> ScoredIds:
    """Returns a row as the evaluation code represents it."""
    return np.array(ids, np.int32), np.arange(len(ids)) >= first


def timed(parts: ModelParts, rows: list[ScoredIds]) -> dict[str, float | list[float]]:
    """Returns the seconds that the rows take, and -log p of each row."""
    began = time.perf_counter()
    scores = score_rows(parts, rows)
    return {"seconds": time.perf_counter() - began, "nll": scores.nll.tolist()}


if __name__ == "__main__":
    main()
