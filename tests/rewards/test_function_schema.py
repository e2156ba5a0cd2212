"""Schemas of tools equal those of transformers, and functions that it refuses are refused."""

import importlib.util
import json
from pathlib import Path

import pytest

from qlora_jax.rewards.function_schema import function_schema

SCRIPT = Path(__file__).parent.parent / "oracle/tool_schemas.py"
FILE = '''
import enum
from typing import Any, Dict, List, Literal, Optional, Tuple, Union

class Color(enum.Enum):
    RED = "red"
    TWO = 2

class Empty(enum.Enum):
    pass

def plain(query: str, top: int = 3) -> str:
    """Search: finds pages.

    More text.

    Args:
        query: the words to find,
            over: two lines
        top (int, optional): how many (choices: [1, 2, 3])

    Returns:
        the text
          of it
    Raises:
        ValueError: never
    """

def kinds(a: int | None, b: list[int], c: dict[str, float], d: tuple[int, str], e: Any, f: Literal["x", 1, None]):
    """Kinds.
    Args:
        a: first
        b:
            second
        c: third
        d: fourth
          deeper: text
        e (dict[str, int]): fifth
        f: sixth (Choices: [" x ", "y"])
    """

def unions(x: Union[int, str], y: Optional[Color] = None, z: List[int] | Tuple = (), *, k: bool = True) -> "Color":
    """
    Unions

    Args:
        x: ex

        y: why: with a colon
      z: less indented
        z2: deeper
      k: key

    Returns:
        a color: red
    """

def tabs(a: str, b: list, c: Dict[str, int] = {}, d: list | tuple | None = None, *rest: int) -> object:
    """Tabs.

\tArgs:
\t\ta: ay
\t\tb: bee
\t\tc: see
\t\td: dee
\t\trest: others
\t"""

def inline(a: int) -> float:
    """Has Args: in its text.

    Args:
        a: the number

    Raises:
        E: x

    Returns:
        late
    """

def nothing() -> None:
    "Returns: nothing"

class Holder:
    def method(self, a: float | int | str) -> list[str]:
        """A method.

        Args:
            a: x
        """

method = Holder().method

def no_docstring(a: int): pass
def no_hint(a):
    """Doc.

    Args:
        a: x
    """
def not_described(a: int, b: int):
    """Doc.

    Args:
        a:
        b: swallowed
    """
def heading_first(a: int):
    """Args:
        a: x
    """
def own_class(a: Holder):
    """Doc.

    Args:
        a: x
    """
def single(a: tuple[int]):
    """Doc.

    Args:
        a: x
    """
def endless(a: tuple[int, ...]):
    """Doc.

    Args:
        a: x
    """
def empty(a: Empty):
    """Doc.

    Args:
        a: x
    """
def bytes_choice(a: Literal[b"x"]):
    """Doc.

    Args:
        a: x
    """
def bad_choices(a: str):
    """Doc.

    Args:
        a: x (choices: [nothing])
    """
'''
GOOD = ("plain", "kinds", "unions", "tabs", "inline", "nothing", "method")
BAD = {
    "no_docstring": "has no docstring",
    "no_hint": "its argument 'a' has no type hint",
    "not_described": "does not describe the argument 'b'",
    "heading_first": "does not describe the argument 'a'",
    "own_class": "the type hint of 'a' has no JSON schema",
    "single": "the type hint of 'a' has no JSON schema",
    "endless": "the type hint of 'a' has no JSON schema",
    "empty": "has choices that are not JSON",
    "bytes_choice": "has choices that are not JSON",
    "bad_choices": "the choices of 'a' are not JSON",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "functions.py"
    path.write_text(FILE)
    return path


def load(path: Path):
    spec = importlib.util.spec_from_file_location("functions_of_schemas", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # the oracle imports transformers
def test_schemas_equal_those_of_transformers(oracle, file):
    found = json.loads(str(oracle(SCRIPT, file=str(file), names=[*GOOD, *BAD])["json"]))
    module = load(file)
    for name, expected in zip(GOOD, found, strict=False):
        own = function_schema(getattr(module, name))
        assert json.dumps(own) == json.dumps(expected), name  # templates write the keys in their order
    assert found[len(GOOD) :] == [None] * len(BAD)


@pytest.mark.parametrize(("name", "problem"), BAD.items())
def test_a_function_that_cannot_be_described(file, name, problem):
    with pytest.raises(ValueError, match=problem):
        function_schema(getattr(load(file), name))


def test_the_example_demonstrates_the_tool_as_prompts_show_it():
    module = load(Path(__file__).parents[2] / "examples/tools/arithmetic.py")
    assert function_schema(module.multiply) == {"type": "function", "function": module.SCHEMA}
