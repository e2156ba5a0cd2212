"""The command `watch`: its address, its line in the terminal, and folders that it refuses."""

import io
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from qlora_jax import watch
from qlora_jax.config import ConfigError
from qlora_jax.terminal.console import Console
from qlora_jax.training.live.run_status import RunReader
from tests.training.live.small_folder import SmallRun


def test_it_prints_its_address_and_each_new_state_until_it_is_interrupted(tmp_path):
    with SmallRun(tmp_path / "mine") as run:
        run.steps(1, 4)
        words = [sys.executable, "-m", "qlora_jax", "watch", str(run.folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(words, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **pipes) as process:
            address = process.stdout.readline().removeprefix("page: ").strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
            assert "<title>mine</title>" in urllib.request.urlopen(address, timeout=10).read().decode()
            assert process.stdout.readline().startswith("step 3 of 10  loss 1.000  0:21 left  training: process ")
            run.lock(None)
            assert process.stdout.readline() == "step 3 of 10  loss 1.000  stopped\n"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        assert process.returncode == 130 and "Traceback" not in errors


def test_a_lock_file_cannot_command_the_terminal(tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with SmallRun(tmp_path / "mine") as run:
        (run.folder / "run.lock").write_text("[/bold] \x1b[2J [link=http://example.com]")
        with pytest.raises(KeyboardInterrupt):
            watch._follow(RunReader(run.folder), console)
    shown = console.file.getvalue()
    assert "[/bold] ␛[2J [link=http://example.com]" in shown and "\x1b[2J" not in shown


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "run: missing"),
        (["mine", "--host", "0.0.0.0"], "expected one of 127.0.0.1, ::1"),
        (["mine", "--port", "70000"], "expected from 0 to 65535"),
    ],
)
def test_wrong_settings_are_reported(words, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        watch.main(words)


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="not a run folder"):
        watch.main([str(tmp_path)])
