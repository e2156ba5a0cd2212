"""A staged folder appears completely or not at all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_jax.io.atomic import staged_folder
from tests.conftest import ROOT


@pytest.mark.parametrize("there", [False, True])
def test_appears_at_the_end(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "deep" / "out"
    if there:
        target.mkdir(parents=True)
    with staged_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not (target / "file").exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "file").read_text() == "x"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out", "out/inside"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match="out: exists and is not empty"), staged_folder(tmp_path / "out"):
        raise AssertionError("entered")
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.slow
def test_a_command_that_is_interrupted_leaves_nothing(tmp_path: Path, smollm2_gguf: Path) -> None:
    target = tmp_path / "made" / "out"
    command = [sys.executable, "-m", "qlora_jax.quantize", "--model", str(smollm2_gguf), "--output", str(target)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if any(target.parent.glob(".out.partial-*/*.safetensors")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "Traceback" not in process.communicate()[1]
    assert not list(target.parent.iterdir())
