"""Imports the files that a command line names, in the process that calls their functions."""

import asyncio
import functools
import importlib
import importlib.util
import inspect
import os
import random
import sys
import traceback
import types
from collections.abc import Awaitable, Callable
from pathlib import Path

_LONGEST_ERROR = 2000  # characters


class CodeFiles:
    """The files of this process, each imported once."""

    def __init__(self):
        self._modules: dict[str, types.ModuleType] = {}
        self._loop: asyncio.AbstractEventLoop | None = None  # one for all calls: clients stay bound to their loop

    def find(self, place: str) -> object:
        """Returns the object that "file.py:name" or "module:name" names; None if the file lacks it.

        Raises:
          ImportError: the file is missing or cannot be imported; the message names its line.
        """
        source, _, name = place.rpartition(":")
        is_file = source.endswith(".py")
        if is_file and not Path(source).exists():
            raise ImportError(f"{source}: no such file. Correct the path")
        try:
            if source not in self._modules:
                self._modules[source] = _import_file(source) if is_file else importlib.import_module(source)
        except BaseException as error:  # SystemExit, too
            fix = "Correct the file" if is_file else "Install its extra (docs/rl.md)"
            raise ImportError(
                f"{place_of(source, error)}: cannot be imported (found {described(error)}). {fix}"
            ) from error
        return getattr(self._modules[source], name, None)

    def unfit(self, place: str, found: object, kind: str) -> str:
        """Returns the problem of a place whose object, from `find`, is not of the kind that is needed."""
        source, _, name = place.rpartition(":")
        module = self._modules[source]
        own = [each for each, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        what = f"{', '.join(own) or 'no function'} in the file" if found is None else type(found).__name__
        return f"{source}: {name} is not a {kind} (found {what}). Name one of the file"

    def awaited(self, value: object) -> object:
        """Returns the result of a coroutine, and any other value as it is."""
        if not inspect.isawaitable(value):
            return value
        self._loop = self._loop or asyncio.new_event_loop()
        return self._loop.run_until_complete(_result(value))


async def _result(value: Awaitable[object]) -> object:
    return await value


def _import_file(path: str) -> types.ModuleType:
    name = f"reward_file_{Path(path).stem}"  # a file may be called json.py
    sys.path.insert(0, str(Path(path).resolve().parent))  # as if Python ran the file
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def first_line(function: Callable[..., object]) -> int:
    """Returns the line at which a function begins, 1 if it is unknown."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None) or getattr(function.__call__, "__code__", None)
    return 1 if code is None else code.co_firstlineno


def seed_generators(text: str) -> None:
    """Seeds the usual generators per call, so that a resumed run draws the same, with any number of workers."""
    random.seed(text)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(random.getrandbits(32))


def described(error: BaseException) -> str:
    """Returns an error's kind and text."""
    return f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]


def place_of(source: str, error: BaseException) -> str:
    """Returns "source:line" of an error, where its line in the source is known."""
    path = os.path.abspath(source)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    return f"{source}:{lines[-1]}" if lines else source
