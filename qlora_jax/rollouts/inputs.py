"""The prompts of a run that samples replies, read before any weight."""

import dataclasses

from qlora_jax.data.batching.packing import UNIT
from qlora_jax.rewards.digests import CodeDigests
from qlora_jax.rollouts.prompt_rows import PromptRows
from qlora_jax.rollouts.tool_template import ToolTemplate


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutInputs:
    """The prompts of a run, and what its replies need.

    Attributes:
      prompts, held_out: rows of the training and the held-out prompts.
      longest_prompt, most_replies: tokens of the longest prompt that there can be, and replies that are sampled
        together at most.
      lengths: padded lengths of the rows that are trained on.
      stop_ids: ids with which the model ends a reply.
      pad_id: id at padding positions.
      template: writes tools, if there are any.
      code: the files that the command line names, with their digests.
    """

    prompts: PromptRows
    held_out: PromptRows | None
    longest_prompt: int
    most_replies: int
    lengths: tuple[int, ...]
    stop_ids: frozenset[int]
    pad_id: int
    template: ToolTemplate | None
    code: CodeDigests


def row_lengths(longest_prompt: int, completion: int, replies: int, most: int) -> tuple[int, ...]:
    """Returns the padded lengths of rows: at most `most`, evenly spaced up to the longest row that there can be.

    Args:
      longest_prompt: tokens of the longest prompt.
      completion: the most tokens of a reply.
    """
    longest = longest_prompt - 1 + replies * completion
    steps = -(-longest // UNIT)
    return tuple(sorted({-(-steps * part // most) * UNIT for part in range(1, most + 1)}))
