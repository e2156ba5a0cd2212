"""scripts/setup.sh: machines for which JAX has no wheel are refused before anything is installed."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/setup.sh"


@pytest.mark.parametrize(
    ("machine", "library", "bits"),
    [
        ("Linux armv7l", "glibc 2.36", "32"),
        ("Linux x86_64", "glibc 2.36", "32"),
        ("Linux x86_64", "glibc 2.26", "64"),
        ("Linux x86_64", "glibc 2.9", "64"),
        ("Linux aarch64", "", "64"),  # musl
        ("Darwin x86_64", "", "64"),
    ],
)
def test_a_machine_without_a_wheel_of_jax_is_refused_in_one_line(machine, library, bits, tmp_path):
    words = f'[ "$1" = LONG_BIT ] && echo {bits} || {f"echo {library}" if library else "exit 1"}'
    for name, line in {"uname": f"echo {machine}", "getconf": words}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1
    assert f"({machine}, {library or 'no glibc'}, {bits} bits)" in done.stderr
