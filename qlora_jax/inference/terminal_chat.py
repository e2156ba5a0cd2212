"""Chats in the terminal: shows tokens as they are generated, and remembers the conversation."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console

from qlora_jax.inference.engine.request import Step
from qlora_jax.inference.prompts import Prompter
from qlora_jax.terminal.visible import visible

HELP = "/reset starts over, /quit or Ctrl-D leaves, Ctrl-C stops a reply"
# Messages about replies that did not end with a stop token.
END_MESSAGES = {
    "length": "stopped at --max_new_tokens",
    "context": "stopped: the model's context is full",
    "interrupted": "stopped by Ctrl-C",
}

Stream = Callable[[list[int]], Iterator[Step]]


class Conversation:
    """The history of a chat that uses the chat template."""

    def __init__(self, prompter: Prompter):
        self._prompter = prompter
        self._messages: list[dict[str, str]] = []

    def ask(self, text: str) -> list[int]:
        """Ids of the history followed by the user message `text`, which is not yet added to the history."""
        return self._prompter.conversation([*self._messages, {"role": "user", "content": text}])

    def add(self, text: str, reply: str) -> None:
        """Adds a user message and its reply to the history."""
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


class PlainText:
    """The history of a chat without a template: one text that user and model continue in turn."""

    def __init__(self, prompter: Prompter):
        self._prompter = prompter
        self._text = ""

    def ask(self, text: str) -> list[int]:
        """Ids of the history followed by `text`, which is not yet added to the history."""
        return self._prompter.text(self._text + text)

    def add(self, text: str, reply: str) -> None:
        """Adds the text of the user and its continuation by the model."""
        self._text += text + reply


History = Conversation | PlainText


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True once Ctrl-C was pressed; a second Ctrl-C raises KeyboardInterrupt."""
    pressed = False

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def show_reply(steps: Iterator[Step], console: Console) -> tuple[str, str]:
    """Prints a reply as it is generated; returns (its text, why it ended: see Step, or "interrupted")."""
    pieces, end, times = [], "interrupted", []
    with interruptible() as pressed:
        for step in _with_spinner(steps, console):
            pieces.append(step.text)
            _write(pieces[-1], console)
            times.append(time.perf_counter())
            end = step.end or end
            if pressed():
                break
    _write("\n", console)
    if console.is_terminal and len(times) > 1:  # the first token includes prefill, and perhaps compilation
        _note(f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s", console)
    return "".join(pieces), end


def chat(prompter: Prompter, stream: Stream, max_positions: int, console: Console) -> None:
    """Reads messages and shows replies until the input ends. Input that is not a terminal gets replies without help.

    Args:
      stream: yields the steps of the reply to a prompt's ids.
    """
    if sys.stdin.isatty():
        _note(HELP, console)
    history = _empty_history(prompter)
    for line in _questions(console):
        if line == "/quit":
            return
        if line == "/reset":
            history = _empty_history(prompter)
            _note("starting over", console)
        elif line.startswith("/"):
            _note(f"unknown command: {line}; {HELP}", console)
        else:
            _turn(line, stream, history, max_positions, console)


def _turn(line: str, stream: Stream, history: History, max_positions: int, console: Console) -> None:
    prompt = history.ask(line)
    if len(prompt) >= max_positions:
        found = f"the conversation is too long: {len(prompt)} tokens; the model has {max_positions} positions"
        _note(f"{found}. The message was dropped: shorten it, or start over with /reset", console)
        return
    reply, end = show_reply(stream(prompt), console)
    history.add(line, reply)
    if end in END_MESSAGES:
        _note(END_MESSAGES[end] + ("; /reset starts over" if end == "context" else ""), console)


def _empty_history(prompter: Prompter) -> History:
    return Conversation(prompter) if prompter.chat else PlainText(prompter)


def _write(text: str, console: Console) -> None:
    """Writes the text unchanged into a file or pipe; in a terminal, control characters are made visible."""
    console.file.write(visible(text) if console.is_terminal else text)
    console.file.flush()


def _note(text: str, console: Console) -> None:
    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _with_spinner(steps: Iterator[Step], console: Console) -> Iterator[Step]:
    """The same steps; in a terminal, a spinner shows until the first, which may wait for compilation."""
    with console.status("reading"):
        first = next(steps)
    yield first
    yield from steps


def _questions(console: Console) -> Iterator[str]:
    """Yields the lines that are typed, without blank ones, until Ctrl-D."""
    is_typed = sys.stdin.isatty()
    prompt = "> " if is_typed and console.is_terminal else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            _write("\n" if is_typed else "", console)
            return
        except KeyboardInterrupt:
            _write("\n", console)
            _note("Ctrl-D leaves", console)
            continue
        if line:
            yield line
