"""SIGKILL at random moments, while it saves or pages move, then --resume: to the bit as an uninterrupted run."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.config import write_config
from tests.e2e.project import project
from tests.e2e.test_training import arrays_at, numbers
from tests.marks import some_in_ci

PAGED = dict(paging="on", paging_budget="70KiB")  # of 128 KiB in four pages: two of them move at each step


def _start(config_file: Path, cache: Path, *switches: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "qlora_jax.train", "--config", str(config_file), *switches]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "QLORA_JAX_CACHE": str(cache)}
    with (cache.parent / "output.txt").open("w") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def _saved(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any(entry.name.isdigit() for entry in folder.iterdir())


def _saving(run: Path) -> bool:
    return any("tmp" in entry.name for entry in (run / "checkpoints").iterdir())


def _kill(process: subprocess.Popen, run: Path, random_: random.Random, in_a_save: bool) -> bool:
    """Kills the process after it has written its first step, at a random moment or within a save.

    Returns False if the process ended by itself.
    """
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while process.poll() is None and (not _saved(run) or metrics.stat().st_mtime_ns == before):
        time.sleep(0.01)
    while in_a_save and process.poll() is None and not _saving(run):
        time.sleep(0.0005)
    time.sleep(random_.uniform(0.0, 0.01 if in_a_save else 0.3))
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


@pytest.mark.parametrize(
    ("optim", "total_kills", "steps"), some_in_ci([({}, 22, 160), (PAGED, 10, 80), (PAGED, 4, 40)], lambda i: i == 2)
)
def test_a_run_killed_again_and_again_equals_an_uninterrupted_one(tmp_path, optim, total_kills, steps):
    settings = dict(steps=steps, micro_batch_size=2, accumulation=1, save_every=1, eval_every=0)
    config = project(tmp_path, layers=4, train=settings, data=dict(eval_fraction=0.0), optim=optim)
    whole = dataclasses.replace(  # never paged
        config,
        output=str(tmp_path / "whole"),
        optim=dataclasses.replace(config.optim, paging="off", paging_budget=None),
    )
    write_config(config, tmp_path / "killed.yaml")
    write_config(whole, tmp_path / "whole.yaml")
    assert _start(tmp_path / "whole.yaml", tmp_path / "cache").wait() == 0, (tmp_path / "output.txt").read_text()
    run, random_, kills, cut_off_saves = Path(config.output), random.Random(0), 0, 0
    while True:
        process = _start(tmp_path / "killed.yaml", tmp_path / "cache", *(["--resume"] if _saved(run) else []))
        if kills < total_kills and _kill(process, run, random_, in_a_save=kills % 2 == 1):
            kills += 1
            cut_off_saves += _saving(run)
            continue
        assert process.wait() == 0, (tmp_path / "output.txt").read_text()
        break
    assert kills >= total_kills - 2, kills
    assert cut_off_saves >= max(total_kills // 7, 1), f"only {cut_off_saves} kills met a save under way"
    assert numbers(config) == numbers(whole)
    for killed, expected in zip(arrays_at(config, steps), arrays_at(whole, steps), strict=True):
        np.testing.assert_array_equal(killed, expected)


KILLS_ITSELF = """
import os, signal, sys
from qlora_jax.optim import page_pool
from qlora_jax.train import main

way, copies = sys.argv[1], int(sys.argv[2])
copy = getattr(page_pool.Memory, way)

def killing(memory, page):
    global copies
    under_way = copy(memory, page)
    copies -= 1
    if copies == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return under_way

setattr(page_pool.Memory, way, killing)
main(sys.argv[3:])
"""


@pytest.mark.slow
def test_a_run_killed_while_a_page_moves_equals_an_uninterrupted_one(tmp_path):
    """In a copy to the device and in one to the host, after some checkpoints; then on to the end."""
    settings = dict(steps=10, micro_batch_size=2, accumulation=1, save_every=2, eval_every=0)
    config = project(tmp_path, layers=4, train=settings, data=dict(eval_fraction=0.0), optim=PAGED)
    whole = dataclasses.replace(
        config,
        output=str(tmp_path / "whole"),
        optim=dataclasses.replace(config.optim, paging="off", paging_budget=None),
    )
    for name, each in (("paged", config), ("whole", whole)):
        write_config(each, tmp_path / f"{name}.yaml")
    assert _start(tmp_path / "whole.yaml", tmp_path / "cache").wait() == 0, (tmp_path / "output.txt").read_text()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "QLORA_JAX_CACHE": str(tmp_path / "cache"),
        "GLIBC_TUNABLES": "",
    }
    run, arguments = Path(config.output), ["--config", str(tmp_path / "paged.yaml")]
    for way, copies in (("to_device", 13), ("to_host", 17)):
        switches = ["--resume"] if _saved(run) else []
        command = [sys.executable, "-c", KILLS_ITSELF, way, str(copies), *arguments, *switches]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        assert _saved(run)
    assert _start(tmp_path / "paged.yaml", tmp_path / "cache", "--resume").wait() == 0
    assert numbers(config) == numbers(whole)
    for killed, expected in zip(arrays_at(config, 10), arrays_at(whole, 10), strict=True):
        np.testing.assert_array_equal(killed, expected)


@pytest.mark.slow
def test_sigterm_saves_and_leaves_and(tmp_path):
    config = project(tmp_path, train=dict(steps=400, save_every=0, eval_every=0), data=dict(eval_fraction=0.0))
    write_config(config, tmp_path / "run.yaml")
    process = _start(tmp_path / "run.yaml", tmp_path / "cache")
    metrics = Path(config.output) / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status, output = process.wait(timeout=60), (tmp_path / "output.txt").read_text()
    assert status == 143, output
    assert "SIGTERM: saving after this step" in output and "--resume" in output
    assert _saved(Path(config.output))
