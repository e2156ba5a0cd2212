"""Scripts that import what lies beside them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"


@pytest.fixture
def load_with_neighbours(load_script, monkeypatch) -> Iterator[Callable[[str], ModuleType]]:
    """`load_with_neighbours(name)`: as `load_script`; what it imports from its folder is forgotten again."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield load_script
    for name in set(sys.modules) - before:
        if (SCRIPTS / f"{name}.py").exists():
            del sys.modules[name]
