"""Untrusted text reaches a terminal by lines, tables, progress bars, errors and chats; it stays text in all of them."""

import ast
import io
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import rich.console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlora_jax import generate
from qlora_jax.config import run_main
from qlora_jax.evaluation.results import Evaluation, TaskResult, print_tables
from qlora_jax.inference.terminal_chat import show_reply
from qlora_jax.io.loading.progress import loading
from qlora_jax.progress_reporter import ConsoleReporter
from qlora_jax.terminal.console import Console
from qlora_jax.training.display.run_display import Display, print_banner
from tests.inference.test_terminal_chat import steps_of

ROOT = Path(__file__).resolve().parent.parent.parent
HOSTILE = "a\x1b[2Jb\x1b]52;c;eA==\x07c\rd\x08e\x9b1mf\u202eg[red]h[/red]:warning:"
# rich drops BEL, CR and backspace itself.
SHOWN = "a␛[2Jb␛]52;c;eA==cde\ufffd1mf<U+202E>g[red]h[/red]:warning:"


def lines(console: Console) -> None:
    console.print(HOSTILE)
    console.print(Text(HOSTILE, style="bold"))


def tables(console: Console) -> None:
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console.print(Panel(table))


def banner(console: Console) -> None:
    print_banner(HOSTILE, {HOSTILE: HOSTILE}, console)


def run_display(console: Console) -> None:
    with Display(2, 0, 1, console) as display:
        display.message(HOSTILE)
        display.evaluation_progress(HOSTILE)
        display.samples([{"step": 0, "reply": HOSTILE}])


def tensor_names(console: Console) -> None:
    with loading(console) as progress:
        progress(1, 4, HOSTILE)


def progress_labels(console: Console) -> None:
    with ConsoleReporter(console).counting(HOSTILE, 2) as progress:
        progress(1)


def evaluation_tables(console: Console) -> None:
    result = TaskResult(title=HOSTILE, metrics={"m": {}}, comparisons={})
    print_tables(Evaluation(labels={"m": HOSTILE}, tasks={"t": result}), console)


def replies(console: Console) -> None:
    show_reply(steps_of(SHOWN.replace("␛", "\x1b")), console)


WAYS = [lines, tables, banner, run_display, tensor_names, progress_labels, evaluation_tables, replies]


@pytest.mark.parametrize("print_with", WAYS, ids=lambda way: way.__name__)
def test_text_in_a_terminal_stays_text(print_with):
    out = io.StringIO()
    print_with(Console(file=out, width=1000, force_terminal=True))
    text = out.getvalue()
    assert SHOWN.partition("[/red]")[0] in text  # a bar may cut off the end
    assert not [command for command in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\u202e", "\x08") if command in text]


@pytest.mark.parametrize("print_with", [lines, tables, banner, evaluation_tables], ids=lambda way: way.__name__)
def test_nor_does_it_reach_a_file_that_is_shown_in_a_terminal_later(print_with):
    out = io.StringIO()
    print_with(Console(file=out, width=1000))
    assert SHOWN in out.getvalue() and "\x1b" not in out.getvalue()


def test_a_reply_that_is_piped_is_exact():
    out = io.StringIO()
    show_reply(steps_of("a\x1b[2Jb\rc"), Console(file=out))
    assert out.getvalue() == "a\x1b[2Jb\rc\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_replies_to_a_file_of_prompts_keep_their_value(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    line = json.dumps({"reply": HOSTILE}, ensure_ascii=False) + "\n"
    with generate._writer(None) as write:
        write(line)
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"reply": HOSTILE}
    assert (printed == line) != terminal and ("\x9b" in printed) != terminal


def test_errors_show_neither_commands_nor_passwords(capsys):
    def main(arguments):
        raise ValueError(f"{HOSTILE}\nhttps://ann:secret@hub.example: does not answer")

    with pytest.raises(SystemExit):
        run_main(main, [])
    shown = SHOWN.replace("eA==c", "eA==␇c").replace("cde", "c␍d␈e")
    assert capsys.readouterr().err == f"error: {shown}\nhttps://***@hub.example: does not answer\n"


def test_warnings_are_one_line_without_commands(capsys):
    def main(arguments):
        warnings.warn(HOSTILE, stacklevel=2)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        run_main(main, [])
    printed = capsys.readouterr().err
    assert printed.startswith("warning: a␛[2Jb") and printed.count("\n") == 1 and "\x1b" not in printed


def calls(name: str) -> Iterator[str]:
    """Yields the file of each call of a function by its plain name in the package."""
    for file in sorted((ROOT / "qlora_jax").rglob("*.py")):
        if f"{name}(" not in (source := file.read_text(encoding="utf-8")):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
                yield str(file.relative_to(ROOT / "qlora_jax"))


def test_every_console_of_the_package_is_this_one():
    files = set(calls("Console"))
    assert len(files) > 5
    foreign = [file for file in files if "from rich.console import Console" in _at_run_time(file)]
    assert foreign == []


def _at_run_time(file: str) -> str:
    """Returns the source without the imports for type checkers."""
    before, _, block = (ROOT / "qlora_jax" / file).read_text(encoding="utf-8").partition("if TYPE_CHECKING:\n")
    return before + "\n".join(line for line in block.split("\n") if not line.startswith("    from "))


def test_nothing_else_prints_but_help_errors_and_json():
    assert set(calls("print")) == {"__main__.py", "config/command_line.py", "generate.py", "plan.py", "predict.py"}


def test_rich_itself_would_obey():
    """The hostile text does something in a console of rich, so the tests above can fail."""
    out = io.StringIO()
    rich.console.Console(file=out, width=1000, force_terminal=True).print(HOSTILE, highlight=False)
    assert "\x1b[2J" in out.getvalue() and "[red]" not in out.getvalue()
