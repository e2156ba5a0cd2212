"""The loss mask by definition: the ids of a conversation, and for each id whether the loss sees it.

Read this file first. Training takes the fast paths next to it. They return the same rows, which
tests/data/loss_mask/test_reference.py checks:

  spans.py        finds the spans of a conversation, or its branches, and the beginning that texts share
  span_cache.py   finds the spans of a conversation from those of another with the same roles
  token_spans.py  computes the mask: of many rows at once from the byte length of each id, of one row from its offsets,
                  and of rows with branches from pieces that their texts share
"""

import array
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Float32, Int32

from qlora_jax.data.branch_tree import Branch
from qlora_jax.data.formats.row_format import Segment
from qlora_jax.data.formats.turn_fields import Tools
from qlora_jax.data.loss_mask.spans import conversation_segments
from qlora_jax.data.loss_mask.turn_branches import Learn, RowText
from qlora_jax.data.loss_mask.turns import turn_marks
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer

SequenceValues = Sequence[float] | Sequence[Sequence[float]] | Float32[np.ndarray, "..."]


class EncodedRow(NamedTuple):
    """One row of tokens.

    Fields:
      ids: token ids, [T].
      supervised: True for each id that the loss sees as a target, [T].
      source: number of ids before the first answer; all of them if the row has no answer.
      cut: a token crossed the start or end of an answer, so each segment was encoded separately.
      lossy: the ids decode to another text, because the tokenizer drops or rewrites some characters.
      branches: the branches of a row that is a tree; none if it is one text.
      values: numbers for each of the row's sequences by name, such as `labels`.
      unseen_reasoning: the row has reasoning that is not in its ids.
      lost_ends: answers of which truncation kept the beginning but not the end.
    """

    ids: Int32[np.ndarray, " T"]
    supervised: Bool[np.ndarray, " T"]
    source: int
    cut: bool
    lossy: bool
    branches: tuple[Branch, ...] = ()
    values: Mapping[str, SequenceValues] = MappingProxyType({})
    unseen_reasoning: bool = False
    lost_ends: int = 0


class TokenText(NamedTuple):
    """The ids of the trunk, or of the trunk as far as a branch continues it and of the branch.

    Fields:
      spans: [start, stop) of the supervised ids, in order.
      cut: a token crossed the start or end of the turn.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    cut: bool = False


def loss_mask(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools | None = None, learn: Learn = "assistant"
) -> EncodedRow:
    """Returns the ids and the loss mask of a conversation, through the tokenizer's chat template.

    Args:
      tools: JSON schemas of the functions that the assistant may call.
      learn: the part that the loss sees: every assistant turn, only the last one, or the whole conversation.

    Raises:
      ValueError: the template rejects the conversation or changes its texts, or its spans are not exact.
    """
    row = conversation_segments(tokenizer, turn_marks(tokenizer), messages, tools).learned(learn)
    return mask_branches(tokenizer, row) if row.branches else mask_segments(tokenizer, row.segments, learn)


def mask_segments(tokenizer: Tokenizer, segments: Sequence[Segment], learn: Learn = "assistant") -> EncodedRow:
    """Returns the ids of the joined text. A token is supervised if the segment that owns it is.

    A token's owner is the segment that holds its first character. If a token crosses the start or end of an answer,
    each segment is encoded separately. The ids are then those of generation: the prompt's, then the answer's.

    Raises:
      ValueError: the segments' ids do not decode to the joined text.
    """
    text = "".join(segment.text for segment in segments)
    (encoding,) = tokenizer.encode_spans([text])
    owner_of_character = [index for index, segment in enumerate(segments) for _ in segment.text]
    owner_of_character.append(len(segments) - 1)  # a token without characters may stand at the end
    ids, owners, cut = encoding.ids, [], False
    for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
        first, last = owner_of_character[begin], owner_of_character[max(begin, end - 1)]
        if len({segment.supervised for segment in segments[first : last + 1]}) > 1:
            # An added token, such as an end of turn, may have swallowed the spaces before it.
            spaces = len(text[begin:end]) - len(text[begin:end].lstrip())
            first = owner_of_character[begin + spaces]
            cut = cut or token not in tokenizer.added_ids
        owners.append(first)
    if cut:
        ids, owners = encode_separately(tokenizer, segments, encoding)
    learned = supervised_segments(segments, learn)
    first_answer = [segment.supervised for segment in (*segments, Segment("", True))].index(True)
    return EncodedRow(
        ids=np.array(ids, np.int32),
        supervised=np.array([learned[owner] for owner in owners], bool),
        source=sum(owner < first_answer for owner in owners),
        cut=cut,
        lossy=_without_spaces(tokenizer.decode(ids)) != _without_spaces(text),
    )


def mask_branches(tokenizer: Tokenizer, row: RowText) -> EncodedRow:
    """Returns the ids of a row with branches. Each turn's prompt has the ids of the prompt's text alone.

    If that is not so in the whole text, because a token crosses the start or end of the turn, the turn is a branch of
    the ids of its prompt and then those of its reply.
    """
    texts: list[TokenText] = []
    apart: list[TokenText] = []
    lossy = False
    for text, spans in row.texts():
        ids, inside = tokenizer.encode(text), []
        for start, stop in spans:
            prompt, turn = tokenizer.encode(text[:start]), tokenizer.encode(text[:stop])
            if turn[: len(prompt)] == prompt and ids[: len(turn)] == turn:
                inside.append((len(prompt), len(turn)))
            else:
                apart.append(separate_turn(tokenizer, prompt, text[start:stop], turn))
        if inside or not texts:
            texts.append(TokenText(ids, inside))
        lossy |= _without_spaces(tokenizer.decode(ids)) != _without_spaces(text)
    return join_texts([*texts, *apart], lossy)


def separate_turn(tokenizer: Tokenizer, prompt: list[int], reply: str, whole: list[int]) -> TokenText:
    """Returns the ids of a turn's prompt, then those of its reply.

    Args:
      whole: ids of the text of both.

    Raises:
      ValueError: they decode to another text than those of `whole`.
    """
    ids = prompt + tokenizer.encode(reply)
    if tokenizer.decode(ids) != tokenizer.decode(whole):
        raise ValueError(
            "a token crosses the start or end of an answer, and the tokenizer can't encode the two separately"
        )
    return TokenText(ids, [(len(prompt), len(ids))], cut=True)


def join_texts(texts: Sequence[TokenText], lossy: bool) -> EncodedRow:
    """Returns the trunk, as far as a branch or target needs it, and the branches after it."""
    trunk, *others = texts
    depths = [_depth(trunk.ids, other) for other in others]
    needed = max([*depths, *(stop for _, stop in trunk.spans)])
    ids, supervised = trunk.ids[:needed], _mask(trunk, needed)
    branches = []
    for other, depth in zip(others, depths, strict=True):
        branches.append(Branch(len(ids), depth))
        ids = ids + other.ids[depth : other.spans[-1][1]]
        mask = _mask(other, other.spans[-1][1])[depth:]
        mask[0] = False  # no position predicts it
        supervised = np.concatenate([supervised, mask])
    return EncodedRow(
        ids=np.frombuffer(array.array("i", ids), np.int32),
        supervised=supervised,
        source=int(supervised.argmax()),
        cut=any(other.cut for other in others),
        lossy=lossy,
        branches=tuple(branches),
    )


def _depth(trunk: Sequence[int], branch: TokenText) -> int:
    """Returns the number of the trunk's ids that a branch continues, fewer than its first turn's prompt has."""
    common = next((n for n, (a, b) in enumerate(zip(trunk, branch.ids, strict=False)) if a != b), len(trunk))
    return max(min(common, len(branch.ids), branch.spans[0][0] - 1), 0)


def _mask(sequence: TokenText, length: int) -> Bool[np.ndarray, " T"]:
    mask = np.zeros(length, bool)
    for start, stop in sequence.spans:
        mask[start:stop] = True
    return mask


def supervised_segments(segments: Sequence[Segment], learn: Learn) -> list[bool]:
    """Returns True for each segment that the loss sees: every answer, only the last one, or all segments."""
    answers = [segment.supervised for segment in segments]
    if learn == "assistant":
        return answers
    last = max((index for index, answer in enumerate(answers) if answer), default=-1)
    return [learn == "all" or index == last for index in range(len(answers))]


def encode_separately(
    tokenizer: Tokenizer, segments: Sequence[Segment], encoding: tokenizers.Encoding
) -> tuple[list[int], list[int]]:
    """Returns the ids of each segment, encoded without its neighbours, and the segment that owns each id.

    Args:
      encoding: of the joined text.

    Raises:
      ValueError: the ids decode to another text than those of `encoding`.
    """
    pieces = tokenizer.encode_batch([segment.text for segment in segments])
    ids = [token for piece in pieces for token in piece]
    if tokenizer.decode(ids) != tokenizer.decode(encoding.ids):
        raise ValueError(
            "a token crosses the start or end of an answer, and the tokenizer can't encode the two separately"
        )
    return ids, [index for index, piece in enumerate(pieces) for _ in piece]


def _without_spaces(text: str) -> str:
    """Returns the text without spaces: some tokenizers add one first, or take those around a special token."""
    return "".join(text.split())
