"""A file's columns: renamed to ours, found where another was meant, and checked to be texts."""

import difflib
import json
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from qlora_jax.config.yaml_files import one_line_yaml
from qlora_jax.data.formats.row_format import RowFormat
from qlora_jax.data.readers.files import Row
from qlora_jax.data.readers.json_rows import shorten
from qlora_jax.untrusted_json import JsonObject

# Our columns, in training data and in question files, and names that other tools and data sets use for the same.
SYNONYMS = {
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("question", "query", "input", "instruction", "problem", "user", "history"),
    "completion": ("answer", "response", "output", "target", "solution", "assistant", "chosen"),
    "instruction": ("task", "request"),
    "input": ("context",),
    "output": ("response", "answer", "target"),
    "text": ("content", "body", "document", "passage", "sentence", "review", "comment"),
    "chosen": ("chosen_response", "response_chosen", "preferred", "accepted", "winner", "better"),
    "rejected": (
        "rejected_response",
        "response_rejected",
        "non_preferred",
        "dispreferred",
        "refused",
        "loser",
        "worse",
    ),
    "label": ("labels", "class", "category", "target", "score", "rating"),
    "anchor": ("query", "question", "sentence1", "text1"),
    "positive": ("pos", "answer", "passage", "document", "sentence2", "text2"),
    "negative": ("neg", "hard_negative"),
    "question": ("problem", "query", "question_stem", "instruction", "input", "goal", "ctx", "text"),
    "options": ("choices", "endings", "candidates", "alternatives"),
    "answer": ("solution", "answers", "answerKey", "answer_key", "target", "output", "response", "completion", "label"),
}
PLACEHOLDER = "COLUMN"  # stands for the name of a column that nothing suggests
_GENERIC = {"text", "column", "field", "value"}  # words that do not describe a column's content
_NEGATIONS = {"non", "not"}  # words that turn a column's meaning into its opposite
_MAX_SHOWN = 20


def rename_columns(
    row: JsonObject, names: Mapping[str, str], setting: str, optional: Collection[str] = ()
) -> dict[str, object]:
    """Returns the row with our names of its columns; the other columns keep theirs.

    Args:
      names: our name of a column -> its name in the file.
      setting: the setting that has these names, for errors.
      optional: our column names that a row may lack.

    Raises:
      ValueError: the row lacks columns of `names`; the message lists those that exist.
    """
    missing = [theirs for ours, theirs in names.items() if theirs not in row and ours not in optional]
    if missing:
        raise ValueError(f"{setting}: {_no_columns(missing, row)}")
    others = {name: value for name, value in row.items() if name not in names and name not in names.values()}
    return others | {ours: row[theirs] for ours, theirs in names.items() if theirs in row}


def check_names_exist(path: str, names: Mapping[str, str], columns: Collection[str], setting: str) -> None:
    """Raises ValueError if `names` has columns that no row of the file has; they may be optional.

    Args:
      names: our name of a column -> its name in the file.
      columns: all columns of the file, after they were renamed.
    """
    missing = [theirs for ours, theirs in names.items() if ours not in columns]
    if missing:
        raise ValueError(f"{path}: {setting}: {_no_columns(missing, columns)} in any row. Correct the name.")


def _no_columns(missing: Sequence[str], columns: Collection[str]) -> str:
    near = [found for name in missing if (found := likely_column(name, columns))]
    meant = f"; did you mean {list_columns(near)}?" if near else ""
    return f"no column {' or '.join(map(repr, missing))} (found {list_columns(columns)}{meant})"


def likely_column(name: str, columns: Collection[str], synonyms: Sequence[str] = ()) -> str | None:
    """Returns the column that is probably meant by `name`: that name, a synonym, a similar name, or some of its words.

    Case and characters other than letters and digits do not matter.
    """
    if name in columns:
        return name
    by_words = {_words(column): column for column in reversed([*columns])}
    wanted = [_words(word) for word in (name, *synonyms)]
    close = difflib.get_close_matches(_words(name), by_words, n=1, cutoff=0.8)
    containing = [words for word in wanted for words in by_words if _describes(word, words)]
    return next((by_words[words] for words in (*wanted, *close, *containing) if words in by_words), None)


def _describes(wanted: str, words: str) -> bool:
    """Returns True if a column's words have the wanted ones in this order, and the same negations."""
    same_sense = _NEGATIONS & {*wanted.split()} == _NEGATIONS & {*words.split()}
    return same_sense and wanted not in _GENERIC and f" {wanted} " in f" {words} "


def _words(column: str) -> str:
    """Returns the words of a column's name: those of `Question_Text ` are `question text`."""
    return " ".join(re.findall(r"[^\W_]+", column.lower()))


def columns_setting(setting: str, names: Mapping[str, str]) -> str:
    """Returns the words of a shell command that name columns, such as `--data.columns '{prompt: question}'`."""
    mapping = one_line_yaml(dict(names))
    if "'" in mapping and "".join(names.values()).isprintable():
        mapping = json.dumps(names, ensure_ascii=False)  # easier to read in a shell's single quotes
    return f"--{setting} {shlex.quote(mapping)}"


def list_columns(columns: Collection[str]) -> str:
    """Returns the column names for a message; of many, the first ones and the number of the others."""
    shown = ", ".join(shorten(repr(name)) for name in [*columns][:_MAX_SHOWN])
    return f"{shown} and {len(columns) - _MAX_SHOWN} more" if len(columns) > _MAX_SHOWN else shown or "none"


_HALF_SURROGATE = re.compile("[\ud800-\udfff]")


def text_problems(row: JsonObject, *names: str, may_be_blank: Sequence[str] = ()) -> list[str]:
    """Returns the problems of these columns, which the row has."""
    problems = [text_problem(name, row[name], name in may_be_blank) for name in names]
    return [problem for problem in problems if problem]


def text_problem(name: str, value: object, may_be_blank: bool = False) -> str | None:
    """Returns the reason why `value` is not a text to learn from; None if it is one."""
    if not isinstance(value, str):
        return f"{name} is {'null' if value is None else type(value).__name__}, expected text"
    if not may_be_blank and not value.strip():
        return f"{name} is empty"
    half = _HALF_SURROGATE.search(value)
    if half:
        return f"{name} contains half of a surrogate pair (\\u{ord(half.group()):x})"
    return None


class Lookalike(NamedTuple):
    """A kind of conversation in one text.

    Fields:
      tags: texts before the turns of the two speakers.
      answers_only: the format that learns only the answers, with and without a chat template.
    """

    tags: tuple[str, str]
    answers_only: str


# By the name of the format that has such texts.
LOOKALIKES = {
    "guanaco": Lookalike(("### Human:", "### Assistant:"), "guanaco-answers"),
    "chip2": Lookalike(("<human>:", "<bot>:"), "chip2"),
}
# Formats that learn every token of a text without a chat template.
_WHOLE_TEXT = ("text", "guanaco")


def count_lookalikes(rows: Sequence[Row], row_format: RowFormat) -> Mapping[str, int]:
    """Returns the number of rows by the name of the format that they look like, if every token of them is learned."""
    if row_format.name not in _WHOLE_TEXT:
        return {}
    found = Counter()
    for name, (tags, _) in LOOKALIKES.items():
        found[name] = sum([all([tag in row.data["text"] for tag in tags]) for row in rows])
    return +found
