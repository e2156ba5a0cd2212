"""The card and the model of a plan, from settings."""

import json

import pytest

from pallas_kernels.gpu_specs import CARDS
from qlora_jax.config import ConfigError, ModelArgs
from qlora_jax.models.families import model_config
from qlora_jax.training.plan.target import model_features, plan_target, planned_weights
from tests.e2e.test_resume_bases import mxfp4_gpt_oss
from tests.io.tiny_models import tiny_config, write_folder


def test_a_target_is_a_card_or_the_nearest_by_memory():
    assert plan_target("a100", None).memory_bytes == CARDS["a100"].memory_bytes
    assert plan_target(None, "24GiB").card.name == "rtx4090" and plan_target(None, "24GiB").memory_bytes == 24 * 2**30
    assert plan_target(None, "16GiB").card.name == "l4"  # a T4 is nearer, and runs other kernels than most cards
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


def test_the_codes_of_gpt_oss_are_known_from_its_config_and_those_of_other_models_from_files(tmp_path):
    config, tensors = mxfp4_gpt_oss()
    features, folder = model_config(config), write_folder(tmp_path / "model", config, tensors)
    paths = [folder, folder / "config.json"]
    of_files, of_config = (
        planned_weights(ModelArgs(path=str(path), quant_type="stored"), features, "gpu") for path in paths
    )
    assert of_config == of_files and dict(of_config.stored)["mlp.experts.up_proj"] == ("MXFP4",) * features.num_layers
    name = "gpt-oss-20b"
    published = planned_weights(ModelArgs(path=name, quant_type="stored"), model_features(name), "gpu")
    assert {*dict(published.stored)["mlp.experts.down_proj"]} == {"MXFP4"}
    with pytest.raises(ValueError, match=r"found 'stored', .*or a config of gpt-oss.*set model.quant_type=nf4"):
        planned_weights(ModelArgs(path="llama-3-8b", quant_type="stored"), model_features("llama-3-8b"), "gpu")
