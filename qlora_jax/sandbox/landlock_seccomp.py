"""Seals a process on Linux: no network, no other processes, no written file, and few folders to read.

Two features of the kernel do this, and neither needs privileges. Landlock (Linux 5.13) limits which files can be
opened. A seccomp filter refuses every system call that is not in ALLOWED. Both hold until the process ends.
"""

import contextlib
import ctypes
import errno
import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

# The system calls that a sealed process may use, with their numbers on x86-64 and on 64-bit Arm.
#
# Calls that are absent are refused: those that make sockets, processes or namespaces, run other programs, send signals,
# change files' attributes, or reach other processes. Landlock decides which files `open` may open.


class Architecture(NamedTuple):
    """The names that Linux gives a processor.

    Fields:
      audit: its AUDIT_ARCH_* number.
      column: its column in ALLOWED.
    """

    audit: int
    column: int


# By the name of platform.machine().
ARCHITECTURES = {
    "x86_64": Architecture(audit=0xC000003E, column=0),
    "aarch64": Architecture(audit=0xC00000B7, column=1),
}

# Allowed with conditions: threads but not processes, and signals to the process itself.
CLONE, CLONE3, TGKILL = (56, 220), (435, 435), (234, 131)

# name -> (number on x86-64, number on Arm); None: the architecture does not have the call.
ALLOWED: dict[str, tuple[int, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "stat": (4, None),
    "lstat": (6, None),
    "statx": (332, 291),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "open": (2, None),
    "openat": (257, 56),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "fadvise64": (221, 223),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "mincore": (27, 232),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "pause": (34, None),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getitimer": (36, 102),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "arch_prctl": (158, None),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "getpgid": (121, 155),
    "getpgrp": (111, None),
    "getsid": (124, 156),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "getrusage": (98, 165),
    "getrandom": (318, 278),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getcpu": (309, 168),
}


# prctl
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 38, 22, 2
_SIGKILL = 9

# Landlock: numbers of its system calls, and the rights to files of each version.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 5: 16}  # version -> number of rights; each is a bit
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3

# Classic BPF.
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # offsets in struct seccomp_data, little-endian
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_CLONE_THREAD = 0x00010000


def seal(folders: Sequence[str]) -> None:
    """Seals this process, which must have one thread; only files below `folders` can be read.

    Raises:
      OSError: the kernel cannot do it; the message says what is missing.
    """
    if problem := platform_problem():
        raise OSError(problem)
    libc = _libc()
    _call(libc, "no_new_privs", libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _restrict_files(libc, folders)
    program = _filter(os.getpid(), platform.machine())
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))  # struct sock_fprog
    _call(libc, "a seccomp filter", libc.prctl, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0)


def seal_if_possible(*modules: ModuleType) -> None:
    """Seals this process where the system can; it can then read only Python's libraries and these packages."""
    packages = [folder for module in modules for folder in module.__path__]
    with contextlib.suppress(OSError):
        seal([*library_folders(), *packages])


def platform_problem() -> str | None:
    """Returns why this system cannot seal a process; None if only a trial can show it."""
    if sys.platform != "linux":
        return f"Linux is required (found {sys.platform})"
    if platform.machine() not in ARCHITECTURES or sys.byteorder != "little":
        return f"a processor of {', '.join(ARCHITECTURES)} is required (found {platform.machine()})"
    return None


def end_with_parent() -> None:
    """Makes the kernel kill this process when the one that started it ends; does nothing on other systems."""
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def library_folders() -> list[str]:
    """Returns the folders of Python's standard library and of the system's shared libraries."""
    standard = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.join(sys.base_prefix, "lib")]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    return [folder for folder in dict.fromkeys([*standard, *system]) if os.path.isdir(folder)]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(libc: ctypes.CDLL, name: str, function: Callable[..., int], *arguments: object) -> int:
    """Calls a C function whose negative results are errors; returns the result."""
    result = function(*(ctypes.c_long(value) if isinstance(value, int) else value for value in arguments))
    if result < 0:
        raise OSError(f"the kernel refuses {name} ({os.strerror(ctypes.get_errno())})")
    return result


def _restrict_files(libc: ctypes.CDLL, folders: Sequence[str]) -> None:
    """Applies a Landlock ruleset that handles every right to files, and grants those of reading below `folders`."""
    version = _call(libc, "Landlock", libc.syscall, _CREATE_RULESET, None, 0, _VERSION_FLAG)
    rights = max(count for first, count in _RIGHTS_BY_VERSION.items() if first <= version)
    attributes = struct.pack("<Q", (1 << rights) - 1)
    ruleset = _call(libc, "a Landlock ruleset", libc.syscall, _CREATE_RULESET, attributes, len(attributes), 0)
    for folder in folders:
        descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("<Qi", _READ_FILE | _READ_FOLDER, descriptor)
        _call(libc, "a Landlock rule", libc.syscall, _ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
        os.close(descriptor)
    _call(libc, "Landlock", libc.syscall, _RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _filter(process: int, machine: str) -> bytes:
    """Returns the filter of a process as a BPF program; a call is allowed by the first rule that matches."""
    architecture = ARCHITECTURES[machine]
    refuse = _ERROR | errno.EPERM
    numbers = [numbers[architecture.column] for numbers in ALLOWED.values()]
    clone, clone3, tgkill = (numbers[architecture.column] for numbers in (CLONE, CLONE3, TGKILL))
    program = [
        _instruction(_LOAD, _ARCHITECTURE_AT),
        _instruction(_EQUAL, architecture.audit, if_true=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER_AT),
        *_rule(clone3, _ERROR | errno.ENOSYS),  # its flags are in memory, out of reach; libc then uses clone
        *(part for number in numbers if number is not None for part in _rule(number, _ALLOW)),
        *_rule_on_argument(clone, _ANY_BIT, _CLONE_THREAD),
        *_rule_on_argument(tgkill, _EQUAL, process),
        _instruction(_RETURN, refuse),
    ]
    return b"".join(program)


def _rule(number: int, action: int) -> Iterator[bytes]:
    yield _instruction(_EQUAL, number, if_false=1)
    yield _instruction(_RETURN, action)


def _rule_on_argument(number: int, comparison: int, value: int) -> Iterator[bytes]:
    """Allows the call if its first argument compares to the value, and refuses it otherwise."""
    yield _instruction(_EQUAL, number, if_false=4)
    yield _instruction(_LOAD, _FIRST_ARGUMENT_AT)
    yield _instruction(comparison, value, if_false=1)
    yield _instruction(_RETURN, _ALLOW)
    yield _instruction(_RETURN, _ERROR | errno.EPERM)
