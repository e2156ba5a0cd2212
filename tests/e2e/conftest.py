"""A finished run that several files of tests read."""

import pytest

from qlora_jax.config import Config
from tests.e2e.project import project
from tests.e2e.tiny_runs import run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of 10 steps, uninterrupted."""
    config = project(tmp_path_factory.mktemp("finished"))
    assert run(config)
    return config
