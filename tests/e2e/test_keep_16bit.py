"""A run whose base has some layers in 16 bits: the layers are named before training, and a resumed run has the same."""

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from qlora_jax.training.run import train
from tests.e2e.project import project

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]
KEPT = "self_attn.v_proj of all layers; mlp.down_proj of layer 1 ("


def test_layers_are_named_before_training_and_a_resumed_run_has_the_same(tmp_path):
    keep = dict(keep_16bit=["layers.1.mlp.down_proj", "v_proj"])
    train_args = dict(steps=1, eval_every=0, save_every=0)
    config = project(tmp_path, model=keep, train=train_args, data=dict(eval_fraction=0.0, buckets=1))
    printed = io.StringIO()
    settings = dict(oversized=False, console=Console(file=printed, width=400))
    assert train(config, Path(config.output), resume=False, **settings).finished
    text = printed.getvalue()
    assert text.count(KEPT) == 2  # once for the plan, once for the run
    assert "3 linear layers that model.keep_16bit names" in text
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    other = dataclasses.replace(longer, model=dataclasses.replace(config.model, keep_16bit=[]))
    with pytest.raises(ValueError, match="keep_16bit"):
        train(other, Path(config.output), resume=True, **settings)
