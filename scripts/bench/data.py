"""Measures data preparation, relative to the batch encoding of the tokenizer library.

    python -m scripts.bench.data [--data FILE] [--model FILE.gguf] [--rows 8000] [--rounds 7]

Each round runs these methods in turn, over the same rows in memory:

  library   encode_batch of tokenizers, over texts that the chat template rendered before
  ids only  encode_batch_fast of tokenizers, which returns no offsets; byte-level tokenizers need none
  rows      templates, masks, lengths, token rows, and an epoch of packs (data.packing), including the library's work
  load      load_dataset on a file of these rows: also reads, checks and reports
  cached    the same with the rows in data.cache, until the first batch

A rate is that of the fastest round. A ratio is the median over rounds, of wall-clock seconds and of CPU seconds of the
process, on which other work on the machine has less effect.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qlora_jax.config import DataArgs
from qlora_jax.data.batching.batches import plan_packed_epoch
from qlora_jax.data.batching.packing import pack_length
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.encoder import CHUNK, make_encoder, prefetch_map
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.readers.files import Row, read_rows
from qlora_jax.data.rows import TokenRows, concatenate_rows, token_rows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from qlora_jax.data.truncation import LengthLimits, fit_lengths
from qlora_jax.io.open_model import open_model
from scripts.bench.support.environment import ROOT
from scripts.bench.support.progress import phases
from scripts.fetch_smollm2 import fetch_smollm2

MAX_LENGTH = 512


class Seconds(NamedTuple):
    """Wall-clock and CPU seconds of one call; CPU seconds are summed over the threads of the process."""

    clock: float
    computed: float


def library(encode: Callable[..., object], texts: list[str]) -> None:
    """Encodes the texts with the library, as many at once as our encoder does."""
    for chunk in itertools.batched(texts, CHUNK):
        encode(list(chunk), add_special_tokens=False)


def to_packs(path: str, rows: list[Row], tokenizer: Tokenizer) -> TokenRows:
    """Encodes rows in memory and plans an epoch of packs."""
    encoder = make_encoder(detect_format(path, rows), tokenizer)
    limits = LengthLimits(max_length=MAX_LENGTH, overlong="drop")
    chunks = (encoder.segment_rows(chunk, []) for chunk in itertools.batched(rows, CHUNK))
    pieces = []
    for texts, encodings in prefetch_map(encoder.encode_texts, chunks):
        places, encoded = encoder.mask_rows(texts, encodings, [])
        fitted = fit_lengths(encoded, places, limits)
        pieces.append(token_rows(path, fitted.rows, fitted.places))
    whole = concatenate_rows(pieces, pieces[0].files)
    plan_packed_epoch(whole.lengths, pack_length(MAX_LENGTH), 16, 0, 0)
    return whole


def load(path: str, tokenizer: Tokenizer, cache: str | None) -> None:
    """Loads a data set from its file and makes its first batch."""
    data = DataArgs(train=path, max_length=MAX_LENGTH, overlong="drop", packing=True, cache=cache)
    next(load_dataset(data, tokenizer, seed=0, micro_batch_size=1, accumulation=16).train_batches())


def seconds(work: Callable[[], object]) -> Seconds:
    """Returns the seconds of one call."""
    began, computed = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - began, time.process_time() - computed)


def table(rounds: Sequence[Mapping[str, Seconds]], count: int) -> list[str]:
    """Returns one line per method: rows/s of its fastest round, and its extra time relative to the first method."""
    first, *_ = rounds[0]
    lines = []
    for name in rounds[0]:
        rate = count / min(one[name].clock for one in rounds)
        clock, computed = (
            statistics.median(one[name][kind] / one[first][kind] for one in rounds) - 1 for kind in (0, 1)
        )
        over = f", {clock:+.1%} time, {computed:+.1%} CPU time" if name != first else ""
        lines.append(f"{name:>8}: {rate:8.0f} rows/s{over}")
    return lines


def main() -> None:
    """Measures all methods and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(ROOT / "examples/titles/train.jsonl.gz"))
    parser.add_argument("--model", help="a GGUF file or a Hugging Face folder (default: SmolLM2)")
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    tokenizer = load_tokenizer(open_model(args.model or str(fetch_smollm2())).tokenizer)
    found = list(itertools.islice(itertools.cycle(read_rows(args.data)), args.rows))
    form = detect_format(args.data, found)
    texts = make_encoder(form, tokenizer).segment_rows(found, []).texts
    with tempfile.TemporaryDirectory() as folder:
        path, cache = f"{folder}/rows.jsonl", f"{folder}/cache"
        Path(path).write_text("".join(json.dumps(row.data) + "\n" for row in found), encoding="utf-8")
        ways: dict[str, Callable[[], object]] = {
            "library": lambda: library(tokenizer.backend.encode_batch, texts),
            "ids only": lambda: library(tokenizer.backend.encode_batch_fast, texts),
            "rows": lambda: to_packs(path, found, tokenizer),
            "load": lambda: load(path, tokenizer, None),
            "cached": lambda: load(path, tokenizer, cache),
        }
        for name in phases("warm-up:", ways):
            ways[name]()
        rounds = [{name: seconds(work) for name, work in ways.items()} for _ in phases("round", range(args.rounds))]
    tokens = np.mean([len(ids) for ids in tokenizer.encode_batch(texts[:1000])])
    print(f"{args.rows} rows of {args.data}, form {form.name}, {tokens:.0f} tokens per row, {args.rounds} rounds")
    print("\n".join(table(rounds, args.rows)))


if __name__ == "__main__":
    main()
