"""Writes Ollama's Modelfile next to a GGUF file: the chat template in Go's template language, stops and system text.

A jinja template is a program, and Go's language has no trimming and few functions. So the texts around each role's
messages are read off rendered conversations, and the result must then reproduce what the jinja template writes for
other conversations. A template that it does not reproduce is refused.

Ollama joins neighbouring messages of one role, puts SYSTEM before messages without a system message, and lets the
tokenizer add bos (ollama/ollama: template/template.go, parser/parser.go, docs/modelfile.md).
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_jax.atomic_files import write_text
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.io.pretrained import OpenedModel

FILE = "Modelfile"
# Replies of `generate` are greedy by default; Ollama's defaults draw them and punish repetition.
PARAMETERS = ("temperature 0", "repeat_penalty 1")
SYSTEM, USER, ANSWER = "Sys-1", "Ask-2", "Reply-3"  # texts whose surroundings are read off
TEXTS = (
    "Hello",
    "What is 2 + 2?\nAnswer briefly.",
    '{"a": [1, 2]} {{ braces }}',
    "für \u4f60\u597d \U0001f642",
    "a  b",
)
TRIMS = "the chat template removes the spaces at the ends of messages, and Ollama keeps them"
Message = dict[str, str]


class Turns(NamedTuple):
    """The texts around messages.

    Attributes:
      start: before all messages: bos, if the tokenizer does not add it.
      begin, end: by role; they lack the system role if the template rejects it.
      prompt: begins the reply that is asked for.
      joined: the first user's message follows the system message without its `begin`.
      system: the text that the template writes in place of a missing system message; empty: none.
    """

    start: str
    begin: dict[str, str]
    end: dict[str, str]
    prompt: str
    joined: bool
    system: str

    def render(self, messages: Sequence[Message]) -> str:
        """Returns the text of messages, and the beginning of a reply."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        text, last = self.start, ""
        for message in messages:
            role = message["role"]
            follows = self.joined and role == "user" and last == "system"
            text += ("" if follows else self.begin[role]) + message["content"] + self.end[role]
            last = role
        return text + self.prompt


def conversations(contents: Sequence[str], systems: Sequence[bool]) -> list[list[Message]]:
    """Returns conversations of one to three questions; `systems`: with a system message, without, or both."""
    found = []
    for system, questions, shift in itertools.product(systems, (1, 2, 3), range(len(contents))):
        texts = itertools.cycle((*contents[shift:], *contents[:shift]))
        roles = ["system"] * system + ["user", "assistant"] * questions
        found.append([{"role": role, "content": next(texts)} for role in roles[:-1]])
    return found


def read_turns(tokenizer: Tokenizer) -> tuple[Turns, list[str]]:
    """Reads a chat template's turns off rendered conversations; returns notes on where Ollama differs.

    Raises:
      ValueError: the texts around messages do not reproduce the template.
    """
    if tokenizer.writes_date:
        raise ValueError("the chat template writes the date")
    start, turns = _start(tokenizer), _turns(tokenizer)
    takes_system = "system" in turns.begin
    notes = [] if takes_system else ["the chat template rejects system messages, and Ollama drops them"]
    for texts, note in (((*TEXTS, " spaces at both ends \n"), []), (TEXTS, [TRIMS])):
        cases = conversations(texts, (False, True) if takes_system else (False,))
        wrong = [each for each in cases if start + _written(tokenizer, each, True) != turns.render(each)]
        if not wrong:
            return turns, notes + note
    raise ValueError(f"the chat template writes more than fixed texts around messages, as in {json.dumps(wrong[0])}")


def _leading_bos(tokenizer: Tokenizer) -> str:
    """Returns the bos before all messages; empty if the template writes none, or begins each turn with it."""
    bos, user = tokenizer.special_tokens.get("bos_token", ""), {"role": "user", "content": USER}
    text = tokenizer.render([user, {"role": "assistant", "content": ANSWER}, user])
    if tokenizer.add_bos_token and not (bos and text.startswith(bos)):
        raise ValueError(f"the chat template does not begin with {bos}, which Ollama's tokenizer adds")
    return bos if bos and text.startswith(bos) and (tokenizer.add_bos_token or text.count(bos) == 1) else ""


def _start(tokenizer: Tokenizer) -> str:
    """Returns the bos that the template writes and Ollama's tokenizer does not add."""
    return "" if tokenizer.add_bos_token else _leading_bos(tokenizer)


def _written(tokenizer: Tokenizer, messages: Sequence[Message], prompt: bool = False) -> str:
    """Returns the template's text without the bos before all messages."""
    return tokenizer.render(messages, add_generation_prompt=prompt).removeprefix(_leading_bos(tokenizer))


def _turns(tokenizer: Tokenizer) -> Turns:
    texts = {"system": SYSTEM, "user": USER, "assistant": ANSWER}
    system, user, answer = ({"role": role, "content": text} for role, text in texts.items())
    asked = _written(tokenizer, [user])
    first, _, end_of_user = asked.partition(USER)
    pieces = _between(_written(tokenizer, [user, answer, user, answer]), USER, ANSWER)
    begin_user = _without(pieces[2], pieces[4], "")
    found = Turns(
        start=_start(tokenizer),
        begin={"user": begin_user, "assistant": _without(pieces[1], end_of_user, "")},
        end={"user": end_of_user, "assistant": pieces[4]},
        prompt=_without(_written(tokenizer, [user], True), asked, ""),
        joined=False,
        system="",
    )
    try:
        before, after, _ = _between(_written(tokenizer, [system, user]), SYSTEM, USER)
    except ValueError:  # the template's own error for a role, or a message that it drops
        return found
    joined = not after.endswith(begin_user)
    end_of_system = after.removesuffix(begin_user)
    default = first.removesuffix(begin_user)
    return found._replace(
        begin=found.begin | {"system": before},
        end=found.end | {"system": end_of_system},
        joined=joined,
        system=_without(default, before, end_of_system) if default else "",
    )


def _between(text: str, *contents: str) -> list[str]:
    """Splits a text at its messages' contents."""
    for content in contents:
        text = text.replace(content, "\0")
    pieces = text.split("\0")
    if len(pieces) < len(contents) + 1:
        raise ValueError(f"it drops or rewrites messages: {text[:200]!r}")
    return pieces


def _without(text: str, begin: str, end: str) -> str:
    if len(text) < len(begin) + len(end) or not (text.startswith(begin) and text.endswith(end)):
        raise ValueError(f"{text!r} does not begin with {begin!r} and end with {end!r}")
    return text[len(begin) : len(text) - len(end)]


def go_template(turns: Turns) -> str:
    """Returns the template in Go's language. Texts are quoted strings, so spaces and braces keep their meaning."""

    def branch(role: str) -> str:
        begin, end = _literal(turns.begin[role]), _literal(turns.end[role])
        if turns.joined and role == "user":
            begin = "{{ if not $system }}" + begin + "{{ end }}{{ $system = false }}"
        if turns.joined and role == "system":
            end += "{{ $system = true }}"
        return f'if eq .Role "{role}" }}}}{begin}{{{{ .Content }}}}{end}'

    first = _literal(turns.start) + "{{ $system := false }}" * turns.joined
    branches = "{{ else ".join(map(branch, turns.begin))
    return f"{first}{{{{ range .Messages }}}}{{{{ {branches}{{{{ end }}}}{{{{ end }}}}{_literal(turns.prompt)}"


def _literal(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def write_modelfile(folder: Path, opened: OpenedModel, weights: str, adapter: str | None = None) -> list[str]:
    """Writes folder/Modelfile, unless Ollama's language cannot express the template; returns notes.

    Args:
      weights: GGUF file of the model, or of the base, relative to the folder or absolute.
      adapter: GGUF file of the LoRA.
    """
    tokenizer = opened.tokenizer
    try:
        turns, notes = (None, []) if tokenizer.chat_template is None else read_turns(tokenizer)
    except ValueError as error:
        return [f"no {FILE} for Ollama: {error}. Write its TEMPLATE by hand (docs/export.md)"]
    system = "" if turns is None else turns.system
    if '"""' in system:
        return [f'no {FILE} for Ollama: the system text of the chat template contains """, which it cannot quote']
    stops = [tokenizer.backend.id_to_token(number) for number in opened.stop_ids]
    lines = [
        f"FROM {weights}",
        *([] if adapter is None else [f"ADAPTER {adapter}"]),
        f'TEMPLATE """{"{{ .Prompt }}" if turns is None else go_template(turns)}"""',
        *([f'SYSTEM """{system}"""'] if system else []),
        *(f'PARAMETER stop "{stop}"' for stop in stops if stop is not None),
        *(f"PARAMETER {each}" for each in PARAMETERS),
    ]
    write_text(folder / FILE, "\n".join(lines) + "\n")
    return [*notes, f"for Ollama: ollama create NAME -f {FILE}, in that folder"]
