"""Declares the settings of `pairs`."""

import dataclasses
from pathlib import Path

from qlora_jax.config import ConfigError
from qlora_jax.config.fields import NON_NEGATIVE, NOT_EMPTY, TEMPLATE_CHOICES, setting
from qlora_jax.config.rewards import RewardArgs, check_rewards_given, reward_problems
from qlora_jax.config.rollouts import RolloutArgs, check_tools_given
from qlora_jax.config.sizes import parse_bytes
from qlora_jax.inference.settings import ComputeDtype, ModelOrRunArgs, QuantType, folder_problems, model_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsArgs(ModelOrRunArgs):
    """Preference pairs of a model's own replies, which reward functions compare."""

    prompts: str = setting(
        "file of prompts: rows with the column prompt (a text or messages) or messages (an answer at the end is "
        "dropped), or one prompt per line",
        bound=NOT_EMPTY,
        common="file of prompts: JSON Lines, or one prompt per line",
    )
    output: str = setting("JSON Lines file for the pairs", bound=NOT_EMPTY, common="JSON Lines file for the pairs")
    overwrite: bool = setting("replace output if it exists", False)
    reward: list[str] = setting(
        "a reward function as FILE.py:NAME, with TRL's signature (docs/rl.md); may be given several times",
        [],
        repeated=True,
        command_line=True,
        common="a reward function as FILE.py:NAME; may be given several times",
    )
    rewards: RewardArgs = dataclasses.field(default_factory=RewardArgs)
    rollouts: RolloutArgs = dataclasses.field(default_factory=RolloutArgs)
    seed: int = setting("seed of the draws; replies depend only on it and on the prompt's row", 0, NON_NEGATIVE)
    keep: str | None = setting(
        "folder that caches replies as they are drawn, so that a command that was stopped resumes, and other rewards "
        "score the same replies",
        None,
        NOT_EMPTY,
        common="folder that caches replies, so that a command that was stopped resumes",
    )
    chat_template: str | None = setting(f"{TEMPLATE_CHOICES}, to use instead of the model's chat template", None)
    quant_type: QuantType = setting("4-bit code of the base; auto: as in training, or nf4; none: 16 bit", "auto")
    compute_dtype: ComputeDtype = setting("auto: bfloat16 if the device computes it fast, else float32", "auto")


def check_pairs(args: PairsArgs) -> None:
    """Raises ConfigError if settings contradict each other; the message lists all contradictions."""
    problems = [*model_problems(args), *folder_problems("output", args.output)]
    if Path(args.output).exists() and not args.overwrite:
        problems.append(f"output: {args.output} exists. Choose another file, or set overwrite to true")
    wrong = reward_problems(args.rewards, args.reward, "pairs", used=True)
    try:
        if not wrong:
            check_rewards_given(args.rewards, args.reward, "pairs")
    except ValueError as error:
        wrong = [str(error)]
    try:
        parse_bytes(args.rollouts.cache)
    except ValueError as error:
        wrong.append(f"rollouts.cache: {error}")
    try:
        check_tools_given(args.rollouts, (), None)
    except ValueError as error:
        wrong.append(str(error))
    if problems + wrong:
        raise ConfigError(problems + wrong)
