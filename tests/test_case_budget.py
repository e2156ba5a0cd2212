"""The budget of cases: its arithmetic, and that it names tests that exist."""

import ast
from pathlib import Path

import pytest

from tests.case_budget import BUDGET, spread

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("count", "limit", "expected"), [(6, 3, [0, 2, 4]), (3, 5, [0, 1, 2]), (5, 0, []), (7, 2, [0, 3])]
)
def test_cases_are_spread_evenly(count, limit, expected):
    assert spread(count, limit) == expected


def test_every_entry_names_a_test():
    for name, (default, ci) in BUDGET.items():
        file, function = name.split("::")
        functions = {
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert function in functions, name
        assert 0 <= default <= ci
