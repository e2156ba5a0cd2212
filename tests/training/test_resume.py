"""The JSON part of a checkpoint: the warning for checkpoints of an earlier version."""

import warnings

import pytest

from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs
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
