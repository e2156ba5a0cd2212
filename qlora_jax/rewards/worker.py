"""Runs reward functions in a separate process; worker_process.py starts it and describes its messages.

It imports nothing that takes long, so it starts in a fraction of a second. Functions print to the standard error.
"""

import asyncio
import functools
import importlib.util
import inspect
import json
import os
import pickle
import random
import resource
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import NamedTuple, cast

from qlora_jax.sandbox.landlock_seccomp import end_with_parent
from qlora_jax.sandbox.limits import limit_resources
from qlora_jax.sandbox.programs import receive, send

MEMORY_REACHED = 113  # exit status
LONGEST_MESSAGE = 1 << 40  # bytes
_LONGEST_ERROR = 2000  # characters


class _Function(NamedTuple):
    """A loaded function, the file or module that it is from, and the settings that every call gets."""

    call: Callable[..., object]
    source: str
    settings: Mapping[str, object]


class _Functions:
    """The functions of this process by their number."""

    def __init__(self):
        self._functions: dict[int, _Function] = {}
        self._modules: dict[str, types.ModuleType] = {}
        self._loop: asyncio.AbstractEventLoop | None = None  # one for all calls: clients stay bound to their loop

    def load(self, number: int, place: str, settings: Mapping[str, object]) -> dict[str, object]:
        """Imports "file.py:name" or "module:name"; returns its line and required arguments, or a problem."""
        source, _, name = place.rpartition(":")
        is_file = source.endswith(".py")
        try:
            if source not in self._modules:
                self._modules[source] = _import_file(source) if is_file else importlib.import_module(source)
        except BaseException as error:  # SystemExit, too
            fix = "Correct the file" if is_file else "Install its extra (docs/rl.md)"
            return {"problem": f"{_place(source, error)}: cannot be imported (found {_described(error)}). {fix}"}
        found = getattr(self._modules[source], name, None)
        if not callable(found) or isinstance(found, type):
            what = "no such name" if found is None else type(found).__name__
            return {"problem": f"{source}: {name} is not a function (found {what}). Name a function of the file"}
        self._functions[number] = _Function(found, source, settings)
        line, needed = _first_line(found), [each for each in _parameters(found) if each.default is each.empty]
        if positional := [each.name for each in needed if each.kind is each.POSITIONAL_ONLY]:
            problem = f"cannot be called with keywords (found the positional-only parameter {positional[0]})"
            return {"problem": f"{source}:{line}: {name} {problem}. Remove the /"}
        return {
            "line": line,
            "required": [each.name for each in needed if _is_named(each) and each.name not in settings],
        }

    def call(self, number: int, arguments: dict[str, object]) -> dict[str, object]:
        """Calls a function with the arguments that its signature has; TRL passes the same."""
        function = self._functions[number]
        metrics: list[tuple[str, float]] = []
        state = types.SimpleNamespace(**cast(dict[str, int], arguments["trainer_state"]))
        arguments |= {
            **function.settings,
            "trainer_state": state,
            "log_metric": lambda name, value: metrics.append((name, float(value))),
            "log_extra": lambda column, values: None,  # TRL adds the column to its table of replies
        }
        parameters = _parameters(function.call)
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            arguments = {p.name: arguments[p.name] for p in parameters if _is_named(p) and p.name in arguments}
        _seed(f"{state.global_step} {number}")
        try:
            found = function.call(**arguments)
            if inspect.isawaitable(found):
                self._loop = self._loop or asyncio.new_event_loop()
                found = self._loop.run_until_complete(found)
            if not isinstance(found, Iterable):
                return {"problem": f"found {type(found).__name__} as its result, expected a list of rewards"}
            values = [_reward(value) for value in found]
        except MemoryError:
            os._exit(MEMORY_REACHED)
        except BaseException as error:  # SystemExit, too
            return {"problem": f"found {_described(error)} at {_place(function.source, error)}"}
        return {"values": values, "metrics": metrics}


def _import_file(path: str) -> types.ModuleType:
    name = f"reward_file_{Path(path).stem}"  # a file may be called json.py
    sys.path.insert(0, str(Path(path).resolve().parent))  # as if Python ran the file
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    return [*inspect.signature(function).parameters.values()]


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def _first_line(function: Callable[..., object]) -> int:
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None) or getattr(function.__call__, "__code__", None)
    return 1 if code is None else code.co_firstlineno


def _seed(text: str) -> None:
    """Seeds the usual generators per call, so that a resumed run draws the same, with any number of workers."""
    random.seed(text)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(random.getrandbits(32))


def _reward(value: object) -> float | str | None:
    """Returns a reward, None for "not scored", or the reason why it cannot be used."""
    if value is None:
        return None
    if isinstance(value, Exception):  # a ready-made function reports a single reply so
        return str(value)
    if isinstance(value, Real) or (getattr(value, "shape", None) == () and hasattr(value, "item")):
        number = float(cast(float, value))
        return number if abs(number) < float("inf") else f"found {number}, expected a finite number or None"
    return f"found {type(value).__name__} {str(value)[:60]!r}, expected a number or None"


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]


def _place(source: str, error: BaseException) -> str:
    """Returns "source:line" of an error, where its line in the source is known."""
    path = os.path.abspath(source)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    return f"{source}:{lines[-1]}" if lines else source


def main(memory: int) -> None:
    """Loads and calls functions until the end of the standard input.

    Args:
      memory: bytes of data; a function that needs more ends this process.
    """
    requests, replies = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # functions print there
    end_with_parent()
    limit_resources({resource.RLIMIT_DATA: memory, resource.RLIMIT_CORE: 0})
    loaded = _Functions()
    while True:
        try:
            number, place, content = pickle.loads(receive(requests, LONGEST_MESSAGE))
        except EOFError:
            return
        found = loaded.call(number, content) if place is None else loaded.load(number, place, content)
        sys.stdout.flush()
        send(replies, json.dumps(found, default=str).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
