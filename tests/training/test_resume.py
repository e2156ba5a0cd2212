"""The JSON part of a checkpoint: the warning for those of an earlier version, and the settings that may differ."""

import dataclasses
import re
import warnings
from pathlib import Path

import pytest

from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs
from qlora_jax.config.policy import PolicyArgs
from qlora_jax.training import resume
from qlora_jax.training.resume import MESH_KEY, warn_of_other_masks


def config_with(dropout: float) -> Config:
    return Config(
        model=ModelArgs(path="model"), data=DataArgs(train="rows"), lora=LoraArgs(dropout=dropout), output="runs/old"
    )


def test_other_dropout_masks_are_a_warning():
    with pytest.warns(UserWarning, match=r"^runs/old: lora\.dropout: .* checkpoint of step 6\. The losses will differ"):
        warn_of_other_masks(config_with(0.1), {"step": 6})


@pytest.mark.parametrize(("dropout", "state"), [(0.0, {}), (0.1, {MESH_KEY: {"data": 1, "fsdp": 1}})])
def test_equal_masks_are_not(dropout, state):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_masks(config_with(dropout), {"step": 6} | state)


@pytest.mark.parametrize(("loss_type", "changed"), [("dapo", 0), ("grpo", 0), ("bnpo", 2)])
def test_a_loss_that_is_a_mean_over_a_micro_batch_keeps_the_split(loss_type, changed):
    config = dataclasses.replace(config_with(0.0), policy=PolicyArgs(loss_type=loss_type))
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=4, accumulation=4))
    assert len(resume._changed_settings(other, config)) == changed


def test_the_page_names_the_settings_that_may_differ():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    table = page[page.index("### Settings that may differ") : page.index("### Digests and damage")]
    named = {*re.findall(r"`([\w.]+(?:\.\*)?)`", table)}
    sections = {name.removesuffix(".*") for name in named if name.endswith(".*")}
    settings = {name for name in resume.MAY_DIFFER | resume.SPLIT if name.partition(".")[0] not in sections}
    assert settings == {name for name in named if not name.endswith(".*")}
    assert sections == {name.partition(".")[0] for name in (resume.MAY_DIFFER | resume.SPLIT) - settings}
