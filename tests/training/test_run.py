"""The end of a run: reports in time after a signal, and true words about what is there."""

import itertools
import time
from types import SimpleNamespace

import pytest

from qlora_jax.config import Config, DataArgs, ModelArgs
from qlora_jax.terminal.console import Console
from qlora_jax.training import run as run_module
from qlora_jax.training.early_stopping import BestEvaluation

CONFIG = Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="runs/1")


@pytest.mark.parametrize("limited", [True, False])
def test_reports_of_a_stopped_run_are_skipped_when_they_take_too_long(tmp_path, monkeypatch, limited):
    done = []

    def plot(*arguments, **settings):
        done.append("plot")
        for _ in itertools.count():
            time.sleep(0.02)
            if not limited and len(done) == 1:
                return

    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr(run_module, "REPORT_SECONDS", 0.5)
    monkeypatch.setattr(run_module, "plot_loss", plot)
    monkeypatch.setattr(run_module, "_report_of", lambda *_: None)
    monkeypatch.setattr(run_module, "write_report", lambda *_: done.append("report"))
    write = run_module._write_reports.__wrapped__
    written = write(SimpleNamespace(run=SimpleNamespace(config=CONFIG)), tmp_path, lambda: None, limited=limited)
    assert written != limited and done == (["plot"] if limited else ["plot", "report"])


def test_a_skipped_report_is_not_named_as_a_file(capsys):
    state = SimpleNamespace(step=3, best=BestEvaluation())
    inputs = SimpleNamespace(source=SimpleNamespace(config={}))
    run = SimpleNamespace(config=CONFIG, inputs=inputs, total_steps=10)
    for reported, text in ((True, "runs/1/report.html"), (False, "skipped, because it took more than 5 s")):
        ending = run_module._print_end.__wrapped__
        ending(run, state, finished=False, reported=reported, console=Console())
        printed = capsys.readouterr().out
        assert "stopped after step 3" in printed and text in printed and "--resume" in printed
        assert ("loss.png" in printed) == reported
