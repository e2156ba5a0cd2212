"""Declares the settings of rollouts: how the model samples the replies that it learns from. Section `rollouts`."""

import dataclasses

from qlora_jax.config.fields import AT_LEAST_ONE, AT_LEAST_TWO, NON_NEGATIVE, POSITIVE, UP_TO_ONE, setting

FULL = "; any restriction makes the sampler another distribution than the one that the loss scores"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutArgs:
    """Replies that grpo samples to each prompt, with TRL's names and defaults (docs/rl.md)."""

    num_generations: int = setting(
        "replies to each prompt, which are compared with each other", 8, AT_LEAST_TWO, common="replies to each prompt"
    )
    max_completion_length: int = setting(
        "maximum tokens per reply; data.max_length limits prompt and reply together",
        512,
        AT_LEAST_ONE,
        common="maximum tokens per reply",
    )
    temperature: float = setting("temperature of the draws; the loss divides the logits by it, too", 1.0, POSITIVE)
    top_p: float = setting(f"draws from the fewest likeliest tokens with this probability{FULL}", 1.0, UP_TO_ONE)
    top_k: int = setting(f"draws from this many likeliest tokens; 0: all{FULL}", 0, NON_NEGATIVE)
    min_p: float = setting(
        f"draws from tokens with at least this share of the likeliest token's probability; 0: all{FULL}", 0.0, UP_TO_ONE
    )
    cache: str = setting(
        "device memory for keys and values while replies are sampled, such as 512MiB. Replies wait for room in it. It "
        "is free while the gradient is computed",
        "1GiB",
    )
