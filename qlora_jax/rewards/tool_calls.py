"""Calls tools and environments, in a process of worker.py.

An environment is an object with a method `reset`, as in TRL: its other public methods are tools, but for `get_reward`.
Each reply has one.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, cast, runtime_checkable

from qlora_jax.rewards.code_files import CodeFiles, described, first_line, place_of
from qlora_jax.rewards.function_schema import function_schema
from qlora_jax.untrusted_json import JsonObject

MEMORY_REACHED = 113  # exit status
TOOL, ENVIRONMENT = "tool", "environment"  # kinds of sources, and of calls
RESET, GET_REWARD = "reset", "get_reward"  # public methods of an environment that are not tools


@runtime_checkable
class Environment(Protocol):
    """An object of TRL's `environment_factory`, which may also have a method `get_reward`."""

    def reset(self, **columns: object) -> str | None:
        """Begins anew; a text that it returns is added to the prompt."""
        ...


class _Made(NamedTuple):
    """The callable that makes environments, and its file."""

    make: Callable[[], Environment]
    source: str


class ToolCalls:
    """The tools of this process, and the environments of replies by their number."""

    def __init__(self, files: CodeFiles):
        self._files = files
        self._tools: dict[str, Callable[..., object]] = {}
        self._made: _Made | None = None
        self._environments: dict[int, Environment] = {}

    def load(self, kind: str, place: str) -> JsonObject:
        """Imports a tool or an environment; returns the schemas of its tools, or a problem."""
        source, _, name = place.rpartition(":")
        try:
            found = self._files.find(place)
        except ImportError as error:
            return {"problem": str(error)}
        if not callable(found) or (kind == TOOL and not hasattr(found, "__code__")):
            return {"problem": self._files.unfit(place, found, kind)}
        if kind == TOOL:
            self._tools[name] = found
            return _described([found], source)
        try:
            one = cast(Environment, found())
        except BaseException as error:
            problem = f"{name} cannot be made (found {described(error)}). Correct it"
            return {"problem": f"{place_of(source, error)}: {problem}"}
        if not callable(getattr(one, RESET, None)):
            return {"problem": f"{source}: {name} makes no environment (found no method reset). Add one"}
        self._made = _Made(cast(Callable[[], Environment], found), source)
        methods = [getattr(one, each) for each in _tool_names(one)]
        more = {"name": type(one).__name__, "has_reward": hasattr(type(one), GET_REWARD)}
        return _described(methods, source) | more

    def reset(self, reply: int, columns: Mapping[str, object]) -> JsonObject:
        """Makes the environment of a reply, and begins it; returns the text that it adds to the prompt, if any."""
        assert self._made is not None, "it is loaded"
        try:
            environment = self._environments[reply] = self._made.make()
            text = self._files.awaited(environment.reset(**columns))
        except MemoryError:
            os._exit(MEMORY_REACHED)
        except BaseException as error:  # SystemExit, too
            return {"problem": f"found {described(error)} at {place_of(self._made.source, error)}"}
        if text is None or isinstance(text, str):
            return {"text": None if text is None else _encodable(text)}
        return {"problem": f"found {type(text).__name__} as the result of reset, expected text or None"}

    def call(self, reply: int, name: str, arguments: Mapping[str, object]) -> JsonObject:
        """Calls a tool for a reply; returns the text that the model reads, that of an error as TRL writes it."""
        try:
            result = self._files.awaited(self._function(name, reply)(**arguments))
        except MemoryError:
            os._exit(MEMORY_REACHED)
        except BaseException as error:  # SystemExit, too
            return {"text": error_text(str(error)), "failed": True}
        return {"text": _encodable(str(result)), "failed": False}

    def environments(self, replies: Sequence[int]) -> list[Environment]:
        """Returns the environments of replies."""
        return [self._environments[reply] for reply in replies]

    def _function(self, name: str, reply: int) -> Callable[..., object]:
        environment = self._environments.get(reply)
        if environment is not None and name in _tool_names(environment):
            return getattr(environment, name)
        if name not in self._tools:
            raise ValueError(f"Tool {name} not found.")  # TRL's words, which the model reads
        return self._tools[name]


async def get_reward(environments: Sequence[Environment], **columns: object) -> list[object]:
    """Returns the reward that each environment gives its reply."""
    found = [getattr(environment, GET_REWARD)() for environment in environments]
    return [await each if inspect.isawaitable(each) else each for each in found]


def _tool_names(environment: object) -> list[str]:
    methods = inspect.getmembers(type(environment), inspect.isfunction)
    return [name for name, _ in methods if name not in (RESET, GET_REWARD) and not name.startswith("_")]


def _described(functions: Sequence[Callable[..., object]], source: str) -> JsonObject:
    schemas: list[JsonObject] = []
    for function in functions:
        try:
            schemas.append(function_schema(function))
        except Exception as error:  # hints may name anything
            text = str(error) if isinstance(error, ValueError) else f"cannot be described ({described(error)})"
            return {"problem": f"{source}:{first_line(function)}: {function.__name__}: {text}"}
    return {"schemas": schemas}


def error_text(problem: str) -> str:
    """Returns what the model reads instead of a tool's answer; TRL writes the same."""
    return _encodable(str({"error": problem}))


def _encodable(text: str) -> str:
    return text.encode(errors="replace").decode()
