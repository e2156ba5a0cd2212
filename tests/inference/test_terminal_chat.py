"""The chat, with a scripted model: commands, interrupts, a full context."""

import io
import os
import signal

import pytest
from rich.console import Console

from qlora_jax.inference.engine.detokenizer import TextStream
from qlora_jax.inference.engine.request import Step
from qlora_jax.inference.prompts import Prompter
from qlora_jax.inference.terminal_chat import HELP, chat, show_reply
from tests.inference.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
PROMPTER = Prompter(tokenizer=TOKENIZER, chat=False, system=None)


def steps_of(text: str, end: str = "stop"):
    shown = TextStream(TOKENIZER)
    for token in TOKENIZER.encode(text):
        yield Step(0, token, shown.push(token), None)
    yield Step(0, None, shown.flush(), end)


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def talk(
    monkeypatch, typed: str, replies: list[str], max_positions: int = 1000, stdin: type[io.StringIO] = io.StringIO
) -> tuple[str, list[str]]:
    """(what is printed, the prompts that the model got)."""
    monkeypatch.setattr("sys.stdin", stdin(typed))
    asked, out, left = [], console(), iter(replies)

    def stream(ids):
        asked.append(TOKENIZER.decode(ids))
        return steps_of(next(left))

    chat(PROMPTER, stream, max_positions, out)
    return out.file.getvalue(), asked


def test_commands_and_history(monkeypatch):
    typed = "one \n/rest\n\n two\n/reset\nthree\n/quit\nfour\n"
    printed, asked = talk(monkeypatch, typed, ["[ä]", "[2]", "[3]"])
    assert asked == ["one", "one[ä]two", "three"]
    assert "[ä]\n" in printed
    assert "unknown command: /rest" in printed


def test_only_a_terminal_gets_help(monkeypatch):
    printed, asked = talk(monkeypatch, "one\ntwo\n", ["[1]", "[2]"])
    assert asked == ["one", "one[1]two"] and printed == "[1]\n[2]\n"
    assert talk(monkeypatch, "one\n", ["[1]"], stdin=Terminal)[0] == f"{HELP}\n[1]\n\n"


def test_a_question_that_does_not_fit_is_left_out(monkeypatch):
    printed, asked = talk(monkeypatch, "12345\n12345\n1\n", ["abc", "d"], max_positions=10)
    assert asked == ["12345", "12345abc1"]
    assert "13 tokens; the model has 10 positions" in printed


def test_ctrl_c_stops_the_answer_and_leaves_the_rest_alone():
    def steps():
        for token in TOKENIZER.encode("abcdef"):
            if token == TOKENIZER.encode("c")[0]:
                os.kill(os.getpid(), signal.SIGINT)
            yield Step(0, token, TOKENIZER.decode([token]), None)

    before, out = signal.getsignal(signal.SIGINT), console()
    assert show_reply(steps(), out) == ("abc", "interrupted")
    assert out.file.getvalue() == "abc\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts_as_ever():
    def steps():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        yield Step(0, 1, "a", None)

    with pytest.raises(KeyboardInterrupt):
        show_reply(steps(), console())


def test_a_full_context_ends_the_answer_and_tells_the_way_out(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("question\n"))
    out = console()
    chat(PROMPTER, lambda ids: steps_of("x", "context"), 100, out)
    assert "x\nstopped: the model's context is full; /reset starts over" in out.file.getvalue()


@pytest.mark.parametrize("end", ["stop", "length", "context"])
def test_why_a_reply_ended(end):
    assert show_reply(steps_of("x", end), console()) == ("x", end)
