"""Seals a process on Linux: no network, no other processes, no written file, and few folders to read.

Two features of the kernel do this, and neither needs privileges. Landlock (Linux 5.13) limits which files can be
opened. A seccomp filter refuses every system call that is not in syscalls.py. Both hold until the process ends.
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

from qlora_jax.sandbox.syscalls import ALLOWED, ARCHITECTURES, CLONE, CLONE3, TGKILL

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
    _install_filter(libc, _filter(os.getpid(), platform.machine()))


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


def _install_filter(libc: ctypes.CDLL, program: bytes) -> None:
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))  # struct sock_fprog
    _call(libc, "a seccomp filter", libc.prctl, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0)
