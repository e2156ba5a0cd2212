"""Rewards of replies by a model that was trained with objective=reward. It stays in this process' memory."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
from flax import nnx

from qlora_jax.data.readers.files import Place, Row
from qlora_jax.evaluation.heads.predictions import encode_texts
from qlora_jax.io.pretrained import OpenedModel, apply_adapter, load_base, open_finetuned
from qlora_jax.io.run_folder.checkpoint import Run
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import ModelParts
from qlora_jax.models.precision import weight_format
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.sharding import part_bytes

Text = str | Sequence[Mapping[str, object]]


def open_scorer(run: str) -> Callable[[Sequence[Text], Sequence[Text]], list[float | None]]:
    """Returns a function from prompts and completions to rewards, None for blank ones; its first call loads the model.

    Args:
      run: folder of a run with objective=reward.

    Raises:
      ValueError: the folder is another one. The function raises it for replies that are too long, and lists them.
    """
    opened, finetuned, head = _open(run)

    @functools.cache
    def parts() -> ModelParts:
        return apply_adapter(load_base(opened, opened.args), finetuned)

    def score(prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        texts = [one if isinstance(one, str) else str(one[-1]["content"]) for one in completions]
        written = [number for number, text in enumerate(texts) if text.strip()]
        rows = [
            Row(
                Place(number + 1, number),
                {"prompt": prompt, "completion": completion}
                if isinstance(prompt, str)
                else {"messages": [*prompt, *completion]},
            )
            for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
            if number in written
        ]
        found: list[float | None] = [None] * len(texts)
        if rows:
            encoded = encode_texts("replies", rows, head, opened.tokenizer, opened.features.max_positions)
            for number, reward in zip(written, encoded.outputs(parts())[:, 0].tolist(), strict=True):
                found[number] = reward
        return found

    return score


def reward_model_bytes(run: str) -> int:
    """Returns the bytes of the model that `open_scorer` loads; raises ValueError as it does."""
    opened, finetuned, head = _open(run)

    def base() -> CausalLM:
        model = CausalLM(opened.features, weight_format(opened.args, opened.features))
        model.add_sequence_head(head.spec(), jax.random.key(0))  # in place of the language-model head
        return model

    return part_bytes(nnx.state(nnx.eval_shape(base), nnx.Not(nnx.LoRAParam))) + part_bytes(finetuned.lora)


def _open(run: str) -> tuple[OpenedModel, Run, TrainedHead]:
    opened = open_finetuned(run)
    finetuned = opened.run
    head = None if finetuned is None else finetuned.head
    if finetuned is None or head is None or head.objective != "reward":
        found = "a model without a sequence head" if head is None else f"objective={head.objective}"
        raise ValueError(f"rewards.run: {run} gives no rewards (found {found}, expected objective=reward). Name one")
    return opened, finetuned, head
