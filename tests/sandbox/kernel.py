"""Skips tests where the kernel cannot seal a process, as the kernel itself says, so that a broken seal is not skipped."""

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
