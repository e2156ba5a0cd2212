"""The prompts and the rewards of a run that samples replies, checked before any weight is read."""

import dataclasses

import jax

from qlora_jax.config import Config
from qlora_jax.data.batching.packing import UNIT
from qlora_jax.data.dataset import Dataset, padding_id
from qlora_jax.inference.prompts import stop_ids
from qlora_jax.model_source import ModelSource
from qlora_jax.rewards.digests import RewardFile, reward_digests
from qlora_jax.rewards.functions import RewardFunctions
from qlora_jax.rollouts.prompt_rows import PromptRows, read_prompt_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutInputs:
    """The prompts and the rewards of a run.

    Attributes:
      prompts, held_out: rows of the training and the held-out prompts.
      lengths: padded lengths of the rows that are trained on.
      stop_ids: ids with which the model ends a reply.
      pad_id: id at padding positions.
      reward_files: the files of reward functions, with their digests.
    """

    prompts: PromptRows
    held_out: PromptRows | None
    rewards: RewardFunctions
    lengths: tuple[int, ...]
    stop_ids: frozenset[int]
    pad_id: int
    reward_files: dict[str, RewardFile]


def row_lengths(longest_prompt: int, completion: int, replies: int, most: int) -> tuple[int, ...]:
    """Returns the padded lengths of rows: at most `most`, evenly spaced up to the longest row that there can be.

    Args:
      longest_prompt: tokens of the longest prompt.
      completion: the most tokens of a reply.
    """
    longest = longest_prompt - 1 + replies * completion
    steps = -(-longest // UNIT)
    return tuple(sorted({-(-steps * part // most) * UNIT for part in range(1, most + 1)}))


def open_rollouts(config: Config, dataset: Dataset, source: ModelSource) -> RolloutInputs:
    """Reads the rows' other columns, and starts the processes of the reward functions.

    Raises:
      ValueError: a reward function cannot be imported, or does not fit the rows; or several processes train.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"objective: {config.objective} trains in one process, on any number of its devices (found "
            f"{jax.process_count()} processes). Start one process"
        )
    data, settings, tokenizer = config.data, config.rollouts, dataset.tokenizer
    forms = {split.path: split.form for split, _ in dataset.report.sources}
    prompts = read_prompt_rows(data, dataset.train.files, forms)
    held_out = None
    if dataset.eval is not None and dataset.report.eval is not None:
        forms |= {} if data.eval is None else {data.eval: dataset.report.eval.form}
        held_out = read_prompt_rows(data, dataset.eval.files, forms)
    rewards = RewardFunctions(config.rewards, config.reward)
    rewards.check_columns(prompts.names)
    shape = dataset.buckets[-1], settings.max_completion_length, settings.num_generations
    return RolloutInputs(
        prompts=prompts,
        held_out=held_out,
        rewards=rewards,
        lengths=row_lengths(*shape, data.buckets),
        stop_ids=stop_ids(tokenizer, source.tokenizer["stop_token_ids"], chat=tokenizer.chat_template is not None),
        pad_id=padding_id(tokenizer),
        reward_files=reward_digests(config.reward),
    )
