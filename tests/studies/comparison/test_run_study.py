"""The stages of a study, with runs that finish without training."""

import pytest

from qlora_jax.config import ConfigError
from qlora_jax.studies.comparison import dispatch
from qlora_jax.studies.comparison.run_files import RUN_FOLDER
from qlora_jax.studies.comparison.run_study import sized_settings
from tests.studies.comparison.studies import conduct, read

LORA_RANK_16 = 16 * 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0.001)


def test_each_method_trains_with_its_best_learning_rate_and_its_own_seed(tmp_path):
    study = read(tmp_path, methods={"lora": {}, "dora": {"lora.method": "dora"}}, seeds=[5, 7])
    best = {"lora": 0.01, "dora": 0.001}

    def outcome(run):
        return {"search_loss": 1.0 if run.settings["optim.learning_rate"] == best[run.method] else 2.0}

    runs, started = conduct(study, outcome)
    assert [run.stage for run in started] == ["search"] * 4 + ["final"] * 4 and runs == started
    search, final = started[:4], started[4:]
    assert {run.config.train.seed for run in search} == {1000}
    assert {run.config.data.eval for run in search} == {str(tmp_path / "search.jsonl")}
    assert [run.config.data.eval for run in final] == [None] * 4 and [run.seed for run in final] == [5, 7, 5, 7]
    assert [run.config.optim.learning_rate for run in final] == [0.01, 0.01, 0.001, 0.001]
    assert all(run.config.train.steps == 3 for run in started)
    assert [run.job()["evaluate"] is None for run in started] == [True] * 4 + [False] * 4
    assert final[0].config.output == str(final[0].folder / RUN_FOLDER)
    _, again = conduct(study, outcome)
    assert again == []


def test_other_failures_end_the_study_with_their_logs(tmp_path):
    with pytest.raises(ConfigError) as error:
        conduct(read(tmp_path, methods={"lora": {}}), lambda run: "data.train: no such file")
    assert len(error.value.problems) == 3
    assert error.value.problems[0].startswith(
        "lora, numbers, learning rate 0.001, seed 1000: data.train: no such file\n  log: "
    )


def test_equal_times_become_steps_of_measured_length(tmp_path):
    study = read(tmp_path, methods={"lora": {}, "dora": {"lora.method": "dora"}}, budget={"seconds": 10.0})
    seconds = {"lora": 0.5, "dora": 0.9}
    runs, started = conduct(study, lambda run: {"seconds_per_step": seconds[run.method]})
    assert [run.stage for run in started[:3]] == ["calibration", "calibration", "search"]
    assert started[0].config.train.steps == 10 and started[0].config.data.eval is None
    assert {(run.method, run.config.train.steps) for run in runs} == {("lora", 20), ("dora", 11)}


def test_equal_numbers_of_parameters_become_ranks(tmp_path):
    methods = {"all": {}, "attention": {"lora.target_modules": ["q_proj", "v_proj"]}}
    budget = {"trainable_parameters": LORA_RANK_16, "tolerance": 0.01}
    sizes, counts = sized_settings(read(tmp_path, methods=methods, budget=budget))
    assert sizes["all", "numbers"] == {"lora.rank": 16} and counts["all", "numbers"] == LORA_RANK_16
    assert abs(counts["attention", "numbers"] / LORA_RANK_16 - 1) < 0.01
    with pytest.raises(ConfigError, match=r"methods\.vectors: budget\.trainable_parameters: found .* this method has"):
        sized_settings(read(tmp_path, methods=methods | {"vectors": {"lora.method": "ia3"}}, budget=budget))
