"""A conversation in the terminal: tokens shown as they come, the history kept."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

from rich.console import Console

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.decode import Step
from qlora_jax.inference.prompts import Prompter
from qlora_jax.inference.stream import TextStream

HELP = "/reset begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer"
# What is said of a reply that did not end by itself.
ENDS = {
    "length": "stopped at --max_new_tokens",
    "context": "stopped: the model's context is full",
    "interrupted": "stopped by Ctrl-C",
}

Stream = Callable[[list[int]], Iterator[Step]]


class Conversation:
    """Turns of a user and an assistant, through the chat template."""

    def __init__(self, prompter: Prompter):
        self._prompter = prompter
        self._messages: list[dict[str, str]] = []

    def ask(self, text: str) -> list[int]:
        """Ids of the prompt that `text` makes after everything before; nothing is kept yet."""
        return self._prompter.conversation([*self._messages, {"role": "user", "content": text}])

    def keep(self, text: str, reply: str) -> None:
        """Adds a question and its answer."""
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


class Text:
    """One text, which person and model write in turn."""

    def __init__(self, prompter: Prompter):
        self._prompter = prompter
        self._text = ""

    def ask(self, text: str) -> list[int]:
        """Ids of everything before and `text`; nothing is kept yet."""
        return self._prompter.text(self._text + text)

    def keep(self, text: str, reply: str) -> None:
        """Adds what the person wrote, and what the model went on with."""
        self._text += text + reply


History = Conversation | Text


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C has been pressed; a second time it interrupts as ever, should the first not be heard."""
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


def show_reply(steps: Iterator[Step], tokenizer: Tokenizer, console: Console) -> tuple[str, str]:
    """(the reply, why it ended: as in Step, or "interrupted" by Ctrl-C), printed as it comes."""
    text, pieces, end, times = TextStream(tokenizer), [], "interrupted", []
    with interruptible() as pressed:
        for step in _waited_for(steps, console):
            pieces.append("" if step.token is None else text.push(step.token))
            _write(pieces[-1], console)
            times.append(time.perf_counter())
            end = step.end or end
            if pressed():
                break
    pieces.append(text.flush())
    _write(f"{pieces[-1]}\n", console)
    if console.is_terminal and len(times) > 1:  # the first token waited for the prompt, and maybe for the compiler
        _note(f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens a second", console)
    return "".join(pieces), end


def chat(prompter: Prompter, stream: Stream, max_positions: int, console: Console) -> None:
    """Reads questions and shows answers until the input ends."""
    _note(HELP, console)
    history = _empty_history(prompter)
    for line in _questions(console):
        if line == "/quit":
            return
        if line == "/reset":
            history = _empty_history(prompter)
            _note("the conversation begins anew", console)
        elif line.startswith("/"):
            _note(f"no such command: {line}; {HELP}", console)
        else:
            _turn(line, prompter.tokenizer, stream, history, max_positions, console)


def _turn(
    line: str, tokenizer: Tokenizer, stream: Stream, history: History, max_positions: int, console: Console
) -> None:
    prompt = history.ask(line)
    if len(prompt) >= max_positions:
        found = f"the conversation has {len(prompt)} tokens with this question, and the model reads {max_positions}"
        _note(f"{found}; the question is left out: shorten it, or begin anew by /reset", console)
        return
    reply, end = show_reply(stream(prompt), tokenizer, console)
    history.keep(line, reply)
    if end in ENDS:
        _note(ENDS[end] + ("; /reset begins anew" if end == "context" else ""), console)


def _empty_history(prompter: Prompter) -> History:
    return Conversation(prompter) if prompter.chat else Text(prompter)


def _write(text: str, console: Console) -> None:
    """The text as it is; rich would take some control characters out."""
    console.file.write(text)
    console.file.flush()


def _note(text: str, console: Console) -> None:
    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _waited_for(steps: Iterator[Step], console: Console) -> Iterator[Step]:
    """The same steps, with a spinner in a terminal until the first one is there: a first reply compiles."""
    with console.status("reading"):
        first = next(steps)
    yield first
    yield from steps


def _questions(console: Console) -> Iterator[str]:
    """Lines that a person types, blank ones left out, until Ctrl-D."""
    mark = "> " if console.is_terminal else ""
    while True:
        try:
            line = input(mark).strip()
        except EOFError:
            _write("\n", console)
            return
        except KeyboardInterrupt:
            _write("\n", console)
            _note("Ctrl-D leaves", console)
            continue
        if line:
            yield line
