"""The output folder: another run's or process's is refused, and a run's own is readable at any time."""

import os
import socket
import warnings
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from qlora_jax.io.pretrained import open_finetuned
from qlora_jax.io.run_folder.checkpoint import open_run
from qlora_jax.training.run import dry_run, lock_output
from tests.e2e.project import project
from tests.e2e.tiny_runs import quiet, run


def test_a_checkpoint_is_read_by_orbax_alone_without_warnings(finished):
    folder = Path(finished.output).absolute() / "checkpoints" / "10"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora = ocp.StandardCheckpointer().restore(folder / "lora")
    assert lora["model.layers.self_attn.q_proj"]["lora_a"].shape == (2, 64, 4)
    assert open_run(Path(finished.output)).step == 10


def test_an_output_folder_in_use_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"contains a run.*--resume"):
        take(Path(finished.output), resume=False)
    with pytest.raises(ValueError, match="has no checkpoint to resume"):
        take(tmp_path, resume=True)
    (tmp_path / "run.lock").write_text("process 1 on laptop, which was killed before its first checkpoint")
    take(tmp_path, resume=False)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not a run folder"):
        take(tmp_path, resume=False)
    with pytest.raises(ValueError, match=r"thesis\.tex is a file"):
        take(tmp_path / "thesis.tex" / "run", resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_is_read_while_it_trains(finished):
    with lock_output(Path(finished.output), resume=True, warn=pytest.fail):
        assert open_run(Path(finished.output)).step == 10
        assert open_finetuned(finished.output).run is not None


def take(folder, resume):
    """Locks an output folder and releases it again."""
    with lock_output(folder, resume=resume, warn=pytest.fail):
        pass


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
    """A run, a resumed run, a dry run; the second process has not touched anything."""
    config = project(tmp_path)
    folder = Path(config.output)
    with lock_output(folder, resume=False, warn=pytest.fail):
        (folder / "metrics.jsonl").write_text("")
        (folder / "config.yaml").write_text("")
        expected = rf"another process writes in this folder \(process {os.getpid()} on {socket.gethostname()}, since 20"
        for start in (
            lambda: run(config),
            lambda: run(config, resume=True),
            lambda: dry_run(config, folder, resume=False, oversized=False, console=quiet()),
        ):
            with pytest.raises(ValueError, match=expected):
                start()
        assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "metrics.jsonl", "run.lock"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_a_checkpoint_is_told_so_with_and_without_resume(tmp_path, resume):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"before its first checkpoint.*Delete the folder.*without --resume"):
        take(tmp_path, resume=resume)
