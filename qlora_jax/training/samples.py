"""Sample replies during training: the same prompts, answered at every evaluation."""

import dataclasses
from collections.abc import Mapping, Sequence

from qlora_jax.config.schema import TrainArgs
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.decode import generate
from qlora_jax.inference.prompts import encode_prompts, prompter, read_prompts, stop_ids
from qlora_jax.inference.sampling import Sampling
from qlora_jax.model_source import ModelSource
from qlora_jax.models.partition import ModelParts
from qlora_jax.training.metrics.metrics_file import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Prompts that are answered greedily, so that the replies of two steps differ only by what was learned.

    Attributes:
      rows: the rows of the prompts' file.
      ids: the token ids of each prompt.
      stops: the ids that end a reply.
      max_new_tokens: the maximum length of a reply.
    """

    rows: Sequence[Mapping[str, object]]
    ids: Sequence[list[int]]
    tokenizer: Tokenizer
    stops: frozenset[int]
    max_new_tokens: int

    def replies(self, parts: ModelParts, step: int) -> list[Record]:
        """Returns a record per prompt: `step`, `prompt` (its columns), `reply`, and `end` (why the reply ended)."""
        replies = generate(
            parts, self.ids, sampling=Sampling(), max_new_tokens=self.max_new_tokens, stop_ids=self.stops
        )
        return [
            {"step": step, "prompt": row, "reply": self.tokenizer.decode(reply.ids), "end": reply.end}
            for row, reply in zip(self.rows, replies, strict=True)
        ]


def open_samples(train: TrainArgs, tokenizer: Tokenizer, source: ModelSource, max_positions: int) -> Samples | None:
    """Opens the prompts of `train.samples`; returns None if it is not set.

    Raises:
      ValueError: rows that are not prompts, or that leave no positions for a reply; lists all of them.
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
