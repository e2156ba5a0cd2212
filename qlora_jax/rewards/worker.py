"""Runs reward functions and tools in a separate process; worker_process.py starts it and describes its messages.

It imports nothing that takes long, so it starts in a fraction of a second. Functions print to the standard error.
"""

import inspect
import json
import os
import pickle
import resource
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import NamedTuple, cast

from qlora_jax.rewards.code_files import CodeFiles, described, first_line, place_of, seed_generators
from qlora_jax.rewards.tool_calls import ENVIRONMENT, MEMORY_REACHED, ToolCalls
from qlora_jax.sandbox.landlock_seccomp import end_with_parent
from qlora_jax.sandbox.limits import limit_resources
from qlora_jax.sandbox.programs import receive, send

LONGEST_MESSAGE = 1 << 40  # bytes


class _Function(NamedTuple):
    """A loaded function, the file or module that it is from, and the settings that every call gets."""

    call: Callable[..., object]
    source: str
    settings: Mapping[str, object]


class _Functions:
    """The functions of this process by their number."""

    def __init__(self, files: CodeFiles, tools: ToolCalls):
        self._functions: dict[int, _Function] = {}
        self._files, self._tools = files, tools

    def load(self, number: int, place: str, settings: Mapping[str, object]) -> dict[str, object]:
        """Imports "file.py:name" or "module:name"; returns its line and required arguments, or a problem."""
        source, _, name = place.rpartition(":")
        try:
            found = self._files.find(place)
        except ImportError as error:
            return {"problem": str(error)}
        if not callable(found) or isinstance(found, type):
            return {"problem": self._files.unfit(place, found, "function")}
        self._functions[number] = _Function(found, source, settings)
        line, needed = first_line(found), [each for each in _parameters(found) if each.default is each.empty]
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
        if "environments" in arguments:
            arguments["environments"] = self._tools.environments(cast(Sequence[int], arguments["environments"]))
        parameters = _parameters(function.call)
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            arguments = {p.name: arguments[p.name] for p in parameters if _is_named(p) and p.name in arguments}
        seed_generators(f"{state.global_step} {number}")
        try:
            found = self._files.awaited(function.call(**arguments))
            if not isinstance(found, Iterable):
                return {"problem": f"found {type(found).__name__} as its result, expected a list of rewards"}
            values = [_reward(value) for value in found]
        except MemoryError:
            os._exit(MEMORY_REACHED)
        except BaseException as error:  # SystemExit, too
            return {"problem": f"found {described(error)} at {place_of(function.source, error)}"}
        return {"values": values, "metrics": metrics}


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    return [*inspect.signature(function).parameters.values()]


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


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
    files = CodeFiles()
    tools = ToolCalls(files)
    functions = _Functions(files, tools)
    while True:
        try:
            name, place, content = pickle.loads(receive(requests, LONGEST_MESSAGE))
        except EOFError:
            return
        if isinstance(name, int):
            found = functions.call(name, content) if place is None else functions.load(name, place, content)
        elif place is not None:
            found = tools.load(name, place)
        else:
            seed_generators(content.pop("seed"))
            found = tools.reset(**content) if name == ENVIRONMENT else tools.call(**content)
        sys.stdout.flush()
        send(replies, json.dumps(found, default=str).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
