"""The best evaluation so far."""

from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.training.early_stopping import BestEvaluation


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0]), min_size=1, max_size=12), st.integers(1, 5))
def test_it_is_the_first_of_the_least_and_patience_counts_from_it(losses, patience):
    best = BestEvaluation()
    assert not best.should_stop(patience)
    for step, loss in enumerate(losses):
        best = best.updated(step, loss)
        so_far = losses[: step + 1]
        assert (best.loss, best.step) == (min(so_far), so_far.index(min(so_far)))
        assert best.should_stop(patience) == (step - best.step >= patience) and not best.should_stop(0)


def test_an_unknown_key_of_a_checkpoint_is_ignored():
    saved = {"best": {"loss": 1.5, "step": 3, "since": 2, "of another version": 0}}
    assert BestEvaluation.from_checkpoint(saved) == BestEvaluation(loss=1.5, step=3, since=2)
