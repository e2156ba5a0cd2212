"""Measures decoding on this GPU: attention over pages, and tokens per second of Llama-3-8B's shape on random weights.

    JAX_PLATFORMS=cuda,cpu python -m scripts.bench.gpu.decode --output runs/decode_gpu.json
    JAX_PLATFORMS=cpu python -m scripts.bench.gpu.decode --rehearse

Attention is that of many layers in one program, each with its own pages, so that caches of the card do not serve them.
GB/s are those of keys, values and scales that the rows see, next to XLA's loops over all pages. Tokens per second are
those of `inference.decode` after a prompt, without the prompt. --rehearse runs everything small on a CPU, with the
interpreted kernel; its figures are meaningless.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.attention import gpu, reference
from pallas_kernels.attention.dispatch import choose_decoding
from pallas_kernels.attention.mosaic.decode_instructions import Interpreted
from pallas_kernels.attention.pages import KVPages
from pallas_kernels.attention.tiles import ScoreScaling
from pallas_kernels.devices import target_device
from pallas_kernels.synthetic_weights import synthetic_like
from qlora_jax import runtime
from qlora_jax.config import LoraArgs
from qlora_jax.inference.decode import stream
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.partition import ModelParts
from qlora_jax.training.step_spec import StepSpec
from scripts.bench.gpu import train_step
from scripts.bench.gpu.matmuls import Record
from scripts.bench.support.progress import phases

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
LAYERS = 8  # one program has so many
DTYPE = jnp.bfloat16
WARM_UP, SAMPLES = 3, 10
BATCHES, PROMPT, NEW_TOKENS = (1, 8, 16), 512, 64


class Case(NamedTuple):
    """Rows of so many positions in pages of a dtype."""

    rows: int
    positions: int
    stored: DTypeLike

    @property
    def bytes(self) -> int:
        """The bytes of keys and values of one layer, with scales."""
        item = jnp.dtype(self.stored).itemsize
        return 2 * self.rows * self.positions * KV_HEADS * (HEAD_DIM * item + (4 if item == 1 else 0))


CASES = (
    Case(1, 4096, DTYPE),
    Case(16, 4096, DTYPE),
    Case(16, 4096, jnp.int8),
    Case(64, 2048, jnp.int8),
    Case(1, 32768, DTYPE),
)
TINY = (Case(1, 70, jnp.int8),)


def attention(case: Case, layers: int, heads: int) -> Record:
    """Returns the seconds of one layer by implementation, and failures by implementation."""
    kv_heads = min(KV_HEADS, heads)
    pages = KVPages.for_rows(layers, case.rows, case.positions, (kv_heads, HEAD_DIM), case.stored)
    pages = dataclasses.replace(synthetic_like(dataclasses.replace(pages, pages_LRI=None)), pages_LRI=pages.pages_LRI)
    q = synthetic_like(jax.ShapeDtypeStruct((case.rows, 1, heads, HEAD_DIM), DTYPE))
    rows, positions = jnp.arange(case.rows)[:, None], jnp.full((case.rows, 1), case.positions - 1)
    found: Record = {"rows": case.rows, "positions": case.positions, "stored": jnp.dtype(case.stored).name}
    found |= {"bytes": case.bytes, "seconds": {}, "failures": {}}

    def of_layers(attend, q, pages):
        def one(layer, q):
            return attend(q, pages, layer, rows, positions, None, ScoreScaling(HEAD_DIM**-0.5, None), None)

        return jax.lax.fori_loop(0, layers, one, q)

    for name, attend in (("mma", gpu.paged_attention), ("reference", reference.paged_attention)):
        run = jax.jit(functools.partial(of_layers, attend))
        try:
            found["seconds"][name] = _seconds(lambda run=run: run(q, pages)) / layers
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            found["failures"][name] = str(error)[:500]
    return found


def _seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(WARM_UP + SAMPLES):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_UP:])


def tokens(parts: ModelParts, vocabulary: int, rows: int, prompt: int, new_tokens: int) -> Record:
    """Returns the tokens per second of so many rows, from the second token on, after a reply that compiles."""
    prompts = np.random.default_rng(0).integers(3, vocabulary, (rows, prompt)).tolist()
    for _ in range(2):
        moments = []
        how = {"sampling": Sampling(), "max_new_tokens": new_tokens, "stop_ids": ()}
        began = time.perf_counter()
        for _ in stream(parts, prompts, **how):
            moments.append(time.perf_counter() - began)
    first, last = moments[rows - 1], moments[-1]
    return {"rows": rows, "first_s": first, "tokens_per_s": rows * (new_tokens - 1) / (last - first)}


def model_parts(config: ModelConfig) -> ModelParts:
    """Returns random weights in NF4."""
    step = StepSpec(model=config, weights=WeightFormat(platform="gpu"), lora=LoraArgs(), batch=(1, 1, 64))
    return synthetic_like(step.arrays.parts)


def lines(record: Record) -> Iterator[str]:
    """Yields one line for attention, and one for each failure."""
    rates = "  ".join(f"{name} {record['bytes'] / took / 1e9:,.0f}" for name, took in record["seconds"].items())
    what = f"{record['rows']} rows of {record['positions']} positions in {record['stored']}"
    yield f"attention over pages, {what}: GB/s {rates}"
    yield from (f"  FAILED {name}: {why}" for name, why in record["failures"].items())


def main() -> None:
    """Measures attention, then tokens, and exits with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, small, with the interpreted kernel")
    args = parser.parse_args()
    runtime.start()
    device = target_device()
    choice = choose_decoding(device, DTYPE.dtype, HEAD_DIM, "int8")
    if args.rehearse:
        gpu.decoding_instructions = lambda: functools.partial(Interpreted, params=plgpu.InterpretGPUParams())
    elif choice.name != "mma":
        raise SystemExit(f"bench.gpu.decode: no kernel on {device}: {choice.refusals or 'not a GPU'}")
    cases, layers, heads = (TINY, 1, 2) if args.rehearse else (CASES, LAYERS, HEADS)
    result: Record = {"device": str(device), "rehearsed": args.rehearse, "attention": [], "tokens": []}
    for case in phases("attention over pages of", cases):
        result["attention"].append(attention(case, layers, heads))
        print("\n".join(lines(result["attention"][-1])), flush=True)
    config, _ = train_step.setting(PROMPT, args.rehearse)
    parts, prompt, count = model_parts(config), *((40, 4) if args.rehearse else (PROMPT, NEW_TOKENS))
    for rows in phases("decoding rows:", BATCHES[:1] if args.rehearse else BATCHES):
        result["tokens"].append(tokens(parts, config.vocab_size, rows, prompt, count))
        print(
            "decoding {rows} rows: {tokens_per_s:,.0f} tokens/s, first after {first_s:.2f} s".format(
                **result["tokens"][-1]
            )
        )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1))
    raise SystemExit(int(any(record["failures"] for record in result["attention"])))


if __name__ == "__main__":
    main()
