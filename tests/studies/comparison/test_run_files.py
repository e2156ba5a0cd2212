"""Outcomes of runs, and damage to them."""

import json
from pathlib import Path

import pytest

from qlora_jax.line_digests import with_digest
from qlora_jax.studies.comparison.run_files import OUTCOME_FILE, RunOutcome, read_outcome, write_outcome

OUTCOME = RunOutcome(
    inputs={"lora.rank": 4},
    steps=3,
    seconds=1.5,
    seconds_per_step=0.5,
    peak_bytes=None,
    search_loss=None,
    values=[2.5, 1.25],
    weights=[3.0, 1.0],
)


def test_an_outcome_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_outcome(tmp_path, OUTCOME)
    assert read_outcome(tmp_path, tmp_path) == OUTCOME


def test_outcomes_without_digests_are_read_with_one_warning_per_study(tmp_path: Path) -> None:
    folders = [tmp_path / "seed 0", tmp_path / "seed 1"]
    for folder in folders:
        folder.mkdir()
        (folder / OUTCOME_FILE).write_text(json.dumps(OUTCOME) + "\n")
    with pytest.warns(UserWarning, match=f"^{tmp_path}: an earlier version .* without digests") as caught:
        assert [read_outcome(folder, tmp_path) for folder in folders] == [OUTCOME, OUTCOME]
    assert len(caught) == 1


def test_changed_digits_are_refused(tmp_path: Path) -> None:
    write_outcome(tmp_path, OUTCOME)
    path = tmp_path / OUTCOME_FILE
    path.write_text(path.read_text().replace("1.25", "1.75"))
    with pytest.raises(ValueError, match=r"outcome\.json: damaged .*Delete this file to perform the run again"):
        read_outcome(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "changes", [{"values": [1.0]}, {"values": [1.0, float("inf")]}, {"weights": [0.0, 0.0]}, {"weights": [1.0, -1.0]}]
)
def test_values_that_are_no_measures_of_rows_are_refused(tmp_path: Path, changes: dict[str, list[float]]) -> None:
    (tmp_path / OUTCOME_FILE).write_text(with_digest(json.dumps({**OUTCOME, **changes})))
    with pytest.raises(ValueError, match=r"outcome\.json: values, weights: found"):
        read_outcome(tmp_path, tmp_path)
