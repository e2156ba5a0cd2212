"""Annotations say what a value is: `Any` stands only where a type cannot be written."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("qlora_jax", "pallas_kernels", "scripts")
MOST = 80  # uses of Any, such as for arrays of NumPy or JAX, and for libraries without types


def uses_of_any(text: str) -> int:
    """The number of times that a module names Any, without its import."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(ast.parse(text)))


def test_any_is_rare():
    files = [file for folder in CODE for file in sorted((ROOT / folder).rglob("*.py"))]
    found = {str(file.relative_to(ROOT)): uses_of_any(file.read_text(encoding="utf-8")) for file in files}
    assert sum(found.values()) <= MOST, {file: count for file, count in found.items() if count}


def test_uses_are_counted():
    assert uses_of_any("from typing import Any\ndef f(x: Any) -> dict[str, Any]: ...\nAny = 3") == 3
