"""Bytes of a step on a card: the formulas, and a message where compiling for cards is not possible."""

import pytest

from qlora_jax.models.remat import REMAT_POLICIES
from qlora_jax.training.cost import flops
from qlora_jax.training.cost.memory_use import activation_bytes
from scripts.bench.profile import card, parts
from tests.scripts.bench.profile.example_program import counted


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_what_the_formulas_count_has_a_place(remat):
    flop = parts.flop_by_part(flops.flops(counted(remat)))
    assert flop.keys() <= set(parts.PARTS)
    assert {direction for part in flop.values() for direction in part} <= set(parts.DIRECTIONS)
    assert ("recomputed" in flop["frozen"]) == REMAT_POLICIES[remat].recomputes_products
    rows = card.formula_rows(counted(remat))
    saved = sum(row["bytes"] for row in rows if row["what"].startswith("saved"))
    assert saved == sum(activation_bytes(counted(remat)).values())


def test_without_the_wheels_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(card.aot, "problem", lambda: "packages missing: some; install them: so")
    with pytest.raises(SystemExit, match="install them: so"):
        card.bytes_on(None, None)
