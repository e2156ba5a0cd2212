"""The waiting times that the loop reports for batches."""

from qlora_jax.training import loop


def test_a_batch_is_waited_for_until_it_is_there_and_no_longer(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])

    def batches():
        for seconds in (2.0, 0.5):
            clock[0] += seconds  # a batch is made
            yield seconds

    told = []
    for batch, waited in loop.timed(batches()):
        clock[0] += 10.0  # a step
        told.append((batch, waited))
    assert told == [(2.0, 2.0), (0.5, 0.5)]
