"""Small data sets that several tests load."""

from collections.abc import Callable, Sequence
from typing import Any

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.dataset import Dataset, load_dataset
from qlora_jax.data.tokenizer.tokenizer import Tokenizer


def load(
    tokenizer: Tokenizer,
    objective: str = "sft",
    labels: Sequence[str] = (),
    *,
    kl_pairs: bool = False,
    **settings: Any,
) -> Dataset:
    return load_dataset(
        DataArgs(**settings),
        tokenizer,
        seed=0,
        micro_batch_size=2,
        accumulation=2,
        objective=objective,
        labels=labels,
        kl_pairs=kl_pairs,
    )


def question(number: int, answer: str = "yes") -> dict[str, Any]:
    return {"prompt": f"Is {number} odd?", "completion": answer, "id": number}


def rows_of_lengths(tokenizer: Tokenizer, write_rows: Callable) -> str:
    """Four rows of 10, 20, 30 and 40 tokens. The answer is one token and eos."""
    words = [" word" * (n - 2) for n in (10, 20, 30, 40)]
    return write_rows([{"prompt": text, "completion": " yes"} for text in words])
