"""Runs with `lora.merge_into` next to packing, sequence heads, pages of optimizer state, and recomputation."""

import dataclasses

import numpy as np
import pytest

from qlora_jax.config import DataArgs
from tests.e2e.project import project
from tests.e2e.test_merge_into import SIZES
from tests.e2e.test_paging import assert_same_runs, paging_numbers, with_paging
from tests.e2e.test_sequence_heads import rows_of, write
from tests.e2e.tiny_runs import numbers, run, stop_and_resume
from tests.marks import first_slow

CASES = [(case,) for case in (("classification", "q4_0"), ("reward", "nf4"), ("embedding", "q8_0"))]


@pytest.fixture(scope="module", params=first_slow(CASES))
def packed(request, tmp_path_factory):
    """A run of 10 steps with a head, whose rows are packed where the objective allows it."""
    (objective, merge_into), folder = request.param, tmp_path_factory.mktemp("packed")
    lora = dict(merge_into=merge_into, dropout=0.0)
    config = project(folder, base=SIZES, lora=lora, optim=dict(learning_rate=2e-2, schedule="constant"))
    rows = write(folder / "train.jsonl", rows_of(objective, 30))
    data = DataArgs(train=str(rows), max_length=64, eval_fraction=0.2, packing=objective != "embedding")
    config = dataclasses.replace(config, data=data, objective=objective)
    assert run(config)
    return config


def test_a_head_learns_and_resumes_to_the_bit(packed, tmp_path, monkeypatch):
    losses = [record["loss"] for record in numbers(packed) if "loss" in record]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    config = dataclasses.replace(packed, output=str(tmp_path / "run"))
    stop_and_resume(config, 4, monkeypatch)
    assert_same_runs(config, packed)


def test_pages_change_no_bit(packed, tmp_path):
    config = with_paging(packed, tmp_path / "run", paging="on", paging_budget="70KiB")
    assert run(config) and paging_numbers(config)
    assert_same_runs(config, packed)


def test_recomputation_changes_losses_by_rounding_alone(packed, tmp_path):
    config = dataclasses.replace(packed, output=str(tmp_path / "run"))
    config = dataclasses.replace(config, train=dataclasses.replace(packed.train, remat="full", steps=3))
    assert run(config)
    found, expected = ([each["loss"] for each in numbers(one) if "loss" in each][:3] for one in (config, packed))
    np.testing.assert_allclose(found, expected, rtol=1e-2)  # a weight at a tie takes another code
