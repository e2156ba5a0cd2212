"""A row as text: a trunk and branches, each in segments that the loss sees or does not see.

A template may write an assistant's turn in one way when it is the last one, and in another way in the prompts of later
turns: without its reasoning, for example. The model has to learn the first way, after a history of the second. Then
the trunk is the whole conversation as the template writes it, and such a turn is a branch that leaves it:

  trunk     user 1 | answer 1             | user 2 | reasoning 2 answer 2
  branch 1         | reasoning 1 answer 1

Turns that the template never rewrites are learned in the trunk. A row without branches is one text.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from qlora_jax.data.formats.row_format import Segment

Learn = Literal["assistant", "last", "all"]


class LearnedTurn(NamedTuple):
    """A turn of the assistant.

    Fields:
      prompt: the text that inference gives to the model, to the character.
      reply: the text that the model has to write, with its end.
    """

    prompt: str
    reply: str

    @property
    def text(self) -> str:
        """The prompt and the reply."""
        return self.prompt + self.reply


class TextBranch(NamedTuple):
    """Text that leaves the trunk.

    Fields:
      shared: number of the trunk's characters that precede it.
      segments: the rest of the prompt, then replies, with the messages between them.
    """

    shared: int
    segments: list[Segment]


class RowText(NamedTuple):
    """A row as text.

    Fields:
      segments: of the trunk.
      branches: in the order of their last turns.
      last: index of the branch with the row's last turn; -1 if the trunk has it.
      unseen_reasoning: reasoning of the row is in neither its trunk nor its branches.
    """

    segments: list[Segment]
    branches: tuple[TextBranch, ...] = ()
    last: int = -1
    unseen_reasoning: bool = False

    @property
    def answers(self) -> int:
        """Number of turns that the loss sees."""
        parts = [self.segments, *(branch.segments for branch in self.branches)]
        return sum([segment.supervised for part in parts for segment in part])

    @property
    def needed(self) -> int:
        """Number of the trunk's characters that a turn sees or that are learned, in a row with branches."""
        learned = [stop for _, stop in _spans(self.segments, 0)]
        return max([branch.shared for branch in self.branches] + learned)

    def texts(self) -> Iterator[tuple[str, list[tuple[int, int]]]]:
        """Yields the trunk and each branch as whole texts, with [start, stop) of their turns.

        A branch's text begins with the part of the trunk that it continues.
        """
        trunk = join_text(self.segments)
        yield trunk, _spans(self.segments, 0)
        for branch in self.branches:
            yield trunk[: branch.shared] + join_text(branch.segments), _spans(branch.segments, branch.shared)

    def learned(self, learn: Learn) -> "RowText":
        """Returns the row reduced to the turns that `learn` selects.

        "last" keeps only the last turn supervised. "all" keeps the conversation as the template writes it in one text.
        """
        if not self.branches or learn == "assistant":
            return self
        if learn == "all":
            return self._replace(branches=(), last=-1)
        if self.last < 0:
            return self._replace(segments=_only_last(self.segments), branches=())
        branch = self.branches[self.last]
        kept = branch._replace(segments=_only_last(branch.segments))
        trunk = [segment._replace(supervised=False) for segment in self.segments]
        return _as_one_text(self._replace(segments=trunk, branches=(kept,), last=0))


def join_text(segments: Sequence[Segment]) -> str:
    """Returns the text of the segments."""
    return "".join([segment.text for segment in segments])


def build_row_text(rendered: str, turns: Sequence[LearnedTurn]) -> RowText:
    """Returns the conversation `rendered` with a branch for each turn that it does not contain after its prompt.

    Turns that continue each other, as in a loop of tool calls, share a branch.
    """
    texts = [_Text(rendered, [])]
    for turn in reversed(turns):
        home = next((text for text in texts if text.holds(turn)), None)
        if home is None:
            home = _Text(turn.text, [])
            texts.append(home)
        home.spans.append((len(turn.prompt), len(turn.text)))
    trunk, *others = texts
    branches = tuple([_branch(rendered, other) for other in reversed(others)])
    in_trunk = not turns or rendered.startswith(turns[-1].text)
    return _as_one_text(RowText(_segments(rendered, trunk.spans, 0), branches, -1 if in_trunk else len(branches) - 1))


def _as_one_text(row: RowText) -> RowText:
    """Returns the row as one text if a branch has its only turn."""
    if len(row.branches) != 1 or row.answers != 1:
        return row
    shared, (first, *rest) = row.branches[0]
    prompt = join_text(row.segments)[:shared] + first.text
    return row._replace(segments=[Segment(prompt, False), *rest], branches=(), last=-1)


class _Text(NamedTuple):
    """A text, and [start, stop) of the replies in it, from the last to the first."""

    text: str
    spans: list[tuple[int, int]]

    def holds(self, turn: LearnedTurn) -> bool:
        """Returns True if the text begins with the turn and its prompt, and later replies are after it."""
        return self.text.startswith(turn.text) and not (self.spans and self.spans[-1][0] < len(turn.text))


def _branch(trunk: str, branch: _Text) -> TextBranch:
    shared = min(_common_length(trunk, branch.text), branch.spans[-1][0])
    return TextBranch(shared, _segments(branch.text, branch.spans, shared))


def _segments(text: str, spans: Sequence[tuple[int, int]], at: int) -> list[Segment]:
    """Returns the text from `at` on in segments.

    Args:
      spans: of the supervised segments, from the last to the first.
    """
    segments: list[Segment] = []
    for start, stop in reversed(spans):
        segments += [Segment(text[at:start], False), Segment(text[start:stop], True)]
        at = stop
    return [*segments, Segment(text[at:], False)]


def _spans(segments: Sequence[Segment], at: int) -> list[tuple[int, int]]:
    """Returns [start, stop) of the supervised segments, of which the first of all begins at `at`."""
    ends = [at + end for end in itertools.accumulate([len(segment.text) for segment in segments])]
    return [(start, end) for start, end, one in zip([at, *ends], ends, segments, strict=False) if one.supervised]


def _common_length(a: str, b: str) -> int:
    """Returns the number of characters that both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _only_last(segments: Sequence[Segment]) -> list[Segment]:
    """Returns the segments, of which only the last supervised one stays supervised."""
    last = max((index for index, segment in enumerate(segments) if segment.supervised), default=-1)
    return [segment._replace(supervised=index == last) for index, segment in enumerate(segments)]
