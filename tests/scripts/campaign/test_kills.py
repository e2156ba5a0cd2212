"""Settings of the runs that campaigns kill."""

from pathlib import Path

import pytest

from qlora_jax.config.validate import validate
from scripts.campaign.kills import VARIANTS
from scripts.campaign.run_results import moved


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_run_may_have_these_settings(kind: str, tmp_path: Path) -> None:
    config = VARIANTS[kind].write(tmp_path, tmp_path / "run")
    validate(config)
    assert VARIANTS[kind].write(tmp_path, tmp_path / "run") == config
    if config.train.samples:
        assert Path(str(moved(config, tmp_path, tmp_path / "run").train.samples)).is_file()
