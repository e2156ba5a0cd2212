"""Measures an engine: requests at once, adapters in one batch, shared beginnings, grammars and stalls, as ratios.

    python -m scripts.bench.engine [--compute_dtype auto] [--blocks 7]

SmolLM2-135M in NF4 with eight random LoRA adapters of rank 16. Each block measures every case once, one after the
other; a ratio is the median of the blocks' ratios. A grammar costs little, so it has three pairs of replies per block.
Programs are compiled before.
"""

import argparse
import collections
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import qlora_jax as q
from qlora_jax import allocator, runtime
from qlora_jax.api.provenance import parts_of
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.engine.engine import PATIENCE, Engine
from qlora_jax.inference.engine.grammar import Grammar
from qlora_jax.inference.engine.request import Request
from qlora_jax.models.partition import ModelParts, partition
from scripts.fetch_smollm2 import fetch_smollm2

TOKENS = 64  # per reply
RUNS = 8


def main() -> None:
    """Prints one line per ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute_dtype", default="auto")
    parser.add_argument("--blocks", type=int, default=7)
    args = parser.parse_args()
    runtime.start()
    model, tokenizer = q.load(str(fetch_smollm2()), quant_type="nf4", compute_dtype=args.compute_dtype)
    alone = Engine(parts_of(model), tokenizer, cache_bytes=256 << 20)
    adapters = {f"run{number}": _random_run(model, number) for number in range(RUNS)}
    shared = Engine(parts_of(model), tokenizer, adapters=adapters, cache_bytes=256 << 20)
    cases = _cases(alone, shared, tokenizer)
    grammar = cases.pop("with a grammar")
    seconds = collections.defaultdict[str, list[float]](list)
    for block in range(args.blocks + 1):
        for name, measure in cases.items():
            measured = measure(block)
            if block:  # the first compiles
                seconds[name].append(measured)
    _print(seconds, _grammar_changes(grammar, cases["1 at once"], 3 * args.blocks))


def _grammar_changes(with_grammar: Callable[[int], float], without: Callable[[int], float], pairs: int) -> list[float]:
    """Returns how much longer a token takes with a grammar, in pairs of neighbouring replies whose order alternates."""
    changes = []
    for pair in range(pairs):
        order = (with_grammar, without) if pair % 2 else (without, with_grammar)
        first, second = (measure(pair) for measure in order)
        changes.append((first / second if pair % 2 else second / first) - 1)
    return changes


def _random_run(model: object, number: int) -> ModelParts:
    adapted = q.add_adapter(model, q.LoRA(rank=16), key=jax.random.key(number))
    parts, rng = partition(adapted), np.random.default_rng(number)
    return parts.with_lora(
        jax.tree.map(lambda x: x + jnp.asarray(0.01 * rng.normal(size=x.shape), x.dtype), parts.lora)
    )


def _cases(alone: Engine, shared: Engine, tokenizer: Tokenizer) -> dict[str, Callable[[int], float]]:
    """Returns functions of the block's number that return seconds, by name."""
    words = tokenizer.encode("The river runs through the old town and past the mill. ")

    def requests(count: int, block: int, **settings: object) -> list[Request]:
        made = [[*tokenizer.encode(f"{block} {row} "), *words] for row in range(count)]
        return [Request(prompt=prompt, max_new_tokens=TOKENS, **settings) for prompt in made]  # pyright: ignore[reportArgumentType]

    def on_runs(count: int, block: int) -> list[Request]:
        return [
            Request(prompt=one.prompt, max_new_tokens=TOKENS, adapter=f"run{row % count}")
            for row, one in enumerate(requests(RUNS, block))
        ]

    long = (words * 100)[:1000]
    any_text = Grammar(kind="regex", text=r"(.|\n)*")

    def alone_in_its_row(block: int, **settings: object) -> float:
        # After more rows, calls get one row again when PATIENCE of them were half empty.
        _seconds(alone, [Request(prompt=words, max_new_tokens=PATIENCE + 2)])
        return _decoding(alone, requests(1, block, **settings))

    def first_token(block: int) -> float:
        prompt = [*tokenizer.encode(f"{block}. "), *long]
        return _seconds(alone, [Request(prompt=prompt, max_new_tokens=1)])

    def repeated(block: int) -> float:
        prompt = [*tokenizer.encode(f"{block}. "), *long]
        return _seconds(alone, [Request(prompt=[*prompt[:1000], *words[:8]], max_new_tokens=1)])

    return {
        "1 at once": alone_in_its_row,
        "with a grammar": lambda block: alone_in_its_row(block, grammar=any_text),
        **{f"{n} at once": lambda block, n=n: _decoding(alone, requests(n, block)) / n for n in (2, 4, 8, 16)},
        "8 on one adapter": lambda block: _decoding(shared, on_runs(1, block)) / RUNS,
        "8 on eight adapters": lambda block: _decoding(shared, on_runs(RUNS, block)) / RUNS,
        "1,000 tokens, new": first_token,
        "1,000 tokens, repeated": repeated,
        "longest wait beside a prompt": lambda block: _longest_wait(alone, requests(1, block)[0], [*long, block]),
    }


def _seconds(engine: Engine, requests: Sequence[Request]) -> float:
    began = time.perf_counter()
    for _ in engine.stream(requests):
        pass
    return time.perf_counter() - began


def _decoding(engine: Engine, requests: Sequence[Request]) -> float:
    """Returns the seconds per token of each reply, between the first and the last time that all replies run."""
    counts = [0] * len(requests)
    times: list[float] = []
    for step in engine.stream(requests):
        counts[step.request] += 1
        if min(counts) == len(times) + 1:
            times.append(time.perf_counter())
    return (times[-2] - times[0]) / (len(times) - 2)


def _longest_wait(engine: Engine, request: Request, prompt: Sequence[int]) -> float:
    """Returns the longest time between two tokens of a reply while another prompt of 1,000 tokens is read."""
    number = engine.submit(request)
    waits, last, other = [], time.perf_counter(), None
    while engine.busy:
        for step in engine.step():
            if step.request == number:
                waits.append(time.perf_counter() - last)
                last = time.perf_counter()
        if other is None and len(waits) == 8:
            other = engine.submit(Request(prompt=prompt, max_new_tokens=1))
    return max(waits[8:])


def _print(seconds: Mapping[str, Sequence[float]], grammar_changes: Sequence[float]) -> None:
    def ratio(name: str, to: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[name], seconds[to], strict=True))

    one = "1 at once"
    for rows in (2, 4, 8, 16):
        print(f"{rows:>2} requests at once: {ratio(one, f'{rows} at once'):.2f}x the tokens per second of one")
    print(f"8 requests on 8 adapters: {ratio('8 on one adapter', '8 on eight adapters'):.2f}x of 8 on one")
    print(f"8 requests on one adapter: {ratio('8 at once', '8 on one adapter'):.2f}x of 8 on the base")
    low, middle, high = statistics.quantiles(grammar_changes)
    print(f"a grammar: {middle:+.1%} per token, quartiles {low:+.1%} and {high:+.1%}")
    sooner = ratio("1,000 tokens, new", "1,000 tokens, repeated")
    print(f"a repeated beginning of 1,000 tokens: {sooner:.1f}x sooner to the first token")
    print(f"a prompt of 1,000 tokens beside a reply: {ratio('longest wait beside a prompt', one):.1f} tokens late")
    print(f"one token of one request: {1e3 * statistics.median(seconds[one]):.2f} ms")


if __name__ == "__main__":
    allocator.tune()
    main()
