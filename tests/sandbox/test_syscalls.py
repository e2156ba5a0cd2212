"""The numbers of system calls are those of the kernel's headers."""

import re
from pathlib import Path

import pytest

from qlora_jax.sandbox.landlock_seccomp import ALLOWED, CLONE, CLONE3, TGKILL

NUMBERS = {**ALLOWED, "clone": CLONE, "clone3": CLONE3, "tgkill": TGKILL}
X86 = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
ARM = Path("/usr/include/asm-generic/unistd.h")
# Calls that would let a program out, or that change what rlimits and Landlock do not cover.
FORBIDDEN = """
    socket socketpair connect bind sendmsg fork vfork execve execveat kill tkill rt_sigqueueinfo ptrace process_vm_readv
    process_vm_writev pidfd_open pidfd_getfd io_uring_setup unshare setns mount chroot chmod fchmod fchmodat chown
    fchownat utimensat setxattr truncate setrlimit prlimit64 setsid setpgid setuid memfd_create shmget bpf
    perf_event_open userfaultfd keyctl ioctl fcntl prctl seccomp
"""


def numbers_in(path: Path) -> dict[str, int]:
    if not path.exists():
        pytest.skip(f"{path} does not exist (package linux-libc-dev)")
    text = path.read_text()
    found = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    return found | {
        name: found[other] for name, other in re.findall(r"#define __NR_(\w+)\s+__NR3264_(\w+)", text) if other in found
    }


@pytest.mark.parametrize(("path", "column"), [(X86, 0), (ARM, 1)])
def test_numbers(path, column):
    header = numbers_in(path)
    assert {name: numbers[column] for name, numbers in NUMBERS.items()} == {name: header.get(name) for name in NUMBERS}


def test_no_call_that_leads_out_is_allowed():
    assert not {*FORBIDDEN.split()} & {*NUMBERS}
