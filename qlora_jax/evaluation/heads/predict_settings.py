"""Declares the settings of `predict`."""

import dataclasses

from qlora_jax.config import ConfigError
from qlora_jax.config.fields import AT_LEAST_ONE, NOT_EMPTY, setting
from qlora_jax.config.question_settings import unknown_columns
from qlora_jax.config.row_formats import ROW_COLUMNS
from qlora_jax.inference.settings import ComputeDtype, ModelOrRunArgs, QuantType, folder_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictArgs(ModelOrRunArgs):
    """Predicts labels, numbers, rewards or embeddings of texts with a run's sequence head."""

    model: str | None = setting("the path of the run's base, if it moved", None)
    text: str | None = setting("one text", None, NOT_EMPTY, common="one text")
    rows: str | None = setting(
        "file of rows with the columns of the training data (label may be missing); for rewards prompt and "
        "completion, or messages; or a .txt file, one text per line",
        None,
        NOT_EMPTY,
        common="file of rows without labels, or a .txt file with a text per line",
    )
    output: str | None = setting(
        "JSON Lines file for the predictions of rows (null: standard output)",
        None,
        NOT_EMPTY,
        common="JSON Lines file for the predictions",
    )
    file_columns: dict[str, str] | None = setting(
        "our column names, and those in the file: {text: review}", None, NOT_EMPTY
    )
    max_rows: int | None = setting("use only the first rows; null: all", None, AT_LEAST_ONE)
    keep: str | None = setting(
        "folder that caches outputs as they are computed, so that an interrupted prediction resumes",
        None,
        NOT_EMPTY,
    )
    quant_type: QuantType = setting("4-bit code of the base; auto: as in training, or nf4; none: 16 bit", "auto")
    compute_dtype: ComputeDtype = setting("auto: bfloat16 if the device computes it fast, else float32", "float32")


def check_predict(args: PredictArgs) -> None:
    """Raises ConfigError if settings contradict each other; the message lists all contradictions."""
    problems = []
    if args.run is None:
        problems.append("run: required, because a base has no sequence head. Set run to a run's or an adapter's folder")
    if (args.text is None) == (args.rows is None):
        found = "neither" if args.text is None else "both"
        problems.append(f"text, rows: found {found}, expected one. Set text to a text, or rows to a file")
    needs_rows = {"output": args.output, "file_columns": args.file_columns, "max_rows": args.max_rows}
    if args.rows is None:
        problems += [f"{name}: requires rows. Set rows too" for name, value in needs_rows.items() if value is not None]
    problems += unknown_columns("file_columns", args.file_columns or {}, ROW_COLUMNS)
    problems += folder_problems("output", args.output)
    if problems:
        raise ConfigError(problems)
