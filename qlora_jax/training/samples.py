"""What the model writes while it trains: replies to the same prompts at every evaluation."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.config.schema import TrainArgs
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.decode import generate
from qlora_jax.inference.prompts import encode_prompts, prompter, read_prompts, stop_ids
from qlora_jax.inference.sampling import Sampling
from qlora_jax.io.model_source import ModelSource
from qlora_jax.models.partition import ModelParts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Prompts, and how they are answered: greedily, so that two steps differ by what was learned alone.

    Attributes:
      rows: of the prompts' file; `ids`: of each, as the model reads it.
      stops: ids that end a reply.
    """

    rows: Sequence[Mapping[str, Any]]
    ids: Sequence[list[int]]
    tokenizer: Tokenizer
    stops: frozenset[int]
    max_new_tokens: int

    def replies(self, parts: ModelParts, step: int) -> list[dict[str, Any]]:
        """A record for each prompt: its columns, `step`, `reply`, and `end`, why the reply ends there."""
        how = {"sampling": Sampling(), "max_new_tokens": self.max_new_tokens, "stop_ids": self.stops}
        replies = generate(parts, self.ids, **how)
        return [
            {"step": step, "prompt": row, "reply": self.tokenizer.decode(reply.ids), "end": reply.end}
            for row, reply in zip(self.rows, replies, strict=True)
        ]


def open_samples(train: TrainArgs, tokenizer: Tokenizer, source: ModelSource, max_positions: int) -> Samples | None:
    """The prompts of `train.samples`; None where it names none.

    Raises:
      ValueError: rows that are no prompts, or leave the model no room for a reply: all of them.
    """
    if train.samples is None:
        return None
    asking = prompter(tokenizer, raw=False, system=None)
    rows = read_prompts(train.samples)
    return Samples(
        rows=[row.data for row in rows],
        ids=encode_prompts(train.samples, rows, asking, max_positions),
        tokenizer=tokenizer,
        stops=stop_ids(tokenizer, source.tokenizer["stop_token_ids"], chat=asking.chat),
        max_new_tokens=train.sample_tokens,
    )
