"""Compares the sampling of a rollout phase with an engine's own speed, and with scoring its replies once more.

    python -m scripts.bench.rollout_sampling [--prompts 8] [--generations 8] [--length 32] [--blocks 5]

SmolLM2-135M in NF4 with an adapter of rank 16. Each block samples the same number of replies of the same length in
each way, in turn; no reply ends early. Ratios are medians over the blocks, of time and of processor time.
Programs are compiled before. The prompts of a block are longer than those of the one before.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import jax

import qlora_jax as q
from qlora_jax import allocator, runtime
from qlora_jax.api.provenance import parts_of
from qlora_jax.config.rollouts import RolloutArgs
from qlora_jax.inference.engine.engine import Engine
from qlora_jax.inference.engine.request import Request
from qlora_jax.rollouts.sampler import Reply, sample_replies, sampling_of
from scripts.fetch_smollm2 import fetch_smollm2

LONGEST = 64  # tokens of a prompt

Seconds = tuple[float, float]  # time and processor time


def main() -> None:
    """Prints a line per block, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompts", 8), ("generations", 8), ("length", 32), ("blocks", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compute_dtype", default="auto")
    args = parser.parse_args()
    runtime.start()
    model, tokenizer = q.load(str(fetch_smollm2()), quant_type="nf4", compute_dtype=args.compute_dtype)
    parts = parts_of(q.add_adapter(model, q.LoRA(rank=16), key=jax.random.key(0)))
    engine = Engine(parts, tokenizer, cache_bytes=256 << 20)
    settings = RolloutArgs(num_generations=args.generations, max_completion_length=args.length)
    found: dict[str, list[Seconds]] = {"engine": [], "rollouts": [], "scoring again": []}
    for block in range(args.blocks + 1):
        words = "far " * (3 * block)
        prompts = [
            tokenizer.encode(f"{block}.{row}: tell me a {words}story about rivers.") for row in range(args.prompts)
        ]
        samplings = [sampling_of(settings, 100 * block + row) for row in range(args.prompts)]
        how = {"count": args.generations, "longest": LONGEST, "most": args.prompts * args.generations}
        groups: list[list[Reply]] = []

        def sample(prompts=prompts, samplings=samplings, how=how, groups=groups) -> None:
            groups += sample_replies(parts, tokenizer, prompts, samplings, settings, **how, stop_ids=frozenset())

        seconds = {"rollouts": _seconds(sample)}
        drawn = [
            Request(prompt=ids, max_new_tokens=args.length, sampling=sampling, repeat=repeat)
            for ids, sampling in zip(prompts, samplings, strict=True)
            for repeat in range(args.generations)
        ]
        whole = [[*ids, *reply.ids] for ids, group in zip(prompts, groups, strict=True) for reply in group]
        scored = [Request(prompt=ids, max_new_tokens=0, score_prompt=True, likeliest=0) for ids in whole]
        for name, requests in (("engine", drawn), ("scoring again", scored)):
            seconds[name] = _seconds(lambda requests=requests: _run(engine, requests))
        print(
            f"block {block}:",
            {name: [round(value, 2) for value in values] for name, values in seconds.items()},
            flush=True,
        )
        for name, values in seconds.items():
            found[name] += [values] if block else []  # the first compiles
    _print_ratios(found, args.prompts * args.generations * args.length)


def _run(engine: Engine, requests: Sequence[Request]) -> None:
    for _ in engine.stream(requests):
        pass


def _seconds(work: Callable[[], None]) -> Seconds:
    began, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - used


def _print_ratios(found: dict[str, list[Seconds]], tokens: int) -> None:
    for name, values in found.items():
        pairs = [
            [own / each for own, each in zip(*both, strict=True)] for both in zip(found["engine"], values, strict=True)
        ]
        of_time, of_processor = (statistics.median(ratios) for ratios in zip(*pairs, strict=True))
        speed = tokens / statistics.median(wall for wall, _ in values)
        print(
            f"{name}: {speed:,.0f} tokens per second, {of_time:.2f}x of the engine's own, {of_processor:.2f}x in "
            "processor time"
        )


if __name__ == "__main__":
    allocator.tune()
    main()
