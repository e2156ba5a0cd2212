"""Encodes rows of several texts, or of one text with a label: pairs, labelled answers, classes, and embeddings.

A text's ids are those of the whole text, encoded alone: prompt and answer are one text to the tokenizer, as in TRL. An
answer begins where the ids of the prompt and of the texts first differ. Usually that is after the prompt. If a token
crosses the end of the prompt in one of the texts, it belongs to the answers of all.

A tokenizer finds special tokens before it splits the text between them. So the prompt up to its last special token is
encoded once for all texts of the row.
"""

import array
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from qlora_jax.config.fields import TEMPLATE_CHOICES
from qlora_jax.data.branch_tree import MIN_BRANCH, Branch
from qlora_jax.data.class_labels import ValueReader, Values, value_reader
from qlora_jax.data.encoder import Finish, check_encodable
from qlora_jax.data.formats.preference import EQUAL_ANSWERS
from qlora_jax.data.formats.row_format import Columns, RowFormat, Text, Texts
from qlora_jax.data.formats.turn_fields import (
    Tools,
    by_template_kwargs,
    called_functions,
    check_plain,
    check_template_shows,
    read_template_kwargs,
    read_thought,
    read_tools,
)
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.loss_mask.spans import is_always_found
from qlora_jax.data.loss_mask.token_spans import is_lossy
from qlora_jax.data.loss_mask.turns import TurnMarks, search_turn_texts, text_behind, turn_marks
from qlora_jax.data.readers.files import Place, Problem, Row
from qlora_jax.data.row_kinds import TEXT_NAMES, RowUse
from qlora_jax.data.tokenizer.chat_template import Rendering, text_of
from qlora_jax.data.tokenizer.render_batches import run_together, with_variables
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer


class WrittenRow(NamedTuple):
    """The texts of a row as a tokenizer gets them.

    Fields:
      prompt: the beginning that the texts share as their prompt; None if they have no prompt.
      texts: the whole texts.
      is_plain: True if no chat template wrote them, so that they lack bos.
      unseen_reasoning: True if the template does not write the reasoning of an answer.
    """

    prompt: str | None
    texts: tuple[str, ...]
    is_plain: bool
    unseen_reasoning: bool = False


Writing = Generator[Sequence[Rendering], Sequence[str | ValueError], WrittenRow]


class _Ids(NamedTuple):
    """Ids of a written row: of its prompt, which may be empty, and of each text."""

    prompt: list[int]
    texts: tuple[list[int], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchEncoder:
    """Makes ids and masks of rows of one format.

    Fields:
      use: how the objective uses the rows.
      chat: True if the tokenizer has a chat template.
      write: starts to write a row's texts; see render_batches.py.
      values: reads a row's labels.
    """

    tokenizer: Tokenizer
    use: RowUse
    chat: bool
    write: Callable[[Columns], Writing]
    values: ValueReader

    def begin(self, rows: Sequence[Row], problems: list[Problem]) -> Callable[[], Finish]:
        """Writes the rows' texts; returns a function that runs the tokenizer. Bad rows are added to `problems`."""
        places: list[Place] = []
        written: list[WrittenRow] = []
        values: list[Values] = []
        found = run_together((self.write(row.data) for row in rows), self.tokenizer.start_rendering)
        for row, texts in zip(rows, found, strict=True):
            try:
                labels = self.values(row.data)
                written.append(self._checked(texts))
            except ValueError as error:
                problems.append((row.place, str(error)))
                continue
            places.append(row.place)
            values.append(labels)

        def encode() -> Finish:
            ids = encode_written(self.tokenizer, written)
            return functools.partial(self._finish, places, written, ids, values)

        return encode

    def _checked(self, written: WrittenRow | ValueError) -> WrittenRow:
        if isinstance(written, ValueError):
            raise written
        for text in written.texts:
            self.tokenizer.check_text(check_encodable(text))
        return written

    def _finish(
        self,
        places: Sequence[Place],
        written: Sequence[WrittenRow],
        ids: Sequence[_Ids],
        values: Sequence[Values],
        problems: list[Problem],
    ) -> tuple[list[Place], list[EncodedRow]]:
        kept: list[Place] = []
        rows: list[EncodedRow] = []
        for place, texts, encoded, labels in zip(places, written, ids, values, strict=True):
            try:
                rows.append(self._row(texts, encoded, labels))
            except ValueError as error:
                problems.append((place, str(error)))
                continue
            kept.append(place)
        return kept, rows

    def _row(self, written: WrittenRow, ids: _Ids, values: Values) -> EncodedRow:
        bos = self._bos(written, ids.texts[0])
        start = len(bos) + answer_start(ids.prompt, ids.texts)
        texts = [bos + text for text in ids.texts]
        for name, text in zip(TEXT_NAMES[self.use.kind], texts, strict=False):
            if len(text) - max(start - 1, 0) + self.use.head < MIN_BRANCH or len(text) <= start:
                raise ValueError(f"{name} has no token that the model could learn from")
        if self.use.kind == "pair" and texts[0] == texts[1]:
            raise ValueError(f"{EQUAL_ANSWERS} as tokens")
        depth = max(start - 1, 0)
        filler = [self.tokenizer.eos_id or 0] if self.use.head else []
        branches = [text[depth:] + filler for text in texts]
        flat = [*texts[0][:depth], *(token for branch in branches for token in branch)]
        ends = depth + np.cumsum([len(branch) for branch in branches])
        begins = [depth, *ends[:-1].tolist()]
        supervised = np.zeros(len(flat), bool)
        for begin, end in zip(begins, ends, strict=True):
            supervised[end - 1 if self.use.head else begin + 1 : end] = True
        has_branches = self.use.kind in ("pair", "embedding")
        return EncodedRow(
            ids=_int32(flat),
            supervised=supervised,
            source=start if written.prompt is not None else len(flat),
            cut=start < len(bos) + len(ids.prompt),
            lossy=any(is_lossy(self.tokenizer, *pair) for pair in zip(written.texts, ids.texts, strict=True)),
            branches=tuple(Branch(begin, depth) for begin in begins) if has_branches else (),
            values=values,
            unseen_reasoning=written.unseen_reasoning,
        )

    def _bos(self, written: WrittenRow, ids: Sequence[int]) -> list[int]:
        """Returns bos if a text of a tokenizer that asks for it lacks it."""
        bos, asks = self.tokenizer.bos_id, self.tokenizer.add_bos_token
        return [bos] if written.is_plain and asks and bos is not None and ids[:1] != [bos] else []


def make_branch_encoder(
    row_format: RowFormat, tokenizer: Tokenizer, use: RowUse, labels: Sequence[str] = ()
) -> BranchEncoder:
    """Returns the encoder of a row format.

    Args:
      labels: names of the classes, in order.
    """
    context_of = by_template_kwargs(lambda one: (one, functools.cache(lambda: turn_marks(one))), tokenizer)

    def write(row: Columns) -> Writing:
        return (yield from with_variables(_write(row, row_format, use, *context_of(row)), read_template_kwargs(row)))

    return BranchEncoder(
        tokenizer=tokenizer,
        use=use,
        chat=tokenizer.chat_template is not None,
        write=write,
        values=value_reader(use.values, labels, label_columns="label" not in row_format.required),
    )


def answer_start(prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> int:
    """Returns the number of ids that the prompt has in common with all texts."""
    return min(_common(prompt, text) for text in texts)


def _common(prompt: Sequence[int], text: Sequence[int]) -> int:
    if text[: len(prompt)] == prompt:
        return len(prompt)
    return next(index for index, (a, b) in enumerate(zip(prompt, [*text, None], strict=False)) if a != b)


def _int32(ids: list[int]) -> Int32[np.ndarray, " T"]:
    """Returns the ids as an array, faster than np.array, which every id would pass through."""
    return np.frombuffer(array.array("i", ids), np.int32)


def _write(
    row: Columns, row_format: RowFormat, use: RowUse, tokenizer: Tokenizer, marks: Callable[[], TurnMarks]
) -> Writing:
    """Yields the conversations of a row to render, and returns its texts."""
    assert row_format.texts is not None
    found = row_format.texts(row, tokenizer.chat_template is not None)
    plain = _plain(found, use, tokenizer)
    if plain is not None:
        check_plain(row)
        return plain
    if tokenizer.chat_template is None:
        raise ValueError(
            "a list of messages needs a chat template, and this model has none. Set data.chat_template to "
            f"{TEMPLATE_CHOICES}."
        )
    tools = read_tools(row) if "tools" in row_format.optional else None
    if use.kind == "prompt":
        (text,) = yield [Rendering(_messages(found.prompt), add_generation_prompt=True, tools=tools)]
        return WrittenRow(None, (text_of(text),), is_plain=False)
    prompt, answers = _messages(found.prompt), [_messages(text) for text in found.texts]
    wholes = [[*prompt, *answer] for answer in answers]
    wanted = [Rendering(whole, tools=tools) for whole in wholes]
    if prompt:
        wanted.append(Rendering(prompt, add_generation_prompt=True, tools=tools))
    if tools is not None:
        wanted.append(Rendering(wholes[0]))
    rendered = [text_of(text) for text in (yield wanted)]
    texts, asked = rendered[: len(wholes)], rendered[len(wholes)] if prompt else None
    for whole, text in zip(wholes, texts, strict=True):
        check_template_shows(whole, text, None if tools is None else rendered[-1] if whole is wholes[0] else "")
    if asked is None:
        return WrittenRow(None, tuple(texts), is_plain=False)
    if not use.head:
        texts = yield from _behind_prompt(prompt, answers, asked, texts, tools)
    starts = [len(asked) if text.startswith(asked) else 0 for text in texts]
    behind = [text[start:] for text, start in zip(texts, starts, strict=True)]
    unseen = not all([_shows_reasoning(answer, text) for answer, text in zip(answers, behind, strict=True)])
    if not use.head:
        texts = [_through_end(text, len(asked), marks(), tokenizer) for text in texts]
    return WrittenRow(asked, tuple(texts), is_plain=False, unseen_reasoning=unseen)


def _behind_prompt(
    prompt: Sequence[Message],
    answers: Sequence[Sequence[Message]],
    asked: str,
    texts: Sequence[str],
    tools: Tools | None,
) -> Generator[Sequence[Rendering], Sequence[str | ValueError], list[str]]:
    """Yields the conversations that it needs, and returns the texts, each after the prompt that inference builds.

    Args:
      asked: the prompt, rendered with a generation prompt.
      texts: the prompt with each answer, as the template writes it.
    """
    found: list[str] = []
    for answer, whole in zip(answers, texts, strict=True):
        before, whole, turns = yield from search_turn_texts(prompt, answer, asked, whole, tools)
        found.append(asked + text_behind(len(prompt), turns[0], before, whole))
    return found


def _plain(found: Texts, use: RowUse, tokenizer: Tokenizer) -> WrittenRow | None:
    """Returns the texts of a row without messages; answers end with eos, as in TRL. None if it has messages."""
    prompt, texts = found.prompt, [text for text in found.texts if isinstance(text, str)]
    if not isinstance(prompt, str) or len(texts) < len(found.texts):
        return None
    if use.kind not in ("pair", "labelled"):
        return WrittenRow(None, (prompt,) if use.kind == "prompt" else tuple(texts), is_plain=True)
    eos = tokenizer.special_tokens.get("eos_token")
    if eos is None:
        raise ValueError("answers in plain text end with eos, and this tokenizer has no eos_token. Add it to its files")
    return WrittenRow(prompt, tuple(prompt + text.removesuffix(eos) + eos for text in texts), is_plain=True)


def _messages(text: Text) -> Sequence[Message]:
    """Returns the messages of a text; an empty text has none."""
    assert text == "" or not isinstance(text, str)
    return text or ()


def _shows_reasoning(answer: Sequence[Message], rendered: str) -> bool:
    """Returns True if the template writes the reasoning of an answer; raises ValueError if it drops the rest of it."""
    thoughts = [read_thought(message) for message in answer if message["role"] == "assistant"]
    calls = [name for message in answer for name in called_functions(message)]
    if not all(part in rendered for part in (*[thought.answer.strip() for thought in thoughts], *calls)):
        raise ValueError(
            "the chat template drops or rewrites a part of an answer, so the model would learn another one. Set "
            "data.chat_template to a jinja file that writes it unchanged."
        )
    return all(thought.reasoning in rendered for thought in thoughts)


def _through_end(rendered: str, start: int, marks: TurnMarks, tokenizer: Tokenizer) -> str:
    """Returns the text up to the end of its last turn, where generation stops."""
    at = rendered.rfind(marks.end, start)
    if at >= 0:
        return rendered[: at + len(marks.end)]
    *_, last = (None, *tokenizer.special_text.finditer(rendered, start))
    if last is None:
        raise ValueError(
            "the chat template ends an answer without a special token. Set data.chat_template to a jinja file that "
            "ends turns with one."
        )
    return rendered[: last.end()]


class _Pieces(NamedTuple):
    """A written row in pieces: a head that ends with a special token, and what follows it in the prompt and the texts.

    Fields:
      special: the token at the end of the head; empty without a head.
    """

    head: str
    special: str
    rests: tuple[str, ...]


def encode_written(tokenizer: Tokenizer, rows: Sequence[WrittenRow]) -> list[_Ids]:
    """Returns the ids of each row's prompt and texts, each equal to those of the text encoded alone."""
    cut = _make_cutter(tokenizer)
    pieces = [cut(row) for row in rows]
    # Prompts occur several times, and what follows their last special token is the same in many rows.
    index: dict[str, int] = {}
    for one in pieces:
        for text in (one.head, *one.rests):
            index.setdefault(text, len(index))
    ids = [encoding.ids for encoding in tokenizer.encode_fast([*index])]
    return [_joined(tokenizer, row, one, index, ids) for row, one in zip(rows, pieces, strict=True)]


def _joined(
    tokenizer: Tokenizer, row: WrittenRow, pieces: _Pieces, index: dict[str, int], ids: Sequence[list[int]]
) -> _Ids:
    head = ids[index[pieces.head]]
    if pieces.special and head[-1:] != [tokenizer.backend.token_to_id(pieces.special)]:
        # Another added token overlaps the beginning of this one.
        whole = tokenizer.encode_batch(_all_texts(row))
    else:
        whole = [head + ids[index[rest]] for rest in pieces.rests]
    count = len(row.texts)
    return _Ids(whole[count] if row.prompt is not None else [], tuple(whole[:count]))


def _all_texts(row: WrittenRow) -> list[str]:
    return [*row.texts, *(() if row.prompt is None else (row.prompt,))]


def _make_cutter(tokenizer: Tokenizer) -> Callable[[WrittenRow], _Pieces]:
    """Returns a function that cuts a row after the last special token of its prompt that the tokenizer always finds.

    It leaves rows whole if the tokenizer treats the beginning of a text differently from the rest.
    """
    lengths, always = tokenizer.byte_lengths, functools.cache(lambda token: is_always_found(tokenizer, token))
    can_cut = lengths is not None and lengths.prefix != "first"

    def cut(row: WrittenRow) -> _Pieces:
        texts = _all_texts(row)
        if can_cut and row.prompt is not None:
            *_, last = (None, *tokenizer.special_text.finditer(row.prompt))
            if last is not None and always(last.group()):
                head = row.prompt[: last.end()]
                if all(text.startswith(head) for text in texts):
                    return _Pieces(head, last.group(), tuple(text[len(head) :] for text in texts))
        return _Pieces("", "", tuple(texts))

    return cut
