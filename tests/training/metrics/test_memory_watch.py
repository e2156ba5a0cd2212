"""Memory in use and its peak, on systems and devices that report them and on those that do not."""

from types import SimpleNamespace

import jax
import pytest

from qlora_jax.training.metrics.memory_watch import memory_in_use, watch_peak


def test_the_peak_is_what_came_after_the_watch_began():
    peak = watch_peak(jax.local_devices(backend="cpu")[:1])
    before = peak()
    if before is None:
        pytest.skip("this system cannot reset the peak of a process")
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert 60 << 20 < peak() - before < 80 << 20


def test_what_is_held_now():
    cpu = jax.local_devices(backend="cpu")[:1]
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
    monkeypatch.setattr("qlora_jax.training.metrics.memory_watch._PROCESS", tmp_path)  # a system without /proc
    assert memory_in_use(devices(statistics)) == reported


def devices(*statistics):
    return [SimpleNamespace(platform="gpu", memory_stats=lambda each=each: each) for each in statistics]


def test_of_several_devices_the_fullest_counts(monkeypatch, tmp_path):
    monkeypatch.setattr("qlora_jax.training.metrics.memory_watch._PROCESS", tmp_path)
    one = {"bytes_in_use": 5, "peak_bytes_in_use": 9}
    assert memory_in_use(devices(one, one | {"bytes_in_use": 7})) == {"device_bytes": 7, "device_peak_bytes": 9}
    assert memory_in_use(devices(one, None)) == {}
    assert watch_peak(devices(one, one | {"peak_bytes_in_use": 11}))() == 11
    assert watch_peak(devices(one, {}))() is None


def test_virtual_devices_share_the_growth_of_their_process(monkeypatch):
    monkeypatch.setattr("qlora_jax.training.metrics.memory_watch._watch_process", lambda: lambda: 800)
    cpu = SimpleNamespace(platform="cpu", memory_stats=lambda: None)
    assert watch_peak([cpu] * 8)() == 100
    monkeypatch.setattr("qlora_jax.training.metrics.memory_watch._watch_process", lambda: lambda: None)
    assert watch_peak([cpu])() is None
