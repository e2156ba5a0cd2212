"""Continues replies that call tools: the tools answer, and the model writes another turn, until it calls none.

The ids of earlier turns stay as they were drawn. Those of an answer follow them, so nothing is tokenized again. The
rules for limits are TRL's:

* An answer that does not fit into `max_completion_length` is left out, and the reply ends before it.
* An answer that fills it exactly is kept, without another turn.
* A reply that has called tools `max_tool_calling_iterations` times ends with its next turn, also if that calls one.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from qlora_jax.config.fields import TemplateValue
from qlora_jax.config.rollouts import RolloutArgs
from qlora_jax.inference.engine.request import Request
from qlora_jax.rewards.tools import ToolAnswer, ToolCall, Tools
from qlora_jax.rollouts.reply import Reply
from qlora_jax.rollouts.sampler import Draw, draw_seed
from qlora_jax.rollouts.tool_template import ToolTemplate


@dataclasses.dataclass
class _Dialogue:
    """A reply while it grows.

    Attributes:
      first: the request for its first turn.
      variables: those of its row for the chat template.
      calls: of its last turn.
    """

    first: Request
    variables: Mapping[str, TemplateValue]
    reply: Reply
    calls: Sequence[ToolCall] = ()

    @property
    def ids(self) -> list[int]:
        """The ids so far, prompt included."""
        return [*self.first.prompt, *self.reply.ids]

    def add_turn(self, turn: Reply, template: ToolTemplate) -> None:
        """Adds a turn of the model."""
        message, self.calls = template.read(self.ids, turn.text)
        self.reply = self.reply.with_turn(turn._replace(messages=[message]))

    def add_answers(self, answers: Sequence[ToolAnswer], template: ToolTemplate, longest: int) -> bool:
        """Adds the answers of the last turn's calls, if they fit; returns True if there is room for another turn."""
        calls, self.calls = self.calls, ()
        counts = {"calls": len(calls), "failed_calls": sum(answer.failed for answer in answers)}
        self.reply = self.reply._replace(**{name: getattr(self.reply, name) + n for name, n in counts.items()})
        messages = [
            {"role": "tool", "name": call.name, "content": answer.text}
            for call, answer in zip(calls, answers, strict=True)
        ]
        ids = template.suffix(messages, self.variables)
        if self.reply.ids[-1:] == ids[:1]:  # GLM's models end a turn with the token that begins an answer
            ids = ids[1:]
        if len(self.reply.ids) + len(ids) > longest:
            return False
        self.reply = self.reply.with_answers(ids, template.text([*self.reply.ids, *ids]), messages)
        return len(self.reply.ids) < longest

    def tool_seed(self, turn: int) -> int:
        """Returns the seed of the random numbers of the tools that answer a turn."""
        return draw_seed(self.first.sampling.seed, self.first.repeat, turn)

    def next_request(self, turn: int, longest: int) -> Request:
        """Returns the request for a turn, whose draws depend on the turn's number, too."""
        sampling = dataclasses.replace(self.first.sampling, seed=draw_seed(self.first.sampling.seed, turn))
        left = longest - len(self.reply.ids)
        return dataclasses.replace(self.first, prompt=self.ids, max_new_tokens=left, sampling=sampling)


def continue_with_tools(
    requests: Sequence[Request],
    turns: Sequence[Reply],
    draw: Draw,
    *,
    tools: Tools,
    template: ToolTemplate,
    variables: Sequence[Mapping[str, TemplateValue]],
    settings: RolloutArgs,
) -> list[Reply]:
    """Returns the whole replies.

    Args:
      requests: for the first turn of each reply.
      turns: these first turns.
      draw: draws a turn for each request.
      variables: those of each reply's row for the chat template.
    """
    empty = Reply(ids=[], logps=[], drawn=[], text="", end="stop", messages=[])
    dialogues = [_Dialogue(first, own, empty) for first, own in zip(requests, variables, strict=True)]
    drawn, waiting, longest = turns, dialogues, settings.max_completion_length
    most = settings.max_tool_calling_iterations or math.inf
    for turn in itertools.count(1):
        for dialogue, own in zip(waiting, drawn, strict=True):
            dialogue.add_turn(own, template)
        calls = {number: each.calls for number, each in enumerate(dialogues) if each.calls}
        if not calls or turn > most:
            break
        answers = tools.answer(calls, {number: dialogues[number].tool_seed(turn) for number in calls})
        answered = {number: dialogues[number].add_answers(own, template, longest) for number, own in answers.items()}
        waiting = [dialogues[number] for number, has_room in answered.items() if has_room]
        drawn = draw([each.next_request(turn, longest) for each in waiting])
    return [dialogue.reply for dialogue in dialogues]
