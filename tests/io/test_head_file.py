"""Tests of head.json: reading it back, damage, and a run without it."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from qlora_jax.config import Config, DataArgs, ModelArgs, write_config
from qlora_jax.io.head_file import HEAD_FILE, read_head, write_head
from qlora_jax.io.run_folder.checkpoint import CONFIG_FILE, Checkpoints, open_run
from qlora_jax.objectives.head_objective import TrainedHead

HEAD = TrainedHead(objective="classification", labels=("moon", "sun"), pooling="mean")


def test_a_head_is_read_as_it_was_written(tmp_path: Path) -> None:
    for columns in ((), (("text",), ("premise", "hypothesis"))):
        write_head(tmp_path, dataclasses.replace(HEAD, text_columns=columns))
        found = read_head(tmp_path)
        assert found is not None and found == HEAD and found.text_columns == columns


@pytest.mark.parametrize(("old", "new"), [("moon", "noon"), ("mean", "last"), ("classification", "multi_label")])
def test_other_values_than_were_written_are_refused(tmp_path: Path, old: str, new: str) -> None:
    write_head(tmp_path, HEAD)
    (tmp_path / HEAD_FILE).write_text((tmp_path / HEAD_FILE).read_text().replace(old, new))
    with pytest.raises(ValueError, match=r"head\.json: damaged \(its values are not those that were written\)"):
        read_head(tmp_path)


def test_a_file_without_a_digest_is_read_with_one_warning(tmp_path: Path) -> None:
    write_head(tmp_path, HEAD)
    record = json.loads((tmp_path / HEAD_FILE).read_text())
    record.pop("digest")
    (tmp_path / HEAD_FILE).write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=f"^{tmp_path}: an earlier version .* without digests") as caught:
        assert read_head(tmp_path) == read_head(tmp_path) == HEAD
    assert len(caught) == 1


def test_a_run_without_the_file_is_refused(tmp_path: Path) -> None:
    config = Config(
        model=ModelArgs(path="m"), data=DataArgs(train="t.jsonl"), objective="classification", output=str(tmp_path)
    )
    write_config(config, tmp_path / CONFIG_FILE)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        lora = {"score": {"kernel": jnp.ones((4, 2))}}
        checkpoints.save(1, lora, {"mu": jnp.zeros(3)}, {"step": 1, "fingerprint": "f"})
    with pytest.raises(ValueError, match=r"head\.json: missing, but objective=classification trains the head"):
        open_run(tmp_path)
    write_head(tmp_path, HEAD)
    assert open_run(tmp_path).head == HEAD
