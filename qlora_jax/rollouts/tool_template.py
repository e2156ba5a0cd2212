"""Writes tools with a chat template, and the ids of their answers; reads the calls in a turn."""

from collections.abc import Mapping, Sequence

from qlora_jax.config.fields import TEMPLATE_CHOICES, TemplateValue
from qlora_jax.data.formats.turn_fields import REASONING, check_template_shows, decode_json, with_row_kwargs
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.reply_format import ReplyFormat, reply_format
from qlora_jax.inference.reply_reader import Call, ReplyReader, Text
from qlora_jax.rewards.tools import ToolCall
from qlora_jax.untrusted_json import JsonObject

_USER = {"role": "user", "content": "Hi"}
_PROMPT_END = 64  # ids of a prompt's end, which may open a block of reasoning


class ToolTemplate:
    """A chat template with tools.

    Args:
      tokenizer: of the run, with its template.
      schemas: of the tools; an environment may have none.
      stop_ids: ids with which the model ends a turn.

    Attributes:
      stop_ids: those, and the one that ends a turn with calls.

    Raises:
      ValueError: the template does not write tools, their calls, or their answers.
    """

    def __init__(self, tokenizer: Tokenizer, schemas: Sequence[JsonObject], stop_ids: frozenset[int]):
        fix = "Set data.chat_template to a jinja file that writes tools, or use a model that was trained to call them"
        if tokenizer.chat_template is None:
            raise ValueError(
                "--tool, --environment: plain text cannot have tools (found a model without a chat template). "
                f"Set data.chat_template to {TEMPLATE_CHOICES}, with tools in it"
            )
        self._tokenizer, self._schemas = tokenizer, schemas or None
        self.stop_ids = stop_ids
        if not schemas:
            return
        if tokenizer.render([_USER], True, schemas) == tokenizer.render([_USER], True):
            raise ValueError(f"--tool, --environment: the chat template does not write tools. {fix}")
        form = reply_format(tokenizer)
        if form.calls is None:
            raise ValueError(f"--tool, --environment: the chat template does not write calls in a known way. {fix}")
        self._form: ReplyFormat = form
        self.stop_ids |= frozenset() if form.calls.end_id is None else {form.calls.end_id}
        answer = {"role": "tool", "name": schemas[0]["function"]["name"], "content": "Qz7ANSWERx9Zq"}
        check_template_shows([answer], self.text(self.suffix([answer], {})), None)

    def prompt(self, messages: Sequence[Message], variables: Mapping[str, TemplateValue]) -> list[int]:
        """Returns the ids of a conversation with the tools, up to where the model replies."""
        tokenizer = self._of_row(variables)
        return tokenizer.encode(tokenizer.render(messages, True, self._schemas))

    def suffix(self, answers: Sequence[Message], variables: Mapping[str, TemplateValue]) -> list[int]:
        """Returns the ids that follow a turn which calls tools: their answers, up to the model's next turn.

        It is taken from a short conversation, as in TRL, because templates may write the earlier turns of a long one in
        another way than the model did.

        Raises:
          ValueError: the end of the turn is not found once an answer follows.
        """
        tokenizer = self._of_row(variables)
        call = {"type": "function", "function": {"name": answers[0]["name"], "arguments": {}}}
        turns = [_USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        before = tokenizer.encode(tokenizer.render(turns))
        whole = tokenizer.encode(tokenizer.render([*turns, *answers], True))
        # A line break after the end of a turn is not drawn, so it belongs to the answers. Qwen3's template writes the
        # turn itself in another way once an answer follows, so ends of turns are counted.
        ends = [after for after, token in enumerate(whole, start=1) if token in self.stop_ids]
        count = sum(token in self.stop_ids for token in before)
        start = ends[count - 1] if 0 < count <= len(ends) else len(before)
        if count > len(ends) or (not count and whole[:start] != before):
            raise ValueError(
                "--tool, --environment: the chat template writes a call in another way once its answer follows. Set "
                "data.chat_template to a jinja file that does not"
            )
        return whole[start:]

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return self._tokenizer.decode(ids)

    def read(self, prompt: Sequence[int], text: str) -> tuple[Message, list[ToolCall]]:
        """Returns (the message of a turn, its calls).

        Args:
          prompt: ids before the turn.
        """
        reader = ReplyReader(self._form, self.text(prompt[-_PROMPT_END:]), self._schemas or ())
        parts = reader.feed(text, last=True)
        texts = [part for part in parts if isinstance(part, Text)]
        said = {kind: "".join(part.text for part in texts if part.kind == kind) for kind in ("reasoning", "content")}
        calls = [ToolCall(part.name, decode_json(part.arguments)) for part in parts if isinstance(part, Call)]
        message: dict[str, object] = {"role": "assistant", "content": said["content"]}
        if said["reasoning"]:
            message[REASONING] = said["reasoning"]
        if calls:
            message["tool_calls"] = [{"type": "function", "function": call._asdict()} for call in calls]
        return message, calls

    def _of_row(self, variables: Mapping[str, TemplateValue]) -> Tokenizer:
        return with_row_kwargs(self._tokenizer, variables)
