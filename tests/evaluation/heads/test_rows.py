"""Outputs of heads that are not finite are refused by row."""

import numpy as np
import pytest

from qlora_jax.data.readers.files import Place
from qlora_jax.evaluation.heads.rows import check_are_finite
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.training.held_out import held_out_head_metrics

PLACES = [Place(line, line - 1) for line in (1, 2, 3, 4)]


def test_rows_that_are_not_finite_are_listed():
    outputs = np.zeros((4, 2, 3))
    check_are_finite("rows.jsonl", PLACES, outputs)
    outputs[1, 1, 2], outputs[3, 0, 0] = np.nan, -np.inf
    with pytest.raises(ValueError, match=r"(?s)rows.jsonl: 2 of 4 rows.*rows.jsonl:2, 4: an output"):
        check_are_finite("rows.jsonl", PLACES, outputs)


@pytest.mark.parametrize("objective", ["reward", "embedding"])
def test_held_out_rows_are_listed_by_number(objective):
    outputs = np.ones((3, 2, 1))
    outputs[2, 1] = np.nan
    with pytest.raises(ValueError, match="held-out rows:8: an output of the sequence head is not finite"):
        held_out_head_metrics(TrainedHead(objective=objective), outputs, {}, [0, 3, 7])
