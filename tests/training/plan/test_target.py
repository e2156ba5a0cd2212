"""The card and the model of a plan, from settings."""

import json

import pytest

from pallas_kernels.gpu_specs import CARDS
from qlora_jax.config import ConfigError
from qlora_jax.models.families import model_config
from qlora_jax.training.plan.target import model_features, plan_target
from tests.io.tiny_models import tiny_config


def test_a_target_is_a_card_or_the_nearest_by_memory():
    assert plan_target("a100", None).memory_bytes == CARDS["a100"].memory_bytes
    assert plan_target(None, "24GiB").card.name == "rtx4090" and plan_target(None, "24GiB").memory_bytes == 24 * 2**30
    assert plan_target("cpu", None).card is None and plan_target("cpu", None).memory_bytes > 2**30
    with pytest.raises(ValueError, match="Did you mean 'rtx4090'"):
        plan_target("rtx409", None)
    with pytest.raises(ConfigError, match="neither is given"):
        plan_target(None, None)
    with pytest.raises(ConfigError, match="memory: found '24 gigs'"):
        plan_target("a100", "24 gigs")


def test_a_model_is_a_folder_a_config_or_a_published_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert model_features(str(tmp_path)) == model_features(str(tmp_path / "config.json")) == model_config(tiny_config())
    assert model_features("llama-3-8b").embed_dim == 4096
    with pytest.raises(ValueError, match="Did you mean llama-3-8b"):
        model_features("llama3-8b")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="line 1, column 2: not JSON"):
        model_features(str(tmp_path))
