"""Retrieval by cosine, computed in blocks of anchors, against scipy's ranks."""

import numpy as np
import pytest
import scipy.stats
from scipy.spatial.distance import cdist

from qlora_jax.evaluation.tasks import embeddings
from qlora_jax.evaluation.tasks.embeddings import retrieval_metrics

STATES = np.random.default_rng(0).normal(size=(11, 3, 4))


@pytest.mark.parametrize("block", [4, 512])
def test_the_positives_have_their_ranks_among_all_positives_and_negatives(block, monkeypatch):
    monkeypatch.setattr(embeddings, "ANCHORS", block)
    candidates = np.concatenate([STATES[:, 1], STATES[:, 2]])
    ranks = [scipy.stats.rankdata(row)[own] for own, row in enumerate(cdist(STATES[:, 0], candidates, "cosine"))]
    nearest, reciprocal = retrieval_metrics(STATES)
    assert nearest.value == pytest.approx(np.mean(np.array(ranks) == 1))
    assert reciprocal.value == pytest.approx(np.mean(1 / np.array(ranks)))
