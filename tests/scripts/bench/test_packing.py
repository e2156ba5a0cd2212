"""The packing benchmark: totals of a method's steps, and cut batches."""

import itertools
import types

import numpy as np
import pytest

from scripts.bench import packing as bench


def test_time_until_a_batch_is_there_counts(monkeypatch: pytest.MonkeyPatch):
    clock = itertools.accumulate([0.0, 1.0, 0.0, 3.0] * 2)  # a batch takes 1 s, its gradients 3 s
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))

    class Gradients:
        compiled = staticmethod(lambda shape: None)

        def __call__(self, *_: object) -> float:
            return 0.0

    batch = types.SimpleNamespace(inputs=np.zeros((1, 1, 8)), arrays=dict, tokens=6)
    method = bench.Method(dataset=None, batches=itertools.repeat(batch), gradients=Gradients())
    for _ in range(2):
        method.step(types.SimpleNamespace(parts=None))
    assert (method.waits, method.rate, method.tokens, method.padding) == (0.25, 12 / 8, 12, 0.25)


def test_a_batch_is_cut_to_its_longest_row():
    ids, lengths = np.zeros((1, 2, 512), np.int32), np.array([[[65], [3]]])
    weights = ids.astype(np.float32)
    batch = bench.Batch(inputs=ids, targets=ids, weights=weights, segments=None, rows=lengths, lengths=lengths)
    assert bench.cut(batch).inputs.shape == bench.cut(batch).weights.shape == (1, 2, 128)
