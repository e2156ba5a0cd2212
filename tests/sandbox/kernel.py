"""Skips tests where the kernel itself says that it cannot seal a process; a broken seal must not skip them."""

import ctypes
import platform
import sys

import pytest


def landlock_version() -> int:
    """Landlock's version in this kernel; 0 or less if it has none."""
    if sys.platform != "linux":
        return 0
    return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)


needs_seal = pytest.mark.skipif(
    landlock_version() < 1 or platform.machine() not in ("x86_64", "aarch64"),
    reason="this kernel has no Landlock, or this processor is unknown to the sandbox",
)
