"""Prompts of a tournament, its matches, the texts that judges read, and their verdicts as games."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import xxhash

from qlora_jax.data.readers.files import Problem, Row, raise_problems
from qlora_jax.evaluation.task_file import read_each
from qlora_jax.inference.prompts import PROMPT_COLUMNS, read_prompts
from qlora_jax.studies.tournament.settings import ArenaArgs


class Prompt(NamedTuple):
    """One prompt.

    Fields:
      id: identifies it in replies, judgements and results.
      category: chooses a variant of the judge's prompt; None for the first one.
      question: the text that judges read.
      row: the row that is encoded for the systems.
    """

    id: str
    category: str | None
    question: str
    row: Row


def read_tournament_prompts(args: ArenaArgs) -> list[Prompt]:
    """Reads the prompts that the settings name.

    Raises:
      ValueError: rows without a prompt, or with the id or text of another row; the message lists them.
    """
    path = str(args.prompts)
    rows = read_prompts(path)[: args.max_prompts]
    rows = [_renamed(row, args.prompt_column) for row in rows]
    has_ids = any(args.id_column in row.data for row in rows)
    prompts = read_each(path, rows, lambda row: _prompt(row, args, has_ids=has_ids))
    raise_problems(path, _repeated(prompts), len(rows))
    return prompts


def read_ids(path: str, column: str) -> list[str]:
    """The ids of all prompts in a file, also of those that `max_prompts` leaves out."""
    rows = read_prompts(path)
    if not any(column in row.data for row in rows):
        return [str(row.place.number + 1) for row in rows]
    return read_each(path, rows, lambda row: id_text(row, column))


def id_text(row: Row, column: str) -> str:
    """The id of a prompt in a row of any file: a text, or a whole number.

    Raises:
      ValueError: the column is missing, or holds another type.
    """
    value = row.data.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{column}: found {value!r}, expected a text or a whole number. Give every row an id")
    return str(value)


def _prompt(row: Row, args: ArenaArgs, *, has_ids: bool) -> Prompt:
    category = row.data.get(args.category_column)
    return Prompt(
        id=id_text(row, args.id_column) if has_ids else str(row.place.number + 1),
        category=category if isinstance(category, str) else None,
        question=_question(row.data),
        row=row,
    )


def _renamed(row: Row, column: str | None) -> Row:
    """The row with its prompt in the column `prompt`, and without other columns of prompts."""
    if column is None or column not in row.data:
        return row
    others = {name: value for name, value in row.data.items() if name not in PROMPT_COLUMNS}
    return row._replace(data={**others, "prompt": row.data[column]})


def _question(columns: Mapping[str, object]) -> str:
    """The text of a prompt for judges: one turn as it is, several with their roles."""
    match columns:
        case {"messages": [*messages]}:
            turns = [turn for turn in messages if isinstance(turn, dict)]
            if turns and turns[-1].get("role") == "assistant":
                turns = turns[:-1]
            if len(turns) == 1:
                return str(turns[0].get("content"))
            return "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)
        case {"prompt": str(text)}:
            return text
        case {"instruction": str(text)}:
            given = columns.get("input")
            return f"{text}\n\n{given}" if given else text
    known, found = (", ".join(map(repr, names)) for names in (PROMPT_COLUMNS, columns))
    raise ValueError(f"no prompt (found columns {found}, expected one of {known}). Set prompt_column")


def _repeated(prompts: Sequence[Prompt]) -> list[Problem]:
    """Prompts whose id or text another one has: they would count twice, and a drawn reply depends on its count."""
    ids, texts = (collections.Counter(map(of, prompts)) for of in (lambda prompt: prompt.id, _key))
    problems = []
    for prompt in prompts:
        if ids[prompt.id] > 1:
            problems.append((prompt.row.place, f"id {prompt.id!r} occurs {ids[prompt.id]} times. Make ids unique"))
        elif texts[_key(prompt)] > 1:
            problems.append((prompt.row.place, "another row has the same prompt. Remove one"))
    return problems


def _key(prompt: Prompt) -> str:
    return repr([prompt.row.data.get(column) for column in (*PROMPT_COLUMNS, "input", "tools")])


class Game(NamedTuple):
    """A judge's verdict on the replies of two systems to one prompt.

    Fields:
      prompt: id of the prompt; bootstraps resample prompts, and judges agree or disagree on a prompt.
      first: name of the system whose reply the judge saw first.
      second: name of the system whose reply the judge saw second.
      outcome: 1 if the judge prefers the first system, 0 if the second, 0.5 for a tie.
      judge: name of the judge.
    """

    prompt: str
    first: str
    second: str
    outcome: float
    judge: str


NEXT_CONVERSATION = "A chat between a curious human and an artificial intelligence"


class Match(NamedTuple):
    """Two replies to one prompt, in the order in which a judge reads them.

    Fields:
      prompt: id of the prompt.
      first, second: names of the systems.
    """

    prompt: str
    first: str
    second: str

    def swapped(self) -> "Match":
        """The match in the other order."""
        return Match(self.prompt, self.second, self.first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcripts:
    """The prompts and all replies.

    Attributes:
      prompts: each prompt by its id, in order.
      replies: each system's replies by the id of the prompt.
    """

    prompts: Mapping[str, Prompt]
    replies: Mapping[str, Mapping[str, str]]

    def matches(self) -> list[Match]:
        """Every ordered pair of systems for every prompt."""
        pairs = [*itertools.permutations(self.replies, 2)]
        return [Match(prompt, first, second) for prompt in self.prompts for first, second in pairs]

    def question(self, match: Match) -> str:
        """The prompt's text."""
        return self.prompts[match.prompt].question

    def category(self, match: Match) -> str | None:
        """The prompt's category."""
        return self.prompts[match.prompt].category

    def answers(self, match: Match) -> tuple[str, str]:
        """(the first reply, the second), each cut where the model begins another conversation, as in the paper."""
        first, second = (self.replies[system][match.prompt] for system in (match.first, match.second))
        return first.partition(NEXT_CONVERSATION)[0], second.partition(NEXT_CONVERSATION)[0]

    def digest(self, match: Match) -> str:
        """Digest of the texts that a judge reads; it shows if they have changed since a judgement was stored."""
        return xxhash.xxh3_64_hexdigest(repr([self.question(match), *self.answers(match)]).encode("utf-8", "replace"))


def systems_of(matches: Iterable[Match]) -> list[str]:
    """Names of the systems of the matches, sorted."""
    return sorted({name for match in matches for name in (match.first, match.second)})


def unordered(matches: Sequence[Match]) -> list[Match]:
    """One match of each pair of systems and prompt: the first of the two orders."""
    kept: dict[Match, None] = {}
    for match in matches:
        if match.swapped() not in kept:
            kept[match] = None
    return [*kept]
