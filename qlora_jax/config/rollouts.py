"""Declares the settings of rollouts, the replies that a policy samples: section `rollouts`, with TRL's names."""

import dataclasses
from collections.abc import Sequence

from qlora_jax.config.fields import (
    AT_LEAST_ONE,
    AT_LEAST_TWO,
    BELOW_ONE,
    NON_NEGATIVE,
    NOT_EMPTY,
    POSITIVE,
    Bound,
    setting,
)

_PART = Bound("more than 0, up to 1", lambda value: 0 < value <= 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutArgs:
    """Sampling of replies to prompts. With top_p, top_k or min_p, losses score another distribution than the drawn."""

    num_generations: int = setting("replies to each prompt, whose rewards are compared", 8, AT_LEAST_TWO)
    max_completion_length: int = setting("maximum tokens per reply", 512, AT_LEAST_ONE)
    temperature: float = setting("logits are divided by it, in sampling and in the loss", 1.0, POSITIVE)
    top_p: float = setting(
        "sample from the likeliest tokens of this total probability; below 1, the loss scores another distribution "
        "than the one drawn from",
        1.0,
        _PART,
    )
    top_k: int = setting("sample from this many likeliest tokens, with the same caveat; 0: all", 0, NON_NEGATIVE)
    min_p: float = setting(
        "sample from tokens of at least this fraction of the largest probability, with the same caveat; 0: all",
        0.0,
        BELOW_ONE,
    )
    cache: str = setting("limit of the bytes of keys and values of all replies", "1GiB", NOT_EMPTY)
    max_tool_calling_iterations: int | None = setting(
        "turns of a reply that tools answer; null: no limit but max_completion_length", None, AT_LEAST_ONE
    )
    tool_timeout: float = setting(
        "seconds of one call of a tool or of an environment; for those of verifiers, between two events", 10.0, POSITIVE
    )


def check_tools_given(settings: RolloutArgs, tools: Sequence[str], environment: str | None) -> None:
    """Raises ValueError for settings of tools in a run without tools.

    It is checked when a run starts: the settings of a finished run lack --tool and --environment.
    """
    plain = RolloutArgs()
    if tools or environment is not None:
        return
    for name in ("max_tool_calling_iterations", "tool_timeout"):
        if (found := getattr(settings, name)) != getattr(plain, name):
            raise ValueError(f"rollouts.{name}: found {found!r} without --tool and --environment. Remove this setting")
