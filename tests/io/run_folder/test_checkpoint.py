"""Checkpoints: retention, a full disk, and errors for missing or damaged ones."""

import errno
import os
import resource
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.io.run_folder import checkpoint
from qlora_jax.io.run_folder.checkpoint import (
    CHECKPOINT_FOLDER,
    CheckpointError,
    Checkpoints,
    open_run,
    saved_steps,
)
from tests.conftest import SMALL_DISK_BYTES

LORA = {"model.layers.mlp.up_proj": {"lora_a": jnp.arange(60000.0), "lora_b": jnp.ones(5)}}


@contextmanager
def full_disk():
    """Limits every file to 64 bytes, like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_newest_are_kept_and_restored(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, LORA, {"mu": jnp.full(3, float(step))}, {"step": step})
        lora, state, rest = checkpoints.restore(LORA, {"mu": jnp.zeros(3)})
    np.testing.assert_array_equal(lora["model.layers.mlp.up_proj"]["lora_a"], np.arange(60000.0))
    np.testing.assert_array_equal(state["mu"], [3, 3, 3])
    assert rest == {"step": 3}
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_one_more_that_is_named_is_kept(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in range(1, 7):
            if step in (2, 4):
                checkpoints.retain(step)
            checkpoints.save(step, LORA, {"mu": jnp.full(3, float(step))}, {"step": step})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.retain(4)
        checkpoints.save(7, LORA, {"mu": jnp.zeros(3)}, {"step": 7})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "7"]


def test_old_ones_are_removed_when_the_new_one_is_flushed(tmp_path, monkeypatch):
    found, synced = [], []
    flush = checkpoint.sync_tree
    monkeypatch.setattr("qlora_jax.atomic_files.os.fsync", lambda number: synced.append(os.fstat(number).st_ino))

    def recorded(folder):
        found.append(saved_steps(tmp_path))
        flush(folder)
        assert {path.stat().st_ino for path in folder.rglob("*")} <= {*synced}

    monkeypatch.setattr(checkpoint, "sync_tree", recorded)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, LORA, {"mu": jnp.zeros(3)}, {"step": step})
    assert found == [[1], [1, 2], [2, 3]] and saved_steps(tmp_path) == [3]


def test_an_old_one_is_removed_as_a_whole(tmp_path, monkeypatch):
    """Its files are deleted one by one, but a process that reads the run never sees a part of them."""
    removed = tmp_path / CHECKPOINT_FOLDER / checkpoint.REMOVED
    found = []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda folder, **_: found.append((folder, saved_steps(tmp_path))))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, LORA, {"mu": jnp.zeros(3)}, {"step": step})
        assert found == [(removed, [2])] and (removed / "1" / "state" / "metadata").is_file()
        monkeypatch.undo()
        checkpoints.save(3, LORA, {"mu": jnp.zeros(3)}, {"step": 3})
    assert saved_steps(tmp_path) == [3] and not removed.exists()


def test_a_checkpoint_that_the_disk_does_not_take_is_an_error(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, LORA, {"mu": jnp.zeros(3)}, {"step": 1})

        def fails(number):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr("qlora_jax.atomic_files.os.fsync", fails)
        with pytest.raises(CheckpointError, match=r"step 2 cannot be saved: .*Input/output error.*; .*step 1 is compl"):
            checkpoints.save(2, LORA, {"mu": jnp.zeros(3)}, {"step": 2})
    assert 1 in saved_steps(tmp_path)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, LORA, {"mu": jnp.zeros(3)}, {"step": 1})
        with full_disk(), pytest.raises(CheckpointError, match=r"step 2 cannot be saved.*step 1 is complete.*--resume"):
            checkpoints.save(2, LORA, {"mu": jnp.zeros(3)}, {"step": 2})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert checkpoints.restore(LORA, {"mu": jnp.zeros(3)})[2] == {"step": 1}
        checkpoints.save(2, LORA, {"mu": jnp.zeros(3)}, {"step": 2})
        assert checkpoints.latest_step() == 2


@pytest.mark.parametrize("free", [20_000, 60_000, 100_000])
def test_a_full_disk_is_one_error_with_the_bytes_of_the_checkpoint(small_disk, caplog, free):
    """orbax' threads log tracebacks, and tensorstore's error is a page of JSON."""
    rng = np.random.default_rng(0)
    lora = {name: jnp.asarray(rng.normal(size=8000), jnp.float32) for name in "ab"}
    with Checkpoints(small_disk / "run", keep=2) as checkpoints:
        (small_disk / "rest").write_bytes(bytes(SMALL_DISK_BYTES - free))
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(1, lora, {"mu": jnp.zeros(500)}, {"step": 1})
    problem = "step 1 cannot be saved: No space left on device (66,000 bytes were to be written); no earlier"
    assert problem in str(caught.value)
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def test_without_an_earlier_checkpoint_the_error_does_not_say_resume(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints, full_disk(), pytest.raises(CheckpointError) as caught:
        checkpoints.save(1, LORA, {"mu": jnp.zeros(3)}, {"step": 1})
    assert "no earlier checkpoint exists" in str(caught.value) and "--resume" not in str(caught.value)


def save_steps(run, *steps):
    with Checkpoints(run, keep=3) as checkpoints:
        for step in steps:
            checkpoints.save(step, LORA, {"mu": jnp.full(3, float(step))}, {"step": step})


def damage(run, step, part="optimizer"):
    """Overwrites the data of a part with zeros, as a bad disk does."""
    for file in (run / f"checkpoints/{step}/{part}").rglob("d/*"):
        file.write_bytes(bytes(file.stat().st_size))


def restore(run, check=lambda state: None):
    with Checkpoints(run, keep=2) as checkpoints:
        return checkpoints.restore(LORA, {"mu": jnp.zeros(3)}, check)


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning_and_its_step_can_be_saved_again(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path, 3)
    with pytest.warns(
        UserWarning, match=r"(?s)3/optimizer: the checkpoint of step 3 is damaged: .*3\.damaged.* step 2"
    ):
        restored = restore(tmp_path)
    np.testing.assert_array_equal(restored.optimizer_state["mu"], [2, 2, 2])
    assert restored.state == {"step": 2}
    assert saved_steps(tmp_path) == [1, 2] and (tmp_path / "checkpoints/3.damaged").is_dir()
    save_steps(tmp_path, 3)
    assert restore(tmp_path).state == {"step": 3}


def test_a_second_damaged_checkpoint_of_a_step_gets_another_name(tmp_path):
    save_steps(tmp_path, 1, 2)
    for name in ("2.damaged", "2.damaged-2"):
        damage(tmp_path, 2)
        with pytest.warns(UserWarning, match=rf"renamed to {name}\."):
            restore(tmp_path)
        assert (tmp_path / "checkpoints" / name).is_dir()
        save_steps(tmp_path, 2)


def test_a_save_after_a_damaged_newest_checkpoint_is_not_skipped(tmp_path):
    """orbax skips a step that is not above its newest, so the damaged one must be gone for it too."""
    save_steps(tmp_path, 1, 5)
    damage(tmp_path, 5)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with pytest.warns(UserWarning, match="step 5 is damaged"):
            checkpoints.restore(LORA, {"mu": jnp.zeros(3)})
        checkpoints.save(2, LORA, {"mu": jnp.zeros(3)}, {"step": 2})
    assert saved_steps(tmp_path) == [1, 2]


def test_a_save_that_orbax_skips_is_an_error(tmp_path):
    save_steps(tmp_path, 5)
    with Checkpoints(tmp_path, keep=2) as checkpoints, pytest.raises(CheckpointError, match="step 3 cannot be saved"):
        checkpoints.save(3, LORA, {"mu": jnp.zeros(3)}, {"step": 3})


def test_two_damaged_checkpoints_are_never_passed_over(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path, 3)
    damage(tmp_path, 2, "lora")
    with pytest.raises(
        CheckpointError, match=r"(?s)newest 2 .*3/optimizer.*2/lora.*newest sound one is of step 1\. To"
    ):
        restore(tmp_path)
    assert saved_steps(tmp_path) == [1, 2, 3]


def test_no_sound_checkpoint_is_one_error(tmp_path):
    save_steps(tmp_path, 1)
    damage(tmp_path, 1)
    with pytest.raises(
        CheckpointError, match=r"(?s)does not have .*1/optimizer: the checkpoint of step 1 is damaged.*backup"
    ):
        restore(tmp_path)


def test_a_run_that_cannot_resume_from_the_newest_does_not_use_an_older_one(tmp_path):
    save_steps(tmp_path, 1, 2)

    def check(state):
        raise ValueError(f"other settings than at step {state['step']}")

    with pytest.raises(ValueError, match="other settings than at step 2"):
        restore(tmp_path, check)


def test_a_checkpoint_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2)
    monkeypatch.setattr("os.access", lambda path, mode: "/2/optimizer/" not in str(path))
    with pytest.raises(CheckpointError, match="no permission to read a file of the checkpoint of step 2"):
        restore(tmp_path)
    assert saved_steps(tmp_path) == [1, 2]


def test_names_that_are_not_steps_are_not_checkpoints(tmp_path):
    for name in ("7", "07", "8.damaged", "9.orbax-checkpoint-tmp", "²"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert saved_steps(tmp_path) == [7]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not a run folder \(config\.yaml is missing\)"):
        open_run(tmp_path)
