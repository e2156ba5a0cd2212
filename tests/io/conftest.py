"""A small model as a GGUF file, for the tests that read one."""

from pathlib import Path

import pytest

from tests.io.tiny_models import random_weights, tiny_config, write_gguf


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config()
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", config, random_weights(config))
