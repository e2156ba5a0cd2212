"""The progress of loading, without a terminal and in one."""

import io

from rich.console import Console

from qlora_jax.io.loading.progress import SCORING, loading


def _output(terminal: bool) -> str:
    text = io.StringIO()
    with loading(Console(file=text, force_terminal=terminal, width=120)) as progress:
        for done in range(10, 101, 10):
            progress(done * 1_000_000, 100_000_000, f"tensor{done}")
        for _ in range(2):
            for done in (1, 3, 4):
                progress(done, 4, "", SCORING)
    return text.getvalue()


def test_four_lines_without_a_terminal() -> None:
    lines = [f"loading: {percent}% of 100 MB" for percent in (25, 50, 75, 100)]
    lines += 2 * [f"scoring held-out rows: {percent}% of 4 rows" for percent in (25, 75, 100)]
    assert _output(terminal=False).splitlines() == lines


def test_a_bar_in_a_terminal() -> None:
    shown = _output(terminal=True)
    assert "100.0/100.0 MB" in shown and "4/4 rows" in shown
