"""Compares steps on preference pairs whose prompt is computed once with steps on padded pairs.

    python -m scripts.bench.preference_pairs --data FILE [--model FILE.gguf] [--max_length 1024] [--pairs 2] [--turns 7]

The data has a prompt, a chosen and a rejected answer per row, in any format of `--objective dpo`;
make_preference_pairs.py makes it from GSM8K and OpenAssistant, with any share of prompts. The methods are:
`padded`, where chosen and rejected are two rows, each with the prompt, in length buckets, as other libraries compute
them; `branches`, where both are branches of one row, in length buckets; and `packed`, where a row has several pairs.
Each computes the gradients of the summed log p of all answers, which cost as much as those of DPO, with `--pairs` pairs
per micro-batch. The methods take turns of one pass over all pairs, in one process. Each ratio is the median over turns,
with its 95 % interval. `efficiency` is the ratio of times over the ratio of computed positions, padding included.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # restarts the process, so it comes before slow imports

import jax
import numpy as np

from qlora_jax import runtime
from qlora_jax.config import DataArgs, LoraArgs, ModelArgs
from qlora_jax.data.batching.batches import PlannedStep, fill_batch, plan_epoch, plan_packed_epoch
from qlora_jax.data.batching.packing import NO_ROW, Batch, choose_buckets, count_units, pack_length
from qlora_jax.data.branch_tree import whole_texts
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place
from qlora_jax.data.rows import TokenRows, token_rows
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, partition
from qlora_jax.models.precision import weight_format
from qlora_jax.training.step import gradients
from scripts.bench.support.interleave import Record, ratio_interval
from scripts.bench.support.progress import phases
from scripts.fetch_smollm2 import fetch_smollm2


def texts_of(pairs: TokenRows) -> TokenRows:
    """Returns each branch as a separate row: a pair's chosen text, then its rejected one."""
    texts = [text for index in range(len(pairs)) for text in _texts(pairs, index)]
    return token_rows("pairs", texts, [Place(number + 1, number) for number in range(len(texts))])


def _texts(pairs: TokenRows, index: int) -> Iterator[EncodedRow]:
    for text, mask in whole_texts(*pairs.row(index), pairs.branches_of(index)):
        yield EncodedRow(text, mask, source=int(np.argmax(mask)), cut=False, lossy=False)


def padded_batches(pairs: TokenRows, per_step: int, max_buckets: int, pad_id: int) -> list[Batch]:
    """Returns batches of two rows per pair, padded to one of a few lengths."""
    texts = texts_of(pairs)
    longest = np.maximum(texts.lengths[0::2], texts.lengths[1::2])
    return [
        fill_batch(texts, _both(step.rows), step.length, pad_id) for step in _bucketed(longest, per_step, max_buckets)
    ]


def _both(pairs: np.ndarray) -> np.ndarray:
    """Returns the indices [1, 2 B, 1] of both texts of each pair."""
    both = 2 * np.repeat(pairs[:, 0], 2) + np.tile([0, 1], len(pairs))
    return np.where(np.repeat(pairs[:, 0], 2) == NO_ROW, NO_ROW, both)[None, :, None]


def branching_batches(pairs: TokenRows, per_step: int, max_buckets: int, pad_id: int) -> list[Batch]:
    """Returns batches of one row per pair, padded to one of a few lengths."""
    return [
        fill_batch(pairs, step.rows[None], step.length, pad_id)
        for step in _bucketed(pairs.lengths, per_step, max_buckets)
    ]


def packed_batches(pairs: TokenRows, length: int, pad_id: int) -> list[Batch]:
    """Returns batches of one row of `length` positions, which has several pairs."""
    steps = plan_packed_epoch(pairs.lengths, length, 1, seed=0, epoch=0, sequences=2)
    return [fill_batch(pairs, step.rows[None], step.length, pad_id, packed=True) for step in steps]


def _bucketed(lengths: np.ndarray, per_step: int, max_buckets: int) -> list[PlannedStep]:
    buckets = choose_buckets(count_units(lengths, int(lengths.max())), per_step, max_buckets)
    return plan_epoch(lengths, buckets, per_step, seed=0, epoch=0)


def load_parts(model: str) -> ModelParts:
    """Returns the model in NF4 with LoRA on all linear layers."""
    source, adapters = open_model(model), LoraArgs(rank=16)
    config = model_config(source.config)
    loaded = load_model(source, config, weight_format(ModelArgs(path=model), config)).model
    attach_method(loaded, adapters, jax.random.key(0))
    return partition(loaded)


def time_pass(parts: ModelParts, batches: Sequence[Batch]) -> tuple[float, float]:
    """Returns the wall seconds and the processor seconds of the gradients of all batches."""
    began, used = time.perf_counter(), time.process_time()
    for batch in batches:
        jax.block_until_ready(gradients(parts, batch.arrays(), None, remat="names"))
    return time.perf_counter() - began, time.process_time() - used


def positions(batches: Sequence[Batch]) -> int:
    """Returns the computed positions, padding included."""
    return sum(batch.inputs.size for batch in batches)


def prompt_share(pairs: TokenRows) -> float:
    """Returns the share of prompts in the tokens of padded pairs, without padding."""
    texts = texts_of(pairs)
    first = [2 * int(np.flatnonzero(texts.row(index)[1])[0]) for index in range(0, len(texts), 2)]
    return sum(first) / len(texts.ids)


def compare(times: Sequence[tuple[float, float]], padded: Sequence[tuple[float, float]], share: float) -> Record:
    """Returns the ratios of a method to padded pairs: of wall and processor time, and both over that of positions."""
    wall, processor = ([a[i] / b[i] for a, b in zip(padded, times, strict=True)] for i in (0, 1))
    low, high = ratio_interval(wall)
    ratio, of_processor = statistics.median(wall), statistics.median(processor)
    return {
        "positions_ratio": share,
        "ratio": ratio,
        "interval": (low, high),
        "efficiency": ratio / share,
        "processor_ratio": of_processor,
        "processor_efficiency": of_processor / share,
    }


def main() -> None:
    """Measures all methods and prints them, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSON Lines of preference pairs")
    parser.add_argument("--model", help="a GGUF file or a Hugging Face folder (default: SmolLM2)")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=2, help="pairs per micro-batch of `padded` and `branches`")
    parser.add_argument("--buckets", type=int, default=4, help="most lengths of `padded` and `branches`")
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    runtime.start()
    path = args.model or str(fetch_smollm2())
    tokenizer = load_tokenizer(open_model(path).tokenizer)
    data = DataArgs(train=args.data, max_length=args.max_length)
    dataset = load_dataset(data, tokenizer, seed=0, micro_batch_size=1, accumulation=1, objective="dpo")
    assert isinstance(dataset.train, TokenRows)
    pairs, pad_id = dataset.train, next(one for one in (tokenizer.pad_id, tokenizer.eos_id, 0) if one is not None)
    longest = int(pairs.lengths.max())
    methods = {
        "padded": padded_batches(pairs, args.pairs, args.buckets, pad_id),
        "branches": branching_batches(pairs, args.pairs, args.buckets, pad_id),
        "packed": packed_batches(pairs, max(pack_length(args.max_length), pack_length(longest + 1)), pad_id),
    }
    parts = load_parts(path)
    for name in phases("compiling", methods):
        time_pass(parts, methods[name])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for _ in phases("turn", range(args.turns)):
        for name in phases("measuring", methods):
            times[name].append(time_pass(parts, methods[name]))
    padded = positions(methods["padded"])
    print(f"{len(pairs)} pairs; prompts are {prompt_share(pairs):.0%} of the tokens of padded pairs")
    rows = {}
    for name in ("branches", "packed"):
        rows[name] = row = compare(times[name], times["padded"], padded / positions(methods[name]))
        low, high = row["interval"]
        print(
            f"{name:>9}: {row['ratio']:.2f}x ({low:.2f} to {high:.2f}) in time, {row['positions_ratio']:.2f}x in "
            f"positions: efficiency {row['efficiency']:.2f} ({row['processor_efficiency']:.2f} in processor time)"
        )
    print(json.dumps({"benchmark": "preference_pairs", "cores": os.cpu_count(), "turns": args.turns, "rows": rows}))


if __name__ == "__main__":
    main()
