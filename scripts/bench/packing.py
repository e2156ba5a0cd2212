"""Useful tokens a second with rows packed, in length buckets, and padded.

    python -m scripts.bench.packing --data FILE [--model FILE.gguf] [--max-length 512] [--rows 4] [--seconds 20]

The gradients of real batches of one micro-batch of `--rows` rows, the ways in turn, for about so many seconds each:
packed, by length in 4 buckets, each batch of shuffled rows padded to its own longest (rounded up to 64, a compilation
for each such length, not counted), and all padded to the longest of all. A useful token is a place that holds one;
supervised or not. `waits` is the share of the time, beginnings of epochs too, in which nothing is computed since the
next batch is made.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # starts again: before anything that takes long to import, as the product's commands do

import jax

from qlora_jax import runtime
from qlora_jax.config import DataArgs, LoraArgs
from qlora_jax.data.batching.batches import Batch
from qlora_jax.data.dataset import Dataset, load_dataset
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.io.open_model import open_model
from qlora_jax.training.abstract_step import AbstractStep, abstract_step
from qlora_jax.training.compiled_step import Gradients
from scripts.bench.support.real_step import Held, hold
from scripts.fetch_smollm2 import fetch_smollm2

WAYS: dict[str, dict[str, Any]] = {
    "packed": {"packing": True},
    "4 buckets": {"buckets": 4},
    "each batch to its longest": {"buckets": 1},
    "all to the longest": {"buckets": 1},
}
CUT = "each batch to its longest"
STEP = 64


@dataclasses.dataclass
class Way:
    """One way, and what it has done so far."""

    dataset: Dataset
    batches: Iterator[Batch]
    gradients: Gradients
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    places: int = 0

    def step(self, held: Held) -> None:
        """The gradients of one batch."""
        asked = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - asked
        self.gradients.compiled(batch.inputs.shape)
        began = time.perf_counter()
        jax.block_until_ready(self.gradients(held.parts, batch.arrays(), None))
        self.seconds += time.perf_counter() - began
        self.tokens += batch.tokens
        self.places += batch.inputs.size

    @property
    def waits(self) -> float:
        """The share of all time that goes by until batches are there."""
        return self.waited / (self.waited + self.seconds)

    @property
    def padding(self) -> float:
        """The share of places without a token."""
        return 1 - self.tokens / self.places

    @property
    def rate(self) -> float:
        """Useful tokens a second."""
        return self.tokens / (self.waited + self.seconds)


def cut(batch: Batch) -> Batch:
    """Without the places that no row fills, to a multiple of STEP."""
    length = -(-int(batch.lengths.max()) // STEP) * STEP
    arrays = {name: getattr(batch, name)[:, :, :length] for name in ("inputs", "targets", "weights")}
    return dataclasses.replace(batch, **arrays)


def abstract(held: Held, batch: tuple[int, int, int], *, packed: bool) -> AbstractStep:
    """The step on batches of packs or of single rows."""
    return abstract_step(held.config, held.weights, LoraArgs(rank=16), batch=batch, packed=packed)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", help="a GGUF file or a Hugging Face folder (default: SmolLM2)")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20)
    args = parser.parse_args()
    runtime.start()
    path = args.model or str(fetch_smollm2())
    tokenizer = load_tokenizer(open_model(path).tokenizer)
    batch = (1, args.rows, args.max_length)
    held = hold(path, rank=16, compute_dtype="auto", batch=batch, remat="names")
    ways = {}
    for name, settings in WAYS.items():
        data = DataArgs(train=args.data, max_length=args.max_length, **settings)
        dataset = load_dataset(data, tokenizer, seed=0, micro_batch_size=args.rows, accumulation=1)
        gradients = Gradients(abstract(held, batch, packed=dataset.packed))
        batches = dataset.train_batches()
        ways[name] = Way(dataset, map(cut, batches) if name == CUT else batches, gradients)
        for _ in range(4):
            ways[name].step(held)
        ways[name] = dataclasses.replace(ways[name], tokens=0, seconds=0.0, waited=0.0, places=0)
    for way in itertools.cycle(ways.values()):
        way.step(held)
        if min(each.seconds for each in ways.values()) > args.seconds:
            break
    for name, way in ways.items():
        print(f"{name:>26}: {way.rate:6.0f} tokens/s; {way.padding:5.1%} padding; waits {way.waits:.3%}")
    first, *others = (way.rate for way in ways.values())
    print("packed against the others: " + ", ".join(f"{first / other:.2f}x" for other in others))


if __name__ == "__main__":
    main()
