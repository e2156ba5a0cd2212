"""A few cases of each campaign; before a release, many more run (docs/reliability.md)."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.campaign.disk import can_mount
from tests.marks import some_in_ci


def _passes(tmp_path: Path, name: str, *words: str) -> str:
    command = [sys.executable, "-m", f"scripts.campaign.{name}", "--output", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("cases", some_in_ci([(1,), (100,)], lambda index: index == 0))
def test_damaged_files_of_every_kind(tmp_path: Path, cases: int):
    pytest.importorskip("pyarrow", reason="two kinds of files are Parquet")
    assert ", 0 failures" in _passes(tmp_path, "fuzz", "--cases", str(cases))


@pytest.mark.parametrize(
    ("kind", "cases"),
    some_in_ci(
        [("paged_adamw_8bit", 1), ("grpo", 1), ("sampled", 5), ("loftq", 5), ("grpo", 40)], lambda index: index == 0
    ),
)
def test_killed_runs(tmp_path: Path, kind: str, cases: int):
    assert f"{cases} cases, 0 failures" in _passes(tmp_path, "kills", "--cases", str(cases), "--kinds", kind)


@pytest.mark.parametrize(
    "kind", some_in_ci([("full_resume",), ("full_export_gguf_lora",), ("damaged_resume",)], lambda index: index == 0)
)
def test_disks(tmp_path: Path, kind: str):
    if not can_mount():
        pytest.skip("mounting a small disk requires root")
    assert "1 cases, 0 failures" in _passes(tmp_path, "storage", "--cases", "1", "--kinds", kind)
