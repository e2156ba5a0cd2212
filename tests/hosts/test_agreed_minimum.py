"""The least of all processes' numbers; tests/hosts/test_processes.py has it of two processes."""

import jax

from qlora_jax.hosts.group import AgreedMinimum
from qlora_jax.hosts.watchdog import StopSignal


def test_one_process_agrees_with_itself():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    assert AgreedMinimum(mesh, 3)(5, -7, 2**31 - 1) == (5, -7, 2**31 - 1)
    asked = [0]
    stop = StopSignal(lambda: asked[-1], mesh)
    assert stop() == 0
    asked.append(15)
    assert stop() == 15
