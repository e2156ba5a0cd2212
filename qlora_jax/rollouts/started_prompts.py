"""The prompts of a phase as replies start from them: those of the rows, with the texts of environments."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from qlora_jax.rewards.functions import Messages, RewardError
from qlora_jax.rewards.tools import Tools
from qlora_jax.rewards.worker_process import Failed
from qlora_jax.rollouts.prompt_rows import Prompt, PromptRows
from qlora_jax.rollouts.tool_template import ToolTemplate


class Asked(NamedTuple):
    """A prompt: its row's number, its ids, and the prompt as reward functions see it."""

    number: int
    ids: list[int]
    prompt: Prompt = ""


def start_prompts(
    asked: Sequence[Asked],
    prompts: PromptRows,
    tools: Tools | None,
    template: ToolTemplate | None,
    *,
    seeds: Sequence[int],
    count: int,
    longest: int,
    where: Callable[[int], str],
) -> list[Asked]:
    """Returns the prompts; with tools they are messages, and an environment adds what `reset` returns.

    The environments of a prompt's replies are reset with the same random numbers, so that the replies start alike.

    Args:
      seeds: of each prompt.
      count: replies to each prompt.
      longest: most tokens of a prompt.
      where: returns file and line of a row.

    Raises:
      RewardError: an environment failed, or a prompt with its text is too long.
    """
    started = [each._replace(prompt=prompts.prompt(each.number)) for each in asked]
    if tools is None:
        return started
    assert template is not None, "a run with tools has one"
    started = [each._replace(prompt=_messages(each.prompt)) for each in started]
    if tools.environment is None:
        return started
    columns = [{**prompts.others(each.number), "prompt": each.prompt} for each in started]
    places = [f"{where(each.number)}: {tools.environment}: " for each in asked]
    found = []
    for each, text, place in zip(started, _reset(tools, columns, seeds, count, places), places, strict=True):
        if text is not None:
            *before, last = _messages(each.prompt)
            messages = [*before, {**last, "content": f"{last.get('content') or ''}{text}"}]
            each = Asked(each.number, template.prompt(messages, prompts.variables(each.number)), messages)
        if len(each.ids) > longest:
            problem = f"found {len(each.ids)} tokens in the prompt with the text of reset, expected at most {longest}"
            raise RewardError(f"{place}{problem}. Shorten the text, or raise data.max_length")
        found.append(each)
    return found


def _messages(prompt: Prompt) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _reset(
    tools: Tools, columns: Sequence[Mapping[str, object]], seeds: Sequence[int], count: int, places: Sequence[str]
) -> list[str | None]:
    """Resets the environment of each reply; returns the text of each prompt."""
    repeated = [own for own in columns for _ in range(count)], [seed for seed in seeds for _ in range(count)]
    outcomes = tools.reset(*repeated)
    texts: list[str | None] = []
    for place, own in zip(places, itertools.batched(outcomes, count), strict=True):
        if failed := [each.text for each in own if isinstance(each, Failed)]:
            raise RewardError(f"{place}{failed[0]}. Correct reset or the row")
        different = {each for each in own if not isinstance(each, Failed)}
        if len(different) > 1:
            problem = "reset returned different texts to the replies of one prompt, which then have no common prompt"
            raise RewardError(f"{place}{problem}. Draw with `random` or NumPy, which have the same seed")
        texts.append(different.pop())
    return texts
