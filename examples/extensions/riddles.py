"""Rows of riddles, as a package of its own adds them to qlora_jax."""

from qlora_jax.data.formats.registry import format_declaration
from qlora_jax.data.formats.row_format import RowFormat, Segment


def problems(row) -> list[str]:
    return [f"{name} is not text" for name in ("riddle", "solution") if not isinstance(row[name], str)]


def messages(row):
    return [{"role": "user", "content": row["riddle"]}, {"role": "assistant", "content": row["solution"]}]


RIDDLES = RowFormat(
    name="riddles",
    required=("riddle", "solution"),
    optional=("hint",),
    problems=problems,
    messages=messages,
    plain=lambda row: [Segment(f"Riddle: {row['riddle']}\n", False), Segment(row["solution"], True)],
    version="1",
)
DECLARATION = format_declaration(RIDDLES)
