#!/usr/bin/python3
"""What rows cost on their way to batches, over what the tokenizer library's own batch encoding takes.

    python scripts/bench_data.py [--data FILE] [--model FILE.gguf] [--rows 8000] [--rounds 7]

Several times in turn, each over the same rows in memory:

  library   tokenizers' encode_batch over the texts as the chat template renders them, rendered beforehand
  rows      templates, masks, lengths, token rows, and an epoch of packs (data.packing), encode_batch within
  load      load_dataset on a file of these rows: reading, checking and the report too
  cached    the same where data.cache has them, to the first batch

Rates are of the fastest round, ratios the median over rounds of that round's own.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fetch_smollm2 import fetch_smollm2

from qlora_jax.config import DataArgs
from qlora_jax.data.batches import plan_packed_epoch
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.encode_rows import CHUNK, ahead, make_encoder
from qlora_jax.data.lengths import Limits, fit_lengths
from qlora_jax.data.packing import pack_places
from qlora_jax.data.readers import Row, read_rows
from qlora_jax.data.recognise import recognise
from qlora_jax.data.rows import TokenRows, joined, token_rows
from qlora_jax.data.tokenizer import Tokenizer, load_tokenizer
from qlora_jax.io.source import open_model

MAX_LENGTH = 512
ROOT = Path(__file__).resolve().parent.parent


def library(tokenizer: Tokenizer, texts: list[str]) -> None:
    """The library's own batch encoding, as many texts at once as ours has."""
    for chunk in itertools.batched(texts, CHUNK):
        tokenizer.backend.encode_batch(list(chunk), add_special_tokens=False)


def to_packs(path: str, rows: list[Row], tokenizer: Tokenizer) -> TokenRows:
    """Rows in memory to token rows, and an epoch of packs planned."""
    encoder, limits = make_encoder(recognise(path, rows), tokenizer), Limits(max_length=MAX_LENGTH, overlong="drop")
    chunks = (encoder.texts(chunk, []) for chunk in itertools.batched(rows, CHUNK))
    pieces = []
    for texts, encodings in ahead(encoder.encodings, chunks):
        places, encoded = encoder.encoded(texts, encodings, [])
        fitted = fit_lengths(encoded, places, limits)
        pieces.append(token_rows(path, fitted.rows, fitted.places))
    whole = joined(pieces, pieces[0].files)
    plan_packed_epoch(whole.places, pack_places(MAX_LENGTH), 16, 0, 0)
    return whole


def load(path: str, tokenizer: Tokenizer, cache: str | None) -> None:
    """A data set from its file to its first batch."""
    data = DataArgs(train=path, max_length=MAX_LENGTH, overlong="drop", packing=True, cache=cache)
    next(load_dataset(data, tokenizer, seed=0, micro_batch_size=1, accumulation=16).train_batches())


def seconds(work: Callable[[], object]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(ROOT / "examples/titles/train.jsonl.gz"))
    parser.add_argument("--model", help="a GGUF file or a Hugging Face folder (default: SmolLM2)")
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    tokenizer = load_tokenizer(open_model(args.model or str(fetch_smollm2())).tokenizer)
    found = list(itertools.islice(itertools.cycle(read_rows(args.data)), args.rows))
    form = recognise(args.data, found)
    texts = make_encoder(form, tokenizer).texts(found, []).texts
    with tempfile.TemporaryDirectory() as folder:
        path, cache = f"{folder}/rows.jsonl", f"{folder}/cache"
        Path(path).write_text("".join(json.dumps(row.data) + "\n" for row in found), encoding="utf-8")
        ways: dict[str, Callable[[], object]] = {
            "library": lambda: library(tokenizer, texts),
            "rows": lambda: to_packs(path, found, tokenizer),
            "load": lambda: load(path, tokenizer, None),
            "cached": lambda: load(path, tokenizer, cache),
        }
        for work in ways.values():
            work()
        rounds = [{name: seconds(work) for name, work in ways.items()} for _ in range(args.rounds)]
    tokens = np.mean([len(ids) for ids in tokenizer.encode_batch(texts[:1000])])
    print(f"{args.rows} rows of {args.data}, form {form.name}, {tokens:.0f} tokens a row, {args.rounds} rounds")
    for name in ways:
        best = min(one[name] for one in rounds)
        over = statistics.median(one[name] / one["library"] for one in rounds) - 1
        print(f"{name:>8}: {args.rows / best:8.0f} rows/s" + (f", {over:+.1%} of the library's time" if over else ""))


if __name__ == "__main__":
    main()
