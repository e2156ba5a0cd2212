"""Calls a function when JAX's client has lost another process, instead of a stack trace and an abort.

`jax.distributed.initialize` has no argument for the callback that its client takes. And the client of jaxlib 0.11.2 and
0.12.0.1 cannot convert the callback's argument to Python, which ends in std::terminate. So the function is also what
std::terminate calls, while the client calls back.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]  # a library without declarations

_SET_TERMINATE = "_ZSt13set_terminatePFvvE"  # std::set_terminate
_Handler = ctypes.CFUNCTYPE(None)
_handlers: list[object] = []  # C++ keeps only their addresses


@contextlib.contextmanager
def calls_when_lost(lost: Callable[[], None]) -> Iterator[None]:
    """Lets the client that JAX makes within the context call `lost`, which ends the process.

    Where the C++ library is another one, JAX's own message and SIGABRT stay.
    """
    if not _set_terminate(lost):
        yield
        return
    make = _jax.get_distributed_runtime_client
    _jax.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=lambda status: lost())
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = make


def _set_terminate(lost: Callable[[], None]) -> bool:
    try:
        set_terminate = getattr(ctypes.CDLL("libstdc++.so.6"), _SET_TERMINATE)
    except (OSError, AttributeError):
        return False
    set_terminate.argtypes = [_Handler]
    handler = _Handler(lost)
    _handlers.append(handler)
    set_terminate(handler)
    return True
