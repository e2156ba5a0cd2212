"""The stages of a study, with runs that finish without training."""

import pytest

from qlora_jax.comparison import dispatch
from qlora_jax.comparison.run import Run
from qlora_jax.comparison.run_files import FAILURE_FILE, RUN_FOLDER
from qlora_jax.comparison.stages import run_study, sized_settings
from qlora_jax.config import ConfigError
from tests.comparison.studies import Inline, finish, read

LORA_RANK_16 = 16 * 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(dispatch, "POLL_SECONDS", 0.001)


class Launcher(Inline):
    """Writes outcomes; `outcome(run)` returns the changes of an outcome, or the text of a failure."""

    def __init__(self, outcome):
        super().__init__(self._write)
        self._outcome, self.runs = outcome, {}

    def _write(self, folder):
        changes = self._outcome(self.runs[folder])
        if isinstance(changes, str):
            (folder / FAILURE_FILE).write_text(changes)
        else:
            finish(self.runs[folder], **changes)


def conduct(study, outcome):
    """Performs a study; returns its runs, and those that were started, in order."""
    launcher, prepare = Launcher(outcome), Run.prepare

    def remembered(run):
        launcher.runs[run.folder] = run
        prepare(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "prepare", remembered)
        runs = run_study(study, sized_settings(study)[0], launcher, 0, lambda line: None)
    return runs, [launcher.runs[folder] for folder in launcher.started]


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


def test_other_failures_end_the_study_with_their_logs(tmp_path):
    with pytest.raises(ConfigError) as error:
        conduct(read(tmp_path, methods={"lora": {}}), lambda run: "data.train: no such file")
    assert len(error.value.problems) == 3
    assert error.value.problems[0].startswith("lora, numbers, learning rate 0.001: data.train: no such file\n  log: ")


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
