"""The mutation check: each mutation still changes the code, and names tests that exist."""

from pathlib import Path

import pytest

from tests.mutation_check import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.old.strip()}")
def test_a_mutation_applies(mutation: Mutation):
    assert mutation.old in (ROOT / mutation.file).read_text(encoding="utf-8")
    assert mutation.old != mutation.new
    for test in mutation.tests.split():
        assert (ROOT / test).exists(), test


def test_there_are_twenty_mutations():
    assert len(set(MUTATIONS)) >= 20
