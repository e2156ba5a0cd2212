"""The tables of the study of formats."""

import numpy as np

from scripts.study_formats.__main__ import table


def test_a_table_has_each_formats_loss_and_its_difference_from_nf4():
    tokens = np.array([10.0, 20.0, 30.0, 40.0])
    noise = np.random.default_rng(0).normal(size=(3, 4))
    losses = {name: (2 * tokens + noise + extra * tokens, tokens) for name, extra in {"nf4": 0.0, "e3m0": 0.5}.items()}
    nf4, e3m0 = table("ours", losses).splitlines()[2:]
    loss = (2 * tokens + noise).sum() / 300
    assert nf4 == f"| nf4 | {loss:.4f} | {np.exp(loss):.2f} | | |"
    assert e3m0.startswith(f"| e3m0 | {loss + 0.5:.4f} | {np.exp(loss + 0.5):.2f} | +0.5000 | +0.5000 to +0.5000")
