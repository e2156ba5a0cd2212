"""Two processes, as threads over a store of texts, compare their settings and rows before a run starts."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora_jax.config import Config
from qlora_jax.hosts.group import Disagreement, Group
from qlora_jax.io.run_folder.run_lock import RunLock, follow_lock, lock_run
from qlora_jax.training.run_spec import open_inputs
from qlora_jax.training.several_processes import agree_on_inputs, agree_on_settings, lock_together
from tests.e2e.project import project, write_model, write_rows


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


def test_a_model_of_the_same_shapes_with_other_weights_is_refused(together, tmp_path: Path):
    """One machine may have a finetuned model, or another revision, in its folder."""
    config = project(tmp_path, data=dict(eval_fraction=0.0))
    copy, tuned = (str(write_model(tmp_path / f"seed {seed}", seed)) for seed in (0, 1))
    first, same, other = (
        open_inputs(dataclasses.replace(config, model=dataclasses.replace(config.model, path=path)))
        for path in (config.model.path, copy, tuned)
    )
    assert together(agree_on_inputs, first, same) == ""
    refused = together(agree_on_inputs, first, other)
    assert refused.count(" in process 0; ") == 1 and "model: first bytes of its tensors: " in refused


def test_seeds_settings_and_versions_are_refused_in_one_message(together, monkeypatch, tmp_path: Path):
    config, here = project(tmp_path), threading.local()
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1, micro_batch_size=4))
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"1.{here.process}" if name == "jax" else "1.0")

    def agree(group: Group, one: Config) -> None:
        here.process = group.process
        agree_on_settings(group, one, tmp_path)

    lines = together(agree, config, other).splitlines()
    assert [line.strip() for line in lines[1:-1]] == [
        "train.micro_batch_size: 2 in process 0; 4 in process 1",
        "train.seed: 0 in process 0; 1 in process 1",
        'version of jax: "1.0" in process 0; "1.1" in process 1',
    ]
    assert lines[-1].startswith("Start all processes with the same command, versions and files")


def test_all_open_the_lock_before_one_may_leave(together, monkeypatch, tmp_path: Path):
    """Otherwise an error of process 0 would look like a folder that is gone in the others."""

    def slowly(run: Path) -> contextlib.AbstractContextManager[RunLock]:
        time.sleep(0.5)
        return follow_lock(run)

    monkeypatch.setattr("qlora_jax.training.several_processes.follow_lock", slowly)
    config, run = project(tmp_path), tmp_path / "run"

    def lock_and_fail(group: Group, _: None) -> None:
        with lock_together(group, lock_run(run, pytest.fail), config, run):
            raise Disagreement("the same error in all processes")

    assert together(lock_and_fail, None, None) == "the same error in all processes"
    assert not run.exists()


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
