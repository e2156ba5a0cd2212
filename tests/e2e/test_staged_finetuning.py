"""A run of a model in memory records the parameters that it starts with, which are its reference."""

import contextlib
import io
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import qlora_jax as q
from qlora_jax.api.evaluate import evaluate_side_by_side
from qlora_jax.api.provenance import attach, parts_of, provenance_of
from qlora_jax.config import read_config
from qlora_jax.evaluation.settings import EvaluateArgs
from qlora_jax.io.pretrained import apply_adapter_with_reference, load_base, open_finetuned
from qlora_jax.models.partition import combine, partition
from qlora_jax.training.run import train
from tests.e2e.project import write_model
from tests.e2e.test_preferences import write_pairs

pytestmark = pytest.mark.slow
QUICK = {"micro_batch_size": 2, "accumulation": 1, "max_length": 64, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """A model with a trained adapter, the DPO run that continued from it, and its pairs."""
    folder = tmp_path_factory.mktemp("staged")
    model, tokenizer = q.load(str(write_model(folder / "model")), compute_dtype="float32")
    model = _changed(q.add_adapter(model, q.LoRA(rank=2)))
    pairs = write_pairs(folder / "pairs.jsonl", 8)
    settings = QUICK | {"objective": "dpo", "config": {"preference.beta": 0.2}}
    run = q.finetune(model, tokenizer, pairs, output=folder / "dpo", steps=2, **settings)
    return model, run, pairs


def _changed(model):
    """The model as if its adapter had been trained: each parameter has another value."""
    parts = parts_of(model)
    return attach(combine(parts.with_lora(jax.tree.map(lambda leaf: leaf + 0.1, parts.lora))), provenance_of(model))


def reference_of(folder: Path):
    opened = open_finetuned(folder)
    return apply_adapter_with_reference(load_base(opened, opened.args), opened.run)[1]


@contextlib.contextmanager
def without_start(folder: Path):
    """Removes the file of the start for a while."""
    hidden = (folder / "start.safetensors").rename(folder / "hidden")
    try:
        yield
    finally:
        hidden.rename(folder / "start.safetensors")


def test_evaluation_has_the_model_before_the_run_as_reference(staged):
    model, run, pairs = staged
    expected = partition(model).lora
    found = reference_of(run.folder)
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, found.lora, dict(expected))
    settings = EvaluateArgs(run=str(run.folder), pairs=str(pairs), columns=["checkpoint"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "right by reward" in evaluate_side_by_side(settings).tasks["pairs"].metrics["checkpoint"]
    with (
        without_start(run.folder),
        pytest.warns(UserWarning, match="no rewards are reported"),
    ):
        metrics = evaluate_side_by_side(settings).tasks["pairs"].metrics["checkpoint"]
    assert "right by likelihood" in metrics and "right by reward" not in metrics


def test_the_command_resumes_with_the_same_reference(staged):
    _, run, _ = staged
    config = read_config(run.folder / "config.yaml")
    assert config.objective == "dpo" and config.preference.beta == 0.2
    out = Console(file=io.StringIO())
    assert train(config, run.folder, resume=True, oversized=False, console=out).finished
    with without_start(run.folder), pytest.raises(ValueError, match=r"started with.*come from start\.safetensors"):
        train(config, run.folder, resume=True, oversized=False, console=out)
