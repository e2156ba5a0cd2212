"""Two processes, as threads over a store of texts, compare their settings and rows before a run starts."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora_jax.config import Config
from qlora_jax.hosts.group import Disagreement, Group
from qlora_jax.training.session import open_inputs
from qlora_jax.training.several_processes import agree_on_inputs, agree_on_settings
from tests.e2e.project import project, write_rows


class Store:
    """The part of JAX's coordination service that a Group uses."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, text: str) -> None:
        with self._changed:
            self._texts[key] = text
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._texts, milliseconds / 1000), key
            return self._texts[key]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """together(function, *values) -> what two processes, each with its value, are refused for; empty if they agree."""

    def run(function: Callable[..., None], *values: object) -> str:
        store = Store()
        monkeypatch.setattr("qlora_jax.hosts.group.client", lambda: store)

        def one(process: int) -> str:
            try:
                function(Group(process, len(values)), values[process])
            except Disagreement as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(len(values)) as threads:
            first, *others = threads.map(one, range(len(values)))
        assert others == [first] * (len(values) - 1)
        return first

    return run


def with_data(config: Config, **changes: object) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def test_rows_may_be_elsewhere_and_must_be_the_same(together, tmp_path: Path):
    config = project(tmp_path, data=dict(eval_fraction=0.0))
    same, fewer = (str(write_rows(tmp_path / f"{count}.jsonl", count)) for count in (40, 39))
    changes = [dict(eval=same), dict(eval=fewer), dict(eval=None), dict(train=fewer, eval=same)]
    first, other_eval, no_eval, other_train = (open_inputs(with_data(config, **change)) for change in changes)
    moved = open_inputs(with_data(config, eval=str(write_rows(tmp_path / "moved.jsonl", 40))))
    assert together(agree_on_inputs, first, moved) == ""
    for other in (other_eval, no_eval):
        refused = together(agree_on_inputs, first, other)
        assert "data.eval: rows and tokens: " in refused and "data.train: rows" not in refused
    assert "data.train: rows and tokens: " in together(agree_on_inputs, first, other_train)


def test_paths_may_differ_and_other_settings_may_not(together, tmp_path: Path):
    config = project(tmp_path)
    moved = dataclasses.replace(with_data(config, eval="elsewhere.jsonl", train={"here.jsonl": 1.0}), output="other")
    hosts = dataclasses.replace(config.hosts, process=1)

    def agree(group: Group, one: Config) -> None:
        agree_on_settings(group, one, tmp_path)

    assert together(agree, config, dataclasses.replace(moved, hosts=hosts)) == ""
    assert "data.eval_fraction: 0.2 in process 0; 0.1 in process 1" in together(
        agree, config, with_data(config, eval_fraction=0.1)
    )
