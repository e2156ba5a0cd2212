"""The two processes that test a program: one runs the program, the other runs its tests and calls it by messages.

The program never shares a process with its tests. It cannot change them, and only plain values come back
(json_values.py).
"""

import builtins
import json
from typing import Any

from qlora_jax.sandbox import json_values
from qlora_jax.sandbox.programs import Program, ProgramOutcome, receive, send

_LONGEST_DETAIL = 200  # characters


class _EndedError(Exception):
    """The program's process ended."""


def run_program(requests: int, replies: int) -> None:
    """Runs a program that arrives as a message, then answers calls until this process is killed.

    Args:
      requests, replies: descriptors of two pipes.
    """
    source, entry_point = json.loads(receive(requests))
    namespace: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(source, "program", "exec"), namespace)
        function = namespace[entry_point]
        reply = _returned(None)
    except BaseException as error:
        function, reply = None, _raised(error)
    send(replies, reply)
    while function is not None:
        arguments, keywords = json_values.decode(receive(requests))  # pyright: ignore[reportGeneralTypeIssues]
        try:
            reply = _returned(function(*arguments, **keywords))
        except BaseException as error:
            reply = _raised(error)
        send(replies, reply)


def run_tests(program: Program, requests: int, replies: int) -> ProgramOutcome:
    """Runs the tests of a program in another process.

    Args:
      requests, replies: descriptors of two pipes to `run_program`.
    """

    def candidate(*arguments: object, **keywords: object) -> object:
        return _call(requests, replies, json_values.encode((arguments, keywords)))

    try:
        _call(requests, replies, json.dumps([program.source, program.entry_point]).encode())
        namespace: dict[str, Any] = {"__name__": "tests"}
        exec(compile(program.setup, "setup", "exec"), namespace)
        namespace[program.entry_point] = candidate
        exec(compile(program.test, "tests", "exec"), namespace)
        namespace["check"](candidate)
    except AssertionError as error:
        return ProgramOutcome("wrong", _shown(error))
    except _EndedError:
        return ProgramOutcome("ended", "the process ended before its tests")
    except MemoryError as error:
        return ProgramOutcome("memory", _shown(error))
    except BaseException as error:
        return ProgramOutcome("error", _shown(error))
    return ProgramOutcome("passed")


def _call(requests: int, replies: int, request: bytes) -> object:
    """Sends a request and returns the value of its reply.

    Raises:
      Exception: the built-in exception of the name of the one that the program raised, or RuntimeError.
    """
    try:
        send(requests, request)
        raised, content = json_values.decode(receive(replies))  # pyright: ignore[reportGeneralTypeIssues]
    except (EOFError, BrokenPipeError):
        raise _EndedError from None
    if raised is None:
        return content
    raise _exception(str(raised), str(content))


def _exception(name: str, message: str) -> Exception:
    """Returns the built-in exception of this name, or a RuntimeError that says it."""
    found = getattr(builtins, name, None)
    # A failed assertion of the program is not one of its tests.
    if isinstance(found, type) and issubclass(found, Exception) and found is not AssertionError:
        return found(message)
    return RuntimeError(f"{name}: {message}")


def _returned(value: object) -> bytes:
    return json_values.encode((None, value))


def _raised(error: BaseException) -> bytes:
    return json_values.encode((type(error).__name__, _message(error)))


def _message(error: BaseException) -> str:
    try:
        return str(error)[:_LONGEST_DETAIL]
    except BaseException:  # a stranger's exception
        return ""


def _shown(error: BaseException) -> str:
    """Returns the type and message of an error on one line."""
    return " ".join(f"{type(error).__name__}: {_message(error)}".split())[:_LONGEST_DETAIL].removesuffix(":")
