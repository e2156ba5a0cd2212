"""Sampled replies in the form that reward functions get."""

from collections.abc import Callable, Sequence

from qlora_jax.rewards.functions import Replies
from qlora_jax.rollouts.prompt_rows import Prompt, PromptRows
from qlora_jax.rollouts.reply import Reply


def replies_to_score(
    prompts: PromptRows,
    numbers: Sequence[int],
    groups: Sequence[Sequence[Reply]],
    where: Callable[[int], str],
    *,
    step: int,
    steps: int = 0,
    asking: Sequence[Prompt] | None = None,
    environments: bool = False,
) -> Replies:
    """Returns the replies to rows with these numbers, as reward functions get them.

    Args:
      where: returns file and line of a row.
      step, steps: see `Replies`.
      asking: the prompts, if they are not those of the rows.
      environments: each reply has one, with its number.
    """
    asking = [prompts.prompt(number) for number in numbers] if asking is None else asking
    asked = zip(numbers, asking, groups, strict=True)
    pairs = [(number, prompt, reply) for number, prompt, group in asked for reply in group]
    others = {number: prompts.others(number) for number in numbers}
    return Replies(
        prompts=[prompt for _, prompt, _ in pairs],
        completions=[reply.text if isinstance(prompt, str) else reply.messages for _, prompt, reply in pairs],
        completion_ids=[reply.ids for _, _, reply in pairs],
        columns={name: [others[number].get(name) for number, _, _ in pairs] for name in prompts.names},
        labels=[where(number) for number, _, _ in pairs],
        step=step,
        steps=steps,
        environments=[*range(len(pairs))] if environments else None,
        given=[reply.given for _, _, reply in pairs if reply.given is not None],
    )
