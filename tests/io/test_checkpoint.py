"""Checkpoints: retention, a full disk, and errors for missing or damaged ones."""

import resource
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.io.checkpoint import CheckpointError, Checkpoints, open_run

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
            checkpoints.save(step, LORA, {"mu": jnp.full(3, step)}, {"step": step})
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
            checkpoints.save(step, LORA, {"mu": jnp.full(3, step)}, {"step": step})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.retain(4)
        checkpoints.save(7, LORA, {"mu": jnp.zeros(3)}, {"step": 7})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "7"]


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, LORA, {"mu": jnp.zeros(3)}, {"step": 1})
        with full_disk(), pytest.raises(CheckpointError, match=r"step 2 cannot be saved.*step 1 is complete and loads"):
            checkpoints.save(2, LORA, {"mu": jnp.zeros(3)}, {"step": 2})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert checkpoints.restore(LORA, {"mu": jnp.zeros(3)})[2] == {"step": 1}
        checkpoints.save(2, LORA, {"mu": jnp.zeros(3)}, {"step": 2})
        assert checkpoints.latest_step() == 2


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, LORA, {"mu": jnp.zeros(3)}, {"step": 1})
    for file in (tmp_path / "checkpoints/1/lora").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    unreadable = pytest.raises(CheckpointError, match=r"step 1 cannot be read")
    with Checkpoints(tmp_path, keep=2) as checkpoints, unreadable:
        checkpoints.restore(LORA, {"mu": jnp.zeros(3)})


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not a run folder \(config\.yaml is missing\)"):
        open_run(tmp_path)
