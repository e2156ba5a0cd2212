"""Runs whose chat template writes the date: they resume on another day with the rows of their first."""

import dataclasses
import datetime
import json
import types
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.config import Config, read_config
from qlora_jax.data.tokenizer import tokenizer
from qlora_jax.io.pretrained import open_finetuned
from tests.e2e.project import TEMPLATE, project, stop_after
from tests.e2e.tiny_runs import arrays_at, numbers, run

DATED = "{{ strftime_now('%d %B %Y') }}\n" + TEMPLATE


def set_today(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    date = types.SimpleNamespace(today=lambda: datetime.date(2026, 11, day), fromisoformat=datetime.date.fromisoformat)
    monkeypatch.setattr(tokenizer, "datetime", types.SimpleNamespace(date=date))


def dated_project(folder: Path) -> Config:
    folder.mkdir()
    template, rows = folder / "dated.jinja", folder / "chats.jsonl"
    template.write_text(DATED)
    chats = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}] for i in range(8)]
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    files = {"train": str(rows), "chat_template": str(template), "eval_fraction": 0.0, "buckets": 1}
    return project(folder, data=files, train=dict(steps=2, save_every=1, eval_every=0))


def test_a_run_resumes_on_another_day_and_notices_another_template(tmp_path, monkeypatch):
    set_today(monkeypatch, 28)
    whole = dated_project(tmp_path / "whole")
    assert run(whole)
    config = dated_project(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_after(patch, config, 1)
        assert not run(config)
    set_today(monkeypatch, 29)
    (Path(config.output) / "config.yaml").unlink()  # the checkpoint has the settings too
    assert run(config, resume=True)
    assert numbers(config) == numbers(whole)
    for resumed, expected in zip(arrays_at(config, 2), arrays_at(whole, 2), strict=True):
        np.testing.assert_array_equal(resumed, expected)
    assert read_config(Path(config.output) / "config.yaml").data.template_date == "2026-11-28"
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, template_date="2026-11-29"))
    with pytest.raises(ValueError, match=r"data\.train: other rows or tokens"):
        run(other, resume=True)
    assert_a_changed_template_is_refused(config)


def assert_a_changed_template_is_refused(config: Config) -> None:
    assert open_finetuned(config.output).tokenizer.chat_template == DATED
    template = Path(str(config.data.chat_template))
    template.write_text(DATED + " ")
    with pytest.raises(ValueError, match=r"dated\.jinja: not the chat template that .* was trained with.*Restore the"):
        open_finetuned(config.output)
    assert open_finetuned(config.output, chat_template=str(template)).tokenizer.chat_template == DATED + " "


def test_a_date_that_no_template_writes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.template_date: the chat template does not write the date"):
        run(project(tmp_path, data={"template_date": "2026-11-28"}))
