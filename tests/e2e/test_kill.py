"""SIGKILL at random moments, while it saves or pages move, then --resume: to the bit as an uninterrupted run."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.config import write_config
from tests.e2e.project import project
from tests.e2e.tiny_runs import arrays_at, numbers

PAGED = dict(paging="on", paging_budget="70KiB")  # the state has 128 KiB in four pages, so two of them move per step


def _start(config_file: Path, cache: Path, *switches: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "qlora_jax.train", "--config", str(config_file), *switches]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "QLORA_JAX_CACHE": str(cache)}
    with (cache.parent / "output.txt").open("w") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def _saved(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any(entry.name.isdigit() for entry in folder.iterdir())


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
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
def test_a_signal_saves_and_ends_the_run_with_its_status(tmp_path, number):
    config = project(tmp_path, train=dict(steps=400, save_every=0, eval_every=0), data=dict(eval_fraction=0.0))
    write_config(config, tmp_path / "run.yaml")
    process = _start(tmp_path / "run.yaml", tmp_path / "cache")
    metrics = Path(config.output) / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    process.send_signal(number)
    status, output = process.wait(timeout=60), (tmp_path / "output.txt").read_text()
    assert status == 128 + number, output
    assert f"{number.name}: saving after this step" in output and "--resume" in output and "Traceback" not in output
    assert _saved(Path(config.output))
