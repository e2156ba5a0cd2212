"""The search for learning rates, with runs that finish without training."""

import re

import pytest

from qlora_jax.config import ConfigError
from qlora_jax.studies.comparison import dispatch
from qlora_jax.studies.comparison.page import page
from qlora_jax.studies.comparison.results import summarize
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


def test_the_mean_over_the_seeds_of_the_search_chooses(tmp_path):
    study = read(tmp_path, methods={"lora": {}}, learning_rates=[0.1, 0.001, 0.01], search_seeds=[7, 8])
    losses = {(0.1, 7): 0.0, (0.1, 8): None, (0.001, 7): 0.1, (0.001, 8): 0.9, (0.01, 7): 0.4, (0.01, 8): 0.4}
    runs, _ = conduct(
        study,
        lambda run: {"search_loss": losses.get((run.settings["optim.learning_rate"], run.settings["train.seed"]))},
    )
    assert [run.config.optim.learning_rate for run in runs if run.stage == "final"] == [0.01] * 3
    table = page(summarize(study, runs, {("lora", "numbers"): 1}))
    assert re.findall(r"<td>([^<]+)</td><td>([^<]+)</td><td>([^<]*)</td></tr>", table.split("Search of")[1]) == [
        ("0.1", "not finite", ""),
        ("0.001", "0.5000", ""),
        ("0.01", "0.4000", "chosen"),
    ]


def test_a_search_without_a_finite_loss_is_an_error(tmp_path):
    study = read(tmp_path, methods={"lora": {}})
    with pytest.raises(ConfigError, match=r"learning_rates: all of lora, numbers diverged\. Add lower ones"):
        conduct(study, lambda run: {"search_loss": None})
