"""Compares useful tokens/s of packed rows, length buckets, and padding.

    python -m scripts.bench.packing --data FILE [--model FILE.gguf] [--max_length 512] [--rows 4] [--seconds 20]

Computes the gradients of real batches of one micro-batch with `--rows` rows, for about `--seconds` per method. The
methods take turns: packed; 4 length buckets; each batch of shuffled rows padded to its longest row (rounded up to 64,
one compilation per length, not counted); all rows padded to the longest of all. Useful tokens are those that are not
padding, supervised or not. `waits` is the share of time spent waiting for the next batch, including starts of epochs.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import TypedDict

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # restarts the process, so it comes before slow imports

import jax

from qlora_jax import runtime
from qlora_jax.config import DataArgs, LoraArgs
from qlora_jax.data.batching.packing import Batch
from qlora_jax.data.dataset import Dataset, load_dataset
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.io.open_model import open_model
from qlora_jax.training.compiled_programs import CompiledGradients
from qlora_jax.training.step_spec import StepSpec
from scripts.bench.support.progress import phase, phases
from scripts.bench.support.real_step import LoadedStep, load_step
from scripts.fetch_smollm2 import fetch_smollm2


class BatchSettings(TypedDict, total=False):
    """Settings of DataArgs that differ between methods."""

    packing: bool
    buckets: int


METHODS: dict[str, BatchSettings] = {
    "packed": {"packing": True},
    "4 buckets": {"buckets": 4},
    "each batch to its longest": {"buckets": 1},
    "all to the longest": {"buckets": 1},
}
CUT = "each batch to its longest"
STEP = 64


@dataclasses.dataclass
class Method:
    """One method, and its totals so far."""

    dataset: Dataset
    batches: Iterator[Batch]
    gradients: CompiledGradients
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    positions: int = 0

    def step(self, loaded: LoadedStep) -> None:
        """Computes the gradients of one batch."""
        asked = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - asked
        self.gradients.compiled(batch.inputs.shape)
        began = time.perf_counter()
        jax.block_until_ready(self.gradients(loaded.parts, batch.arrays(), None))
        self.seconds += time.perf_counter() - began
        self.tokens += batch.tokens
        self.positions += batch.inputs.size

    @property
    def waits(self) -> float:
        """Returns the share of time spent waiting for batches."""
        return self.waited / (self.waited + self.seconds)

    @property
    def padding(self) -> float:
        """Returns the share of positions that are padding."""
        return 1 - self.tokens / self.positions

    @property
    def rate(self) -> float:
        """Returns useful tokens/s."""
        return self.tokens / (self.waited + self.seconds)


def cut(batch: Batch) -> Batch:
    """Returns the batch without positions that no row fills, rounded up to a multiple of STEP."""
    length = -(-int(batch.lengths.max()) // STEP) * STEP
    arrays = {name: getattr(batch, name)[:, :, :length] for name in ("inputs", "targets", "weights")}
    return dataclasses.replace(batch, **arrays)


def abstract(loaded: LoadedStep, batch: tuple[int, int, int], *, packed: bool) -> StepSpec:
    """Returns the abstract step on batches of packs or of single rows."""
    return StepSpec(model=loaded.config, weights=loaded.weights, lora=LoraArgs(rank=16), batch=batch, packed=packed)


def main() -> None:
    """Measures all methods and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", help="a GGUF file or a Hugging Face folder (default: SmolLM2)")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20)
    args = parser.parse_args()
    runtime.start()
    path = args.model or str(fetch_smollm2())
    tokenizer = load_tokenizer(open_model(path).tokenizer)
    batch = (1, args.rows, args.max_length)
    loaded = load_step(path, rank=16, compute_dtype="auto", batch=batch, remat="names")
    methods = {}
    for name in phases("method", METHODS):
        data = DataArgs(train=args.data, max_length=args.max_length, **METHODS[name])
        dataset = load_dataset(data, tokenizer, seed=0, micro_batch_size=args.rows, accumulation=1)
        gradients = CompiledGradients(abstract(loaded, batch, packed=dataset.packed))
        batches = dataset.train_batches()
        methods[name] = Method(dataset, map(cut, batches) if name == CUT else batches, gradients)
        for _ in range(4):
            methods[name].step(loaded)
        methods[name] = dataclasses.replace(methods[name], tokens=0, seconds=0.0, waited=0.0, positions=0)
    phase(f"measuring for {len(methods) * args.seconds:g} s or more")
    for method in itertools.cycle(methods.values()):
        method.step(loaded)
        if min(each.seconds for each in methods.values()) > args.seconds:
            break
    for name, method in methods.items():
        print(f"{name:>26}: {method.rate:6.0f} tokens/s; {method.padding:5.1%} padding; waits {method.waits:.3%}")
    first, *others = (method.rate for method in methods.values())
    print("packed against the others: " + ", ".join(f"{first / other:.2f}x" for other in others))


if __name__ == "__main__":
    main()
