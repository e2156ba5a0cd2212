"""A sampled reply: the tokens that the model drew, in one turn or several, and those of tools between them."""

from collections.abc import Sequence
from typing import NamedTuple

from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.inference.engine.request import EndReason
from qlora_jax.rewards.functions import GivenReward


class Text(NamedTuple):
    """Tokens after a prompt; see Reply."""

    ids: list[int]
    logps: list[float]
    drawn: list[bool]

    def after(self, depth: int) -> "Text":
        """Returns the text without its first tokens."""
        return Text(self.ids[depth:], self.logps[depth:], self.drawn[depth:])


class Reply(NamedTuple):
    """A reply to a prompt.

    Fields:
      ids: its tokens, the stop ids at the end of turns included.
      logps: log p of each token when it was drawn, by the logits divided by the temperature; 0 for others.
      drawn: True for each token that the model drew, False for those of tools' answers.
      text: of all tokens, without the last stop id.
      end: why the last turn ended; "stop" if the model ended it.
      messages: the turns, of the assistant and of tools.
      calls, failed_calls: number of the tools' calls, and of those that gave an error.
      others: further texts after the same prompt, whose earlier turns a template wrote in another way than they were
        drawn; no token is drawn in two of them.
      given: by an environment that rewards its replies itself.
    """

    ids: list[int]
    logps: list[float]
    drawn: list[bool]
    text: str
    end: EndReason
    messages: list[Message]
    calls: int = 0
    failed_calls: int = 0
    others: tuple[Text, ...] = ()
    given: GivenReward | None = None

    @property
    def texts(self) -> tuple[Text, ...]:
        """All texts of the reply."""
        return Text(self.ids, self.logps, self.drawn), *self.others

    @property
    def is_cut(self) -> bool:
        """True if it ended before the model ended it."""
        return self.end != "stop"

    @property
    def length(self) -> int:
        """The number of tokens that the model drew."""
        return sum(sum(text.drawn) for text in self.texts)

    def with_answers(self, ids: Sequence[int], text: str, messages: Sequence[Message]) -> "Reply":
        """Returns the reply with the answers of tools after it; it is cut until another turn follows.

        Args:
          text: of the reply with them.
        """
        return self._replace(
            ids=[*self.ids, *ids],
            logps=[*self.logps, *([0.0] * len(ids))],
            drawn=[*self.drawn, *([False] * len(ids))],
            text=text,
            end="length",
            messages=[*self.messages, *messages],
        )

    def with_turn(self, turn: "Reply") -> "Reply":
        """Returns the reply with another turn of the model after it."""
        return self._replace(
            ids=self.ids + turn.ids,
            logps=self.logps + turn.logps,
            drawn=self.drawn + turn.drawn,
            text=self.text + turn.text,
            end=turn.end,
            messages=self.messages + turn.messages,
        )
