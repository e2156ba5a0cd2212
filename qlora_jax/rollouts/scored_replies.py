"""Sampled replies in the form that reward functions get."""

from collections.abc import Callable, Sequence

from qlora_jax.rewards.functions import Replies
from qlora_jax.rollouts.prompt_rows import PromptRows
from qlora_jax.rollouts.sampler import Reply


def replies_to_score(
    prompts: PromptRows,
    numbers: Sequence[int],
    groups: Sequence[Sequence[Reply]],
    where: Callable[[int], str],
    *,
    step: int,
    steps: int = 0,
) -> Replies:
    """Returns the replies to rows with these numbers, as reward functions get them.

    Args:
      where: returns file and line of a row.
      step, steps: see `Replies`.
    """
    pairs = [(number, reply) for number, group in zip(numbers, groups, strict=True) for reply in group]
    asking = {number: prompts.prompt(number) for number in numbers}
    others = {number: prompts.others(number) for number in numbers}
    return Replies(
        prompts=[asking[number] for number, _ in pairs],
        completions=[
            reply.text if isinstance(asking[number], str) else [{"role": "assistant", "content": reply.text}]
            for number, reply in pairs
        ],
        completion_ids=[reply.ids for _, reply in pairs],
        columns={name: [others[number].get(name) for number, _ in pairs] for name in prompts.names},
        labels=[where(number) for number, _ in pairs],
        step=step,
        steps=steps,
    )
