"""Samples the replies to prompts with the model that is being trained: no second copy of its weights, no cache after.

Draws depend on the seed, the prompt and the number of the reply alone, not on what is sampled beside them.
"""

from collections.abc import Callable, Sequence

import numpy as np

from qlora_jax.config.rollouts import RolloutArgs
from qlora_jax.config.sizes import parse_bytes
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.decode import cache_bytes
from qlora_jax.inference.engine.engine import Engine
from qlora_jax.inference.engine.request import Request, Step
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.models.partition import ModelParts
from qlora_jax.rollouts.reply import Reply

Draw = Callable[[Sequence[Request]], list[Reply]]
GoOnWithTools = Callable[[Sequence[Request], Sequence[Reply], Draw], list[Reply]]


def sampling_of(settings: RolloutArgs, seed: int) -> Sampling:
    """Returns the settings of one prompt's draws."""
    kept = {"top_k": settings.top_k, "top_p": settings.top_p, "min_p": settings.min_p}
    return Sampling(temperature=settings.temperature, seed=seed, **kept)


def draw_seed(*numbers: int) -> int:
    """Returns the seed of the draws that these numbers name, such as (the run's seed, step, row)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def rollout_engine(
    parts: ModelParts, tokenizer: Tokenizer, settings: RolloutArgs, *, longest: int, most: int
) -> Engine:
    """Returns an engine for a phase; the arguments are those of `sample_replies`."""
    needed = cache_bytes(parts, [longest + settings.max_completion_length] * most)
    return Engine(parts, tokenizer, cache_bytes=min(needed, parse_bytes(settings.cache)))


def sample_replies(
    parts: ModelParts,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    settings: RolloutArgs,
    *,
    count: int,
    longest: int,
    most: int,
    stop_ids: frozenset[int],
    go_on: Callable[[int], None] = lambda replies: None,
    with_tools: GoOnWithTools | None = None,
) -> list[list[Reply]]:
    """Returns `count` replies to each prompt, which is computed once for all of them.

    Args:
      parts: the model, with its adapter.
      samplings: settings of each prompt's draws.
      longest, most: tokens of the longest prompt, and number of replies, of all calls of a run. The cache has room for
        them, because another size would be another program to compile.
      go_on: called after each token of all replies with the number of complete replies; it raises to end the sampling.
      with_tools: continues replies that call tools; it gets the requests, the replies of the first turn, and a function
        that draws further turns. None: replies have one turn.

    Raises:
      ValueError: the cache has no room for one reply.
    """
    length = settings.max_completion_length
    engine = rollout_engine(parts, tokenizer, settings, longest=longest, most=most)
    requests = [
        Request(
            prompt=prompt,
            max_new_tokens=length,
            sampling=sampling,
            stop_ids=stop_ids,
            keep_stop=True,
            repeat=repeat,
            likeliest=0,
            score_draw=True,
        )
        for prompt, sampling in zip(prompts, samplings, strict=True)
        for repeat in range(count)
    ]

    def draw(requests: Sequence[Request]) -> list[Reply]:
        steps: list[list[Step]] = [[] for _ in requests]
        done = count * len(prompts) - len(requests)
        for step in engine.stream(requests):
            steps[step.request].append(step)
            done += step.end is not None
            go_on(done)
        return [_turn(own) for own in steps]

    replies = draw(requests)
    if with_tools is not None:
        replies = with_tools(requests, replies, draw)
    return [replies[at : at + count] for at in range(0, len(replies), count)]


def _turn(steps: Sequence[Step]) -> Reply:
    drawn = [step.scored for step in steps if step.token is not None and step.scored is not None]
    end, text = steps[-1].end, "".join(step.text for step in steps)
    assert end is not None
    return Reply(
        ids=[scored.token for scored in drawn],
        logps=[scored.log_p for scored in drawn],
        drawn=[True] * len(drawn),
        text=text,
        end=end,
        messages=[{"role": "assistant", "content": text}],
    )
