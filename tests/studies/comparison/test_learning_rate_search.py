"""The search for learning rates, with runs that finish without training."""

import pytest

from qlora_jax.config import ConfigError
from qlora_jax.studies.comparison import dispatch
from tests.studies.comparison.studies import conduct, read


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0.001)


def test_diverged_learning_rates_are_passed_over_and_stay_in_the_results(tmp_path):
    study = read(tmp_path, methods={"lora": {}}, learning_rates=[0.1, 0.001, 0.01])

    def diverges(run):
        rate = run.settings["optim.learning_rate"]
        return {"search_loss": None if run.stage == "final" or rate > 0.01 else rate}

    runs, _ = conduct(study, diverges)
    assert [run.config.optim.learning_rate for run in runs if run.stage == "final"] == [0.001] * 3
    assert [run.outcome()["search_loss"] for run in runs if run.stage == "search"] == [None, 0.001, 0.01]
    _, again = conduct(study, diverges)
    assert again == []


def test_a_search_without_a_finite_loss_is_an_error(tmp_path):
    study = read(tmp_path, methods={"lora": {}})
    with pytest.raises(ConfigError, match=r"learning_rates: all of lora, numbers diverged\. Add lower ones"):
        conduct(study, lambda run: {"search_loss": None})
