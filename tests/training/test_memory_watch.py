"""Memory in use and its peak, on systems and devices that report them and on those that do not."""

from types import SimpleNamespace

import jax
import pytest

from qlora_jax.optim.page_pool import Memory
from qlora_jax.training.memory_watch import memory_in_use, watch_peak


def test_the_peak_is_what_came_after_the_watch_began():
    peak = watch_peak(Memory.of(jax.local_devices(backend="cpu")[0]))
    before = peak()
    if before is None:
        pytest.skip("this system cannot reset the peak of a process")
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert 60 << 20 < peak() - before < 80 << 20


def test_what_is_held_now():
    cpu = jax.local_devices(backend="cpu")[0]
    before = memory_in_use(cpu)
    if not before:
        pytest.skip("this system does not report the memory of a process")
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert 60 << 20 < memory_in_use(cpu)["host_bytes"] - before["host_bytes"] < 80 << 20


@pytest.mark.parametrize(
    ("statistics", "reported"),
    [
        ({"bytes_in_use": 5, "peak_bytes_in_use": 7, "bytes_limit": 9}, {"device_bytes": 5, "device_peak_bytes": 7}),
        ({"bytes_in_use": 5}, {"device_bytes": 5}),
        (None, {}),
    ],
)
def test_what_a_device_does_not_tell_is_left_out(statistics, reported, monkeypatch, tmp_path):
    monkeypatch.setattr("qlora_jax.training.memory_watch._PROCESS", tmp_path)  # a system without /proc
    assert memory_in_use(SimpleNamespace(memory_stats=lambda: statistics)) == reported
