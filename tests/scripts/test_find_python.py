"""scripts/find_python.sh: names on PATH that fail when called are skipped."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts/find_python.sh"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def find(path: list[Path], *arguments: str) -> subprocess.CompletedProcess:
    folders = ":".join([*map(str, path), "/usr/bin", "/bin"])
    environment = {"PATH": folders, "PYENV_ROOT": "/nowhere"}
    return subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def command(folder: Path, name: str, line: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{line}\n")
    (folder / name).chmod(0o755)
    return folder


def test_a_shim_that_fails_is_passed_over(tmp_path):
    name = f"python{VERSION}"
    shim = command(tmp_path / "shims", name, "echo 'no version is set' >&2; exit 127")
    real = command(tmp_path / "real", name, f'exec {sys.executable} "$@"')
    done = find([shim, real], VERSION, VERSION, "json")
    assert done.returncode == 0
    assert os.path.samefile(done.stdout.strip(), sys.executable)


def test_version_and_modules_are_asked_for(tmp_path):
    real = command(tmp_path / "real", f"python{VERSION}", f'exec {sys.executable} "$@"')
    assert find([real], "3.98", "3.99").returncode == 1
    assert find([real], VERSION, VERSION, "no_such_module").returncode == 1
