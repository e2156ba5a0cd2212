"""`prepare_data`: tokenized batches for a training loop of one's own; and data given in memory."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from qlora_jax.api.settings import Overrides, training_config
from qlora_jax.atomic_files import write_text
from qlora_jax.config import ModelArgs
from qlora_jax.config.suggestions import suggests_arguments
from qlora_jax.data.dataset import Dataset
from qlora_jax.data.readers.json_rows import shorten
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.training.run_spec import read_dataset

# A path or hf://datasets/org/name; several paths with weights; or rows as they stand in a JSON Lines file.
Data = str | Path | Mapping[str, float] | Sequence[Mapping[str, object]]
# Column names in the files, by ours; or such a mapping for each of several files.
Columns = Mapping[str, str] | Mapping[str, Mapping[str, str]]
BadRows = Literal["error", "drop"]


@suggests_arguments
def prepare_data(
    data: Data,
    tokenizer: Tokenizer,
    *,
    eval_data: Data | None = None,
    eval_fraction: float | None = None,
    columns: Columns | None = None,
    bad_rows: BadRows | None = None,
    max_length: int | None = None,
    micro_batch_size: int | None = None,
    accumulation: int | None = None,
    packing: bool | None = None,
    seed: int | None = None,
    config: Overrides = None,
) -> Dataset:
    """Reads, checks and tokenizes training data as `finetune` does.

    >>> dataset = q.prepare_data("rows.jsonl", tokenizer, micro_batch_size=2, accumulation=3)
    >>> next(dataset.train_batches()).inputs.shape[:2]
    (3, 2)

    `dataset.train_batches()` yields batches without end and `dataset.eval_batches(size)` the evaluation data once.
    `batch.arrays()` is a dict of NumPy arrays [accumulation, micro_batch_size, T]. `dataset.report` has the counts of
    rows and tokens, and what was truncated or dropped. A training loop has to give the model all of the arrays that
    exist (docs/python.md):

      inputs, targets: int32 token ids.
      weights: f32, 1 for tokens in the loss and 0 elsewhere.
      segments: int32, with packing or branches: positions see those of their own segment only.
      parents, depths: int32, if `dataset.branching`, as with pairs and with templates that drop earlier reasoning: the
        segment that a branch continues, and how many of its positions the branch sees (`q.nn.Branching`).

    Objectives other than sft have `sequences`, `present` and their labels too; see `data.batching.batches.Batch`.

    Args:
      data: as for `finetune`. Settings that are None have the defaults of `finetune`.
      config: more settings by dotted name, such as {"data.format": "sharegpt"} or {"objective": "dpo"}. Prompts of
        "grpo" leave `rollouts.max_completion_length` tokens for a reply; they are without the texts of tools.

    Raises:
      ValueError: a file is missing or rows are malformed; the message lists all of them by line.
    """
    settings = {
        "data.eval_fraction": eval_fraction,
        "data.columns": columns,
        "data.bad_rows": bad_rows,
        "data.max_length": max_length,
        "data.packing": packing,
        "train.micro_batch_size": micro_batch_size,
        "train.accumulation": accumulation,
        "train.seed": seed,
    }
    with tempfile.TemporaryDirectory() as folder:
        files = write_data(data, eval_data, Path(folder), resume=False)
        resolved = training_config(ModelArgs(path="unused"), None, settings | files, config, output="unused")
        return read_dataset(resolved, tokenizer)


def write_data(train: Data, evaluation: Data | None, folder: Path, *, resume: bool) -> dict[str, object]:
    """The settings data.train and data.eval; rows in memory are written to JSON Lines files in `folder` first.

    Args:
      resume: `folder` has a run, whose files must have these rows. Otherwise they are replaced: they are those of a
        call that ended before its first step.

    Raises:
      ValueError: a file of the run has other rows, or a row is not a mapping.
    """
    given = {"train": train} if evaluation is None else {"train": train, "eval": evaluation}
    return {f"data.{name}": _setting(name, data, folder, resume) for name, data in given.items()}


def rows_files(folder: Path) -> list[Path]:
    """The files that `write_data` may write."""
    return [folder / f"{name}.jsonl" for name in ("train", "eval")]


def _setting(name: str, data: Data, folder: Path, resume: bool) -> object:
    if isinstance(data, str | Path):
        return str(data)
    if isinstance(data, Mapping):
        return {str(path): float(weight) for path, weight in data.items()}
    text = "".join(_line(number, row) for number, row in enumerate(data))
    path = folder / f"{name}.jsonl"
    if resume and path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path}: the run was started with other rows. Give the same rows, or another output folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return str(path)


def _line(number: int, row: object) -> str:
    if not isinstance(row, Mapping):
        raise ValueError(
            f'data: row {number} is {shorten(repr(row))} ({type(row).__name__}), expected a dict such as {{"prompt": '
            '"...", "completion": "..."}. Give a list of dicts; of a DataFrame, df.to_dict("records")'
        )
    return json.dumps(dict(row), ensure_ascii=False) + "\n"
