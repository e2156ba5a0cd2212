"""Declares the formats of training rows, by name, and the columns that settings may map to other names."""

import dataclasses

from qlora_jax.config.registry import Registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowFormatDeclaration:
    """A row format of another package.

    Attributes:
      implementation: its RowFormat (data/formats/row_format.py), or the place of it as "module:attribute".
      columns: names of its columns.
    """

    implementation: object = None
    columns: tuple[str, ...] = ()


# Ours are in data/formats/registry.py. They are detected by columns (auto); those of other packages have to be named.
NAMES = (
    *("auto", "messages", "sharegpt", "alpaca", "completion", "input-output", "seed-tasks"),
    *("unnatural-instructions-full", "unnatural-instructions", "flan", "hh-rlhf", "guanaco", "guanaco-answers"),
    *("chip2", "text", "preference", "orca-pairs", "hh-rlhf-pairs", "implicit-prompt", "unpaired-preference"),
    *("messages-label", "question-pair-label", "question-sentence-label", "premise-hypothesis-label"),
    *("sentence-pair-label", "sentence-label", "text-label", "text-label-columns", "triplet", "anchor-positive"),
    *("prompt", "prompt-messages"),
)
ROW_FORMATS: Registry[RowFormatDeclaration] = Registry(
    "qlora_jax.row_formats", RowFormatDeclaration, dict.fromkeys(NAMES, RowFormatDeclaration())
)
# Names of the columns that our formats read.
ROW_COLUMNS = (
    *("messages", "tools", "functions", "chat_template_kwargs", "conversations", "instruction", "input", "output"),
    *("prompt", "completion", "instances", "reformulations", "inputs", "targets", "chosen", "text", "rejected"),
    *("margin", "question", "system", "label", "question1", "question2", "sentence", "premise", "hypothesis"),
    *("sentence1", "sentence2", "anchor", "positive", "negative"),
)


def row_columns(names: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Returns the columns of our formats, and of those that are named."""
    return tuple(dict.fromkeys((*ROW_COLUMNS, *(column for name in names for column in ROW_FORMATS[name].columns))))
