"""A command restarts once with glibc's tunables, with the same process id and arguments."""

import os
import subprocess
import sys

import pytest

from qlora_jax import allocator

CODE = """
import os, sys
before = os.getpid()
from qlora_jax import allocator
print("start", before, flush=True)
allocator.tune()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:])
"""


def run(**environment):
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", CODE, "a b", "--c"]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(not allocator._has_glibc(), reason="the C library is not glibc")
def test_a_command_starts_again_with_its_arguments():
    first, second, last = run()
    assert first == second and first.startswith("start ")
    assert last == f"{allocator.TUNABLES} ['a b', '--c']"


def test_tunables_that_are_set_are_left_alone():
    lines = run(GLIBC_TUNABLES="glibc.malloc.check=0")
    assert len(lines) == 2 and lines[1].startswith("glibc.malloc.check=0")
