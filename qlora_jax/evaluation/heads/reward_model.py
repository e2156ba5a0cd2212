"""Rewards of replies by a model that was trained with objective=reward. It stays in this process' memory."""

from collections.abc import Mapping, Sequence

from qlora_jax.data.readers.files import Place, Row
from qlora_jax.evaluation.heads.predictions import encode_texts
from qlora_jax.io.pretrained import apply_adapter, load_base, open_finetuned
from qlora_jax.models.partition import ModelParts

Text = str | Sequence[Mapping[str, object]]


class RewardModel:
    """The reward model of a run's folder; `load` reads its weights.

    Attributes:
      opened: its settings and features, from which its memory is known before it is loaded.

    Raises:
      ValueError: the folder is not that of a run with objective=reward.
    """

    def __init__(self, run: str):
        self.opened = open_finetuned(run)
        head = None if self.opened.run is None else self.opened.run.head
        if head is None or head.objective != "reward":
            found = "a model without a sequence head" if head is None else f"objective={head.objective}"
            raise ValueError(
                f"rewards.run: {run} gives no rewards (found {found}, expected objective=reward). Name one"
            )
        self._head = head
        self._parts: ModelParts | None = None

    @property
    def is_loaded(self) -> bool:
        """True after `load`."""
        return self._parts is not None

    def load(self) -> None:
        """Loads base and adapter; raises ValueError if a file is damaged, or is not the run's base."""
        run = self.opened.run
        assert run is not None
        self._parts = apply_adapter(load_base(self.opened, self.opened.args), run)

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """Returns the reward of each reply; raises ValueError that lists replies which are too long."""
        assert self._parts is not None, "load it first"
        rows = [
            Row(
                Place(number + 1, number),
                {"prompt": prompt, "completion": completion}
                if isinstance(prompt, str)
                else {"messages": [*prompt, *completion]},
            )
            for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        opened = self.opened
        texts = encode_texts("replies", rows, self._head, opened.tokenizer, opened.features.max_positions)
        return texts.outputs(self._parts)[:, 0].tolist()
